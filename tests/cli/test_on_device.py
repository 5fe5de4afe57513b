"""What a device does with a bundle, on a machine that has neither torch nor onnx."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from exporter.cli import main
from exporter.cli._app import extra_with
from exporter.job import EMBEDDED, Job
from exporter.pipeline import run_export, run_pack, why_recorded
from exporter.workspace import Workspace
from tests.conftest import for_one_gpu, needs_rtx

WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", *{lacking}):
    sys.modules[name] = None
from exporter.cli import main
from exporter.cli._app import extra_with
sys.exit(main(sys.argv[1:]))
"""


def device(*arguments: str, lacking: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_TORCH.format(lacking=lacking), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)


def test_reductions_are_listed_without_torch() -> None:
    """What fits which family follows from shapes alone."""
    listed = device("list", "reductions", "--json")
    assert listed.returncode == 0, listed.stderr
    found = {r["name"]: r["families"] for r in json.loads(listed.stdout)["reductions"]}
    assert {"llava", "qwen2_5_vl"} <= set(found["visionzip"])
    assert "llava" in found["tome"]
    assert "qwen2_5_vl" not in found["tome"]


@pytest.mark.parametrize(
    ("arguments", "module"),
    [(("run", "embedded", "-o"), "onnx_ir"), (("export", "embedded", "-o"), "onnx_ir"), (("demo", "-o"), "torch")],
)
def test_what_needs_torch_says_how_to_get_it(arguments: tuple[str, ...], module: str, tmp_path: Path) -> None:
    refused = device(*arguments, str(tmp_path / "out"))
    assert (refused.returncode, refused.stdout) == (5, "")
    assert (
        f"Error: This needs `{module}`, which is not installed here. pip install 'edgetrim[export]'" in refused.stderr
    )
    assert not (tmp_path / "out").exists()


def test_a_module_that_no_extra_brings_is_our_fault() -> None:
    assert extra_with("torch") == "export"
    assert extra_with("onnx_ir") == "export"
    assert extra_with("antigravity") is None


def test_build_bench_validate_and_pack_need_no_torch(bundle: Path) -> None:
    built = device("build", str(bundle), "--json")
    assert built.returncode == 0, built.stderr
    timed = device("bench", str(bundle), "--no-compare", "--rounds", "2", "--json")
    assert timed.returncode == 0, timed.stderr
    assert (
        json.loads((bundle / "evidence/latency.json").read_text())["variants"]["engine_reduced"]["ttft"]["rounds"] == 2
    )
    compared = device("validate", str(bundle), "--json")
    assert compared.returncode == 0, compared.stderr
    packed = device("pack", str(bundle), "--json")
    assert packed.returncode == 0, packed.stderr
    looked = device("inspect", str(bundle), "--json")
    assert looked.returncode == 0, looked.stderr


def test_one_verb_does_all_that_a_device_does(bundle: Path) -> None:
    """`run` on a bundle: engines that it lacks, fidelity by the recording, latency, a manifest that holds."""
    (bundle / "manifest.json").unlink()
    shutil.rmtree(bundle / "engines")
    ran = device("run", str(bundle), "--rounds", "2", "--json")
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["folder"] == str(bundle)
    assert found["validation"]["recorded"] is True
    assert {row["stage"] for row in found["validation"]["fidelity"]} >= {"vision", "prefill", "decode"}
    assert found["latency"]["variants"].keys() == {"engine_reduced"}
    assert found["latency"]["rounds"] == 2
    named = json.loads((bundle / "manifest.json").read_text())["files"]
    assert {"engines/engines.json", "evidence/latency.json", "evidence/layers.json", "report.html"} <= named.keys()
    verified = device("verify", str(bundle))
    assert verified.returncode == 0, verified.stderr

    engines = {path.name: path.stat().st_mtime_ns for path in (bundle / "engines").iterdir()}
    again = device("run", str(bundle), "--rounds", "2", "--threads", "1", "--json")
    assert again.returncode == 0, again.stderr
    assert engines == {path.name: path.stat().st_mtime_ns for path in (bundle / "engines").iterdir()}, "kept"

    for arguments, said in (
        (("--reduce", "random:keep=8", "-o", "elsewhere"), "leave out --reduce, --output,"),
        (("--profile", "cpu_fp32"), "leave out --profile,"),
        (("--questions", "q.jsonl"), "PyTorch is not installed here. Ask them where the model was exported"),
    ):
        refused = device("run", str(bundle), *arguments)
        assert refused.returncode == 2
        assert said in refused.stderr, refused.stderr

    (bundle / "report.html").write_text("changed")
    assert device("run", str(bundle)).returncode == 6


