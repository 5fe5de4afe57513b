"""One real, tiny run of the embedded model, and a bundle made by hand; shared by the tests of the verbs."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.bundle import MANIFEST, contents
from exporter.cli import main

SPEC = "visionzip:keep=32,cls=off,position=keep"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """`edgetrim run` of the embedded model: the output folder, the exit code, what it printed."""
    folder = tmp_path_factory.mktemp("run") / "out"
    arguments = [
        "run",
        "-r",
        SPEC,
        "-p",
        "cpu_fp32",
        "-o",
        str(folder),
        "--per-kind",
        "2",
        "--rounds",
        "1",
        "--threads",
        "1",
    ]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(arguments)
    return folder, code, out.getvalue()


@pytest.fixture
def bundle(finished: tuple[Path, int, str], tmp_path: Path) -> Path:
    """A copy of the finished run that a test may spoil."""
    return Path(shutil.copytree(finished[0], tmp_path / "bundle"))


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Path]:
    """Makes a bundle of small files: `tiny({"graphs/a": b"…"}, schema=1)`."""

    def make(files: dict[str, bytes], /, **changes: object) -> Path:
        folder = tmp_path / "tiny"
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        manifest = {"schema": 1, "edgetrim": "0", "opset": 21, "versions": {}, "files": contents(folder), **changes}
        (folder / MANIFEST).write_text(json.dumps(manifest))
        return folder

    return make
