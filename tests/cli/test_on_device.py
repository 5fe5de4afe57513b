"""What a device does with a bundle, on a machine that has neither torch nor onnx."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors"):
    sys.modules[name] = None
from exporter.cli import main
sys.exit(main(sys.argv[1:]))
"""


def device(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)


def test_reductions_are_listed_without_torch() -> None:
    """What fits which family follows from shapes alone."""
    listed = device("list", "reductions", "--json")
    assert listed.returncode == 0, listed.stderr
    found = {r["name"]: r["families"] for r in json.loads(listed.stdout)["reductions"]}
    assert {"llava", "qwen2_5_vl"} <= set(found["visionzip"])
    assert "llava" in found["tome"]
    assert "qwen2_5_vl" not in found["tome"]


def test_build_bench_and_pack_need_no_torch(bundle: Path) -> None:
    built = device("build", str(bundle), "--json")
    assert built.returncode == 0, built.stderr
    timed = device("bench", str(bundle), "--no-compare", "--rounds", "2", "--json")
    assert timed.returncode == 0, timed.stderr
    assert (
        json.loads((bundle / "evidence/latency.json").read_text())["variants"]["engine_reduced"]["ttft"]["rounds"] == 2
    )
    packed = device("pack", str(bundle), "--json")
    assert packed.returncode == 0, packed.stderr
    looked = device("inspect", str(bundle), "--json")
    assert looked.returncode == 0, looked.stderr
