"""The same export gives the same bytes, whatever order Python's sets have in a process."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from exporter.job import EMBEDDED, Job
from exporter.pipeline import run_export
from exporter.workspace import Workspace

ROOT = Path(__file__).parents[2]
JOB = Job(EMBEDDED, ("fastv:layer=1,keep=24",), "cpu_int4")
CODE = """
import sys
from pathlib import Path
from exporter.pipeline import run_export
from exporter.workspace import Workspace
from tests.stages.test_deterministic import JOB
with Workspace(Path(sys.argv[1])).locked() as work:
    run_export(JOB, work)
"""


def test_same_bytes_in_every_process(tmp_path: Path) -> None:
    """In one that is fresh and has other hashes, and in this one, which may have traced other models before."""
    found = []
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", CODE, str(tmp_path / "fresh")], check=True, env=environment, cwd=ROOT)
    with Workspace(tmp_path / "here").locked() as work:
        run_export(JOB, work)
    for out in (tmp_path / "fresh", tmp_path / "here"):
        files = (path for path in sorted(out.rglob("*")) if path.is_file() and not path.name.startswith("."))
        found.append({str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files})
    assert any(name.endswith(".onnx") for name in found[0])
    assert found[0] == found[1]