def test_without_a_checkpoint_the_recording_is_compared_with(bundle: Path) -> None:
    """PyTorch alone cannot say what the model gives."""
    job = json.loads((bundle / "job.json").read_text())
    (bundle / "job.json").write_text(json.dumps({**job, "checkpoint": str(bundle / "gone")}))
    (bundle / "manifest.json").unlink()
    assert "gone" in (why_recorded(Job.read(Workspace(bundle))) or "")
    assert why_recorded(Job(EMBEDDED, (), "cpu_fp32")) is None
    assert main(["validate", str(bundle), "--json"]) == 0
    assert json.loads((bundle / "evidence/validation.json").read_text())["recorded"] is True


def test_fidelity_against_the_recording_is_that_against_pytorch(bundle: Path, finished: tuple[Path, int, str]) -> None:
    """Where PyTorch recorded, the same engine on the same samples finds the same numbers."""
    live = {r["stage"]: r for r in json.loads((finished[0] / "evidence/validation.json").read_text())["fidelity"]}
    recorded = device("validate", str(bundle), "--threads", "1", "--json")
    assert recorded.returncode == 0, recorded.stderr
    found = json.loads(recorded.stdout)
    assert found["recorded"] is True
    assert {r["stage"] for r in found["fidelity"]} == set(live)
    for row in found["fidelity"]:
        for key in ("cosine", "max_abs", "agreement"):
            assert (row[key] is None) == (live[row["stage"]][key] is None)
            assert row[key] is None or abs(row[key] - live[row["stage"]][key]) < 1e-6, (row["stage"], key)
    assert found["quality"] == json.loads((finished[0] / "evidence/validation.json").read_text())["quality"]


def test_a_recording_that_does_not_fit_the_engine_fails_the_gate(bundle: Path) -> None:
    """Other logits recorded than the engine gives: exit code 3, as on the machine that exported."""
    path = bundle / "evidence/reference.npz"
    with np.load(path) as file:
        arrays = dict(file)
    for name in [k for k in arrays if k.endswith("logits")]:
        most = arrays[name].max(axis=1, keepdims=True)  # the same greedy tokens, so that as many steps are compared
        arrays[name] = np.where(arrays[name] == most, most, np.minimum(-arrays[name], most - 1))
    np.savez_compressed(path, **arrays)
    failed = device("validate", str(bundle))
    assert failed.returncode == 3
    assert "did not pass" in failed.stderr


def test_a_damaged_recording(bundle: Path) -> None:
    (bundle / "evidence/reference.npz").write_bytes(b"PK")
    assert "reference.npz cannot be read" in device("validate", str(bundle)).stderr
    (bundle / "evidence/reference.npz").unlink()
    refused = device("validate", str(bundle))
    assert refused.returncode == 2
    assert "Run `edgetrim validate` where the model was exported" in refused.stderr


@needs_rtx
def test_a_bundle_without_engines_says_how_to_build_them_and_is_built(tmp_path: Path) -> None:
    """Packed where no engine was built, for a profile of the user's own, which is not on the device."""
    profile = Path(for_one_gpu("rtx_fp16", tmp_path))
    work = Workspace(tmp_path / "out")
    work.folder.mkdir()
    run_export(Job(EMBEDDED, ("visionzip:keep=32,cls=off,position=keep", "fastv:layer=2,keep=16"), str(profile)), work)
    run_pack(work)
    profile.unlink()

    recipe = json.loads((work.folder / "recipe.json").read_text())
    assert recipe["command"] == ["edgetrim", "run", "."]
    assert recipe["needs"]["module"] == "tensorrt_rtx"
    decode = next(e for e in recipe["engines"] if e["roles"] == ["decode"])
    assert decode["optimization_profiles"]["decode"]["inputs_embeds"][1] == {"min": 1, "opt": 1, "max": 4}
    page = (work.folder / "BUILD.md").read_text()
    assert all(f"`{e['engine']}`" in page for e in recipe["engines"])

    built = device("build", str(work.folder), "--json", lacking=("onnxruntime",))
    assert built.returncode == 0, built.stderr
    made = {f"engines/{path.name}" for path in work.engines.glob("*.engine")}
    assert made == {e["engine"] for e in recipe["engines"]}
    assert not (work.folder / "recipe.json").exists(), "there is nothing left to build"
    packed = device("pack", str(work.folder), "--json")
    assert packed.returncode == 0, packed.stderr
    assert made <= json.loads(packed.stdout)["manifest"]["files"].keys()

    weights = next(path for path in work.graphs.glob("*.onnx"))
    weights.write_bytes(weights.read_bytes() + b"\0")
    refused = device("build", str(work.folder))
    assert refused.returncode == 6
    assert f"graphs/{weights.name} has" in refused.stderr
