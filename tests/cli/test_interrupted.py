"""Ctrl-C, a full disk: what was whole stays whole, nothing half-written is left."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Said

Run = Callable[..., Said]


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def failing(error: BaseException) -> Callable[..., Any]:
    """A stage that has written something when it fails."""

    def stage(plan: Any, folder: Path, *rest: Any) -> None:
        (folder / "vision.onnx").write_bytes(b"half of it")
        raise error

    return stage


FULL = OSError(errno.ENOSPC, "No space left on device", "llm.data")
ENDINGS = [
    (KeyboardInterrupt(), 130, "Interrupted; nothing half-written is left."),
    (
        FULL,
        1,
        "The disk is full while writing llm.data. Free some space or choose another --output; nothing half-written is left.",
    ),
]


@pytest.mark.parametrize(("error", "code", "message"), ENDINGS)
def test_in_the_first_stage(
    edgetrim: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    monkeypatch.setattr("exporter.stages.export.export", failing(error))
    said = edgetrim("run", "-o", tmp_path / "out")
    assert (said.code, said.out, said.err.lstrip()) == (code, "", f"Error: {message}\n")
    assert list(tmp_path.iterdir()) == [], "not even an empty folder"


@pytest.mark.parametrize(("error", "code", "message"), ENDINGS)
def test_over_an_earlier_result(
    edgetrim: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    before = names(bundle)
    monkeypatch.setattr("exporter.stages.export.export", failing(error))
    assert edgetrim("export", "-r", "uniform:keep=8", "-o", bundle).code == code
    assert names(bundle) == before
    monkeypatch.undo()
    assert edgetrim("inspect", bundle, "--json").code == 0, "the earlier bundle still verifies"


def test_while_a_file_is_written(edgetrim: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = set(names(bundle))
    monkeypatch.setattr("os.fsync", full)
    said = edgetrim("pack", bundle)
    assert (said.code, said.out) == (1, "")
    assert said.err.startswith("Error: The disk is full. ")
    assert set(names(bundle)) == before - {"manifest.json"}, "an outdated manifest must not outlive the report"


def test_what_a_killed_run_left_is_swept(edgetrim: Run, bundle: Path) -> None:
    (bundle / ".tmp-graphs-abc").mkdir()
    (bundle / ".tmp-graphs-abc" / "half").write_text("")
    assert edgetrim("pack", bundle).code == 0
    assert not (bundle / ".tmp-graphs-abc").exists()
    assert not (bundle / ".lock").exists()
