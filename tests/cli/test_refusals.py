"""What cannot be is refused in words, with the exit code that says which kind, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from profiles import _schema
from tests.conftest import Said

Run = Callable[..., Said]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("-r", "vizionzip"),
            "--reduce vizionzip: there is no reduction 'vizionzip'. Did you mean 'visionzip'? Known: ",
        ),
        (("-r", "visionzip:kep=3"), "visionzip has no knob `kep`. Did you mean 'keep'? Knobs: "),
        (
            ("-r", "uniform:keep=65"),
            "--reduce uniform:keep=65 does not fit llava: `keep` must be in 1..64, as there are 64 tokens per image; found 65.",
        ),
        (("-r", "fastv:layer=9"), "--reduce fastv:layer=9 does not fit llava: "),
        (("-p", "cpu_fp23"), "Unknown profile 'cpu_fp23'. Did you mean 'cpu_fp32'? Known: "),
        (("-p", "absent.toml"), "absent.toml cannot be read: No such file or directory."),
        (("--frames", "17"), "Profile `cpu_fp32` allows 16 frames, --frames asks for 17. "),
        (
            ("-r", "random:keep=4", "-r", "random:keep=2"),
            "The same reduction is given twice (random, random). Give each once.",
        ),
    ],
)
def test_what_does_not_fit(edgetrim: Run, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    said = edgetrim("run", "embedded", *arguments, "-o", tmp_path / "out")
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("Error: ")
    assert message in said.err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_is_not_there(edgetrim: Run, tmp_path: Path) -> None:
    said = edgetrim("run", "no such", "-o", tmp_path / "out")
    assert (said.code, said.out) == (2, "")
    assert said.err == (
        "Error: Checkpoint 'no such' is neither a folder nor a hub id (owner/name). "
        "Pass a folder with config.json and *.safetensors.\n"
    )


def test_an_unknown_family(edgetrim: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "lava"}')
    said = edgetrim("export", tmp_path, "-o", tmp_path / "out")
    assert said.code == 2
    assert "says model_type 'lava', and there is no such family. " in said.err
    assert "llava" in said.err


@pytest.mark.parametrize("verb", ["build", "validate", "bench", "pack", "chat"])
def test_a_folder_that_is_not_there(edgetrim: Run, tmp_path: Path, verb: str) -> None:
    folder = tmp_path / "absent"
    expected = f"Error: The folder {folder} is not there. `edgetrim run` and `edgetrim export` make one.\n"
    assert edgetrim(verb, folder) == (2, "", expected)
    assert not folder.exists()


@pytest.mark.parametrize("verb", ["build", "validate", "bench", "pack", "chat"])
def test_a_folder_without_graphs(edgetrim: Run, tmp_path: Path, verb: str) -> None:
    said = edgetrim(verb, tmp_path)
    assert (said.code, said.out) == (2, "")
    assert said.err == f"Error: There is no {tmp_path}/job.json. Run `edgetrim export` first.\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["run", "export", "visualize"])
def test_a_place_that_cannot_be_written(edgetrim: Run, tmp_path: Path, verb: str) -> None:
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "out"
    said = edgetrim(verb, "embedded", "-r", "uniform:keep=4", "-o", place)
    assert said == (2, "", f"Error: Cannot write to {place}: Not a directory. Choose another --output.\n")


def test_a_folder_in_use(edgetrim: Run, tmp_path: Path) -> None:
    from exporter.workspace import Workspace

    folder = tmp_path / "out"
    message = f"Error: Another edgetrim is writing to {folder}. Wait for it or choose another --output.\n"
    with Workspace(folder).locked():
        assert edgetrim("run", "-o", folder) == (2, "", message)
        assert edgetrim("run", "-o", folder) == (2, "", message), "the refused one must not take the lock away"


def test_what_only_the_device_can_build(edgetrim: Run, bundle: Path) -> None:
    import json

    job = json.loads((bundle / "job.json").read_text())
    (bundle / "job.json").write_text(json.dumps({**job, "profile": "orin_nano_8gb_int4"}))
    (bundle / "manifest.json").unlink()  # as it would not verify any more
    said = edgetrim("build", bundle)
    assert (said.code, said.out) == (5, "")
    assert said.err.startswith("Error: Profile `orin_nano_8gb_int4` cannot be built on this machine: ")


def test_corrupted(edgetrim: Run, tiny: Callable[..., Path]) -> None:
    folder = tiny({"graphs/vision.onnx": b"as packed", "graphs/llm.data": b"1234"})
    (folder / "graphs" / "vision.onnx").write_bytes(b"As packed")
    (folder / "graphs" / "llm.data").unlink()
    (folder / "engines").mkdir()
    (folder / "engines" / "extra.engine").write_bytes(b"code")
    for verb in ("inspect", "chat"):
        assert edgetrim(verb, folder) == (
            6,
            "",
            f"Error: {folder} is not what its manifest says: graphs/llm.data is missing; "
            "graphs/vision.onnx was changed (its hash differs); engines/extra.engine is not in the manifest. "
            "Copy or pack it again.\n",
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "has schema 2; this edgetrim reads 1. Use the version that packed it."),
        (
            {"files": 3},
            "is damaged (AttributeError: 'int' object has no attribute 'items'). Pack or copy the bundle again.",
        ),
        ({"files": {"../x": {}}}, "names a file outside the bundle: '../x'. Do not use it."),
    ],
)
def test_a_manifest_that_is_none(
    edgetrim: Run, tiny: Callable[..., Path], changes: dict[str, object], message: str
) -> None:
    said = edgetrim("inspect", tiny({"a": b"b"}, **changes))
    assert (said.code, said.out) == (6, "")
    assert said.err.endswith(f"{message}\n")


def test_nothing_to_inspect(edgetrim: Run, tmp_path: Path) -> None:
    said = edgetrim("inspect", tmp_path)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith(f"Error: {tmp_path} is neither a bundle (manifest.json), an output folder ")


def test_a_strict_profile_fails_the_gate(edgetrim: Run, bundle: Path, tmp_path: Path) -> None:
    import json

    text = (_schema.FOLDER / "cpu_fp32.toml").read_text()
    strict = bundle / "strict.toml"
    strict.write_text(text.replace("logits_cosine_min = 0.9999", "logits_cosine_min = 1.0"))
    job = json.loads((bundle / "job.json").read_text())
    (bundle / "job.json").write_text(json.dumps({**job, "profile": str(strict)}))
    said = edgetrim("validate", bundle, "--per-kind", "1", "--threads", "1")
    assert said.code == 3
    assert "of profile `strict` did not pass: " in said.err
    assert "FAIL" in said.out
    record = json.loads((bundle / "evidence" / "validation.json").read_text())
    assert record["failed"], "the evidence is written before the verb fails"
