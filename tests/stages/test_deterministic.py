"""The same export gives the same bytes, whatever order Python's sets have in a process."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

CODE = """
import sys
from pathlib import Path
from exporter.job import EMBEDDED, Job
from exporter.pipeline import run_export
from exporter.workspace import Workspace
with Workspace(Path(sys.argv[1])).locked() as work:
    run_export(Job(EMBEDDED, ("fastv:layer=1,keep=24",), "cpu_int4"), work)
"""


def test_same_bytes_in_every_process(tmp_path: Path) -> None:
    found = []
    for seed in ("1", "2"):
        out = tmp_path / seed
        subprocess.run([sys.executable, "-c", CODE, str(out)], check=True, env={**os.environ, "PYTHONHASHSEED": seed})
        files = (path for path in sorted(out.rglob("*")) if path.is_file() and not path.name.startswith("."))
        found.append({str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files})
    assert any(name.endswith(".onnx") for name in found[0])
    assert found[0] == found[1]
