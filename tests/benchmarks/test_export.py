"""The checkpoints that `benchmarks.export` writes: published shapes, read by our own code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import export
from exporter.checkpoint import Checkpoint
from exporter.plan import make_plan
from exporter.stages._modules import build_modules, origins
from profiles import _schema

TINY = export.Subject("llava", "bfloat16", {
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56,
    },
    "text_config": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 96,
    },
})  # fmt: skip


@pytest.mark.parametrize("name", export.SUBJECTS)
def test_what_the_graphs_need_is_in_the_checkpoint(name: str) -> None:
    """Every tensor of the published model that is exported, in its shape."""
    config = export.SUBJECTS[name].config
    plan = make_plan(Checkpoint.of_config(config), (export.REDUCTION,), _schema.load("rtx_fp16"))
    held = {plan.family.canonical(key): shape for key, shape in export.shapes(config).items()}
    modules = build_modules(plan)
    plan.checkpoint.__dict__["_where"] = dict.fromkeys(held)
    found = [source for part in origins(plan, modules).values() for source in part.values()]
    wanted = [part for source in found for part in getattr(source, "parts", (source,))]
    assert len(wanted) > 300
    for source in wanted:
        stored = held[source._stored(plan.checkpoint)]
        while len(stored) > len(source.shape) and stored[0] == 1:
            stored = stored[1:]
        assert source.shape == (stored[::-1] if source.transposed else stored), source.name


def test_shards(tmp_path: Path) -> None:
    size = export.write_checkpoint(tmp_path / "checkpoint", TINY, shard=100_000)
    checkpoint = Checkpoint(tmp_path / "checkpoint")
    assert len(checkpoint.shards) > 2
    assert checkpoint.bytes == size
    for name, shape in export.shapes(TINY.config).items():
        tensor = checkpoint.tensor(name)
        assert (tuple(tensor.shape), tensor.dtype) == (shape, torch.bfloat16)
        assert torch.isfinite(tensor).all()
    assert all(path.stat().st_size < 110_000 for path in checkpoint.shards)


@pytest.mark.slow
def test_an_export_is_measured_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(export.SUBJECTS, "tiny", TINY)
    (entry,) = export.measure(tmp_path, "tiny", ["int4"], 1)
    found = entry["export"]
    assert 0 < found["quantising_s"] < found["writing_s"] < found["total_s"] < found["on_disk_s"]
    assert found["peak_rss_mib"] >= max(found["peak_anonymous_mib"], found["peak_file_mib"]) > 0
    assert entry["killed"]["killed_after_s"] > 0
    assert len(export.row(entry)) == len(export.HEADER)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]
