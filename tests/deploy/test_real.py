"""The embedded model, deployed to a real sshd, where the real edgetrim builds, validates and times it without PyTorch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from exporter.bundle import DEVICES, Bundle
from exporter.cli import main
from tests.conftest import Said
from tests.deploy.conftest import Device

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TOOL = """#!{python}
import sys
sys.path.insert(0, {root!r})
for name in ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors"):
    sys.modules[name] = None
from exporter.cli import main
sys.exit(main())
"""


def test_the_embedded_model(device: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def edgetrim(*arguments: object) -> Said:
        code = main([str(a) for a in arguments])
        return Said(code, *capsys.readouterr())

    out, app = tmp_path / "out", device.home / "app"
    tool = app / "venv/bin/edgetrim"
    tool.parent.mkdir(parents=True)
    tool.write_text(TOOL.format(python=sys.executable, root=str(ROOT)))
    tool.chmod(0o755)
    spec = ("-r", "visionzip:keep=32,cls=off,position=keep")
    assert edgetrim("run", *spec, "-o", out, "--per-kind", "2", "--rounds", "1", "--threads", "1").code == 0
    to = ("--to", f"device:{app}", "--ssh-config", device.config)
    said = edgetrim("deploy", out, *to)
    assert (said.code, said.err) == (0, "")
    assert "free memory" in said.out
    assert "live" in said.out
    (record,) = (out / DEVICES).iterdir()
    found = json.loads(record.read_text())
    assert list(found["steps"]) == ["validate", "bench", "pack"]  # the engines were in the bundle
    assert found["validation"]["recorded"] is True
    assert found["validation"]["failed"] == []
    assert found["latency"]["variants"]["engine_reduced"]["ttft"]["rounds"] == 9
    Bundle.open(app / "current")
    assert edgetrim("chat", app / "current", "--json").code == 0
    assert edgetrim("rollback", *to).code == 1
