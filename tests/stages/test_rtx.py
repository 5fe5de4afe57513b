"""TensorRT-RTX takes every graph and builds real engines, without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exporter.engines import engine_records
from exporter.errors import ExportError
from exporter.job import Job
from exporter.pipeline import run_build, run_export
from exporter.stages.build import build
from exporter.workspace import Workspace
from profiles import _schema
from tests.conftest import for_one_gpu, needs_rtx
from tests.families import tiny
from tests.packings import published
from tests.packings.test_packings import CASES as PUBLISHED
from tests.stages.conftest import SIZES

pytestmark = needs_rtx

PRUNED = ("visionzip:keep=8", "fastv:keep=4")
CASES = [
    pytest.param("llava", PRUNED, "rtx_fp16", {"vision", "reduce", "prefill", "decode"}, id="llava-fp16"),
    pytest.param("llava", PRUNED, "rtx_int4", {"vision", "reduce", "prefill", "decode"}, id="llava-int4"),
    pytest.param("qwen2_5_vl", ("uniform:keep=8",), "rtx_int4", {"vision", "reduce", "decode"}, id="qwen2_5_vl-int4"),
]


@pytest.mark.parametrize(("family", "reductions", "profile", "engines"), CASES)
def test_engines_are_built(
    family: str, reductions: tuple[str, ...], profile: str, engines: set[str], checkpoints: Any, tmp_path: Path
) -> None:
    work = Workspace(tmp_path)
    run_export(Job(str(checkpoints[family]), reductions, profile, 1, SIZES[family]), work)
    records = run_build(work)
    assert {Path(r.file).stem for r in records} == engines
    assert {role for r in records for role in r.roles} == {"vision", "reduce", "prefill", "decode"}
    for record in records:
        data = (work.engines / record.file).read_bytes()
        assert data[:4] == b"vtrt"
        assert len(data) == record.bytes
    assert engine_records(work) == records
    assert json.loads((work.engines / "engines.json").read_text())
    assert not list(tmp_path.rglob(".*"))


def test_a_failing_build_leaves_the_engines_that_were_there(
    checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Workspace(tmp_path)
    run_export(Job(str(checkpoints["llava"]), (), "cpu_fp32"), work)
    run_build(work)
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))

    def fail(graphs: Any, source: Path, out: Path, *rest: Any) -> None:
        (out / "vision.engine").write_bytes(b"half")
        raise ExportError("refused")

    monkeypatch.setattr("exporter.stages.build.build", fail)
    with pytest.raises(ExportError, match="refused"):
        run_build(work)
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before


def test_int4_stays_int4_in_the_engine(tmp_path: Path) -> None:
    """What the engine loses against FP16's is what the matrices lose: three quarters, but for the scales. So do published integers,
    with zero points and scattered channels."""
    wide = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 16}
    tiny.llava(tmp_path / "model", **wide)
    case = PUBLISHED["gptq-asymmetric-scattered"]
    published.publish(tmp_path / "model", tmp_path / "published", case.config, case)
    sizes = {}
    for name, folder, profile in [
        ("fp16", "model", "rtx_fp16"),
        ("int4", "model", "rtx_int4"),
        ("published", "published/quantized", "rtx_int4"),
    ]:
        with Workspace(tmp_path / name).locked() as work:
            own = for_one_gpu(profile, tmp_path)
            graphs = run_export(Job(str(tmp_path / folder), (), own), work)
            (record,) = build(tiny.language_model(graphs), work.graphs, tmp_path, _schema.load(own))
            sizes[name] = record.bytes
    values = 4 * (512 * (64 + 2 * 32) + 64 * 512 + 3 * 512 * 1024)
    # Kernels for zero points and scattered channels lie in the engine too, as seen, for each optimization profile: the engine grows
    # by 3.4 MB, its graph by 0.8.
    for name, block, least in (("int4", 128, 0.85), ("published", 32, 0.5)):
        saved = 2 * values - values / 2 - 2 * values / block
        assert least * saved < sizes["fp16"] - sizes[name] < 1.1 * saved
