"""The benchmarks run, on tiny shapes and for one round, so that they do not rot. Their numbers mean nothing here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import _common, decode, engines, in_llm, prefill
from tests.conftest import needs_genai

MODEL = _common.Model(
    hidden=64, layers=2, intermediate=128, heads=4, kv_heads=2, vocab=96, tower=32, tower_heads=4, image=56, patch=14
)
LFTR = "lftr:temporal=similarity,keep_frames=2,spatial=topic,keep=4"
PREFILL = prefill.Setting(frames=4, text=6, reductions=(("1x", ()), ("8x", (LFTR,))), selections=())
DECODE = decode.Setting(frames=4, text=6, reductions=(LFTR,), new_tokens=5)


def test_prefill(tmp_path: Path) -> None:
    entry = prefill.measure(
        tmp_path / "scratch", MODEL, PREFILL, "fp32", rounds=1, threads=1, load=_common.Load(), genai=False
    )
    assert entry["visual_tokens"] == {"1x": 64, "8x": 8}
    assert entry["speed_up"]["EdgeTrim, ONNX Runtime: 8x"]["ideal"] == (64 + 6) / (8 + 6)
    assert set(entry["selection"]) == {LFTR}
    assert all(value > 0.9999 for value in entry["cosine"].values()), entry["cosine"]
    assert "onnxruntime-genai: left out" in prefill.text(entry)
    path = _common.write(tmp_path / "results", entry)
    assert str(tmp_path) not in path.read_text()
    assert json.loads(path.read_text())["machine"]["processor"]


@pytest.mark.parametrize("precision", _common.PRECISIONS)
def test_decode(tmp_path: Path, precision: str) -> None:
    entry = decode.measure(tmp_path, MODEL, DECODE, precision, rounds=1, threads=1, load=_common.Load(), genai=False)
    assert entry["prompt_tokens"] == 8 + 6
    assert all(t["rounds"] == DECODE.new_tokens - 1 for t in entry["times"].values())
    assert decode.OURS in decode.text(entry)
    assert (decode.HF in entry["times"]) == (precision == "fp32")


@pytest.mark.parametrize("other", ["transformers, SDPA", pytest.param("onnxruntime-genai", marks=needs_genai)])
def test_engines(tmp_path: Path, other: str) -> None:
    """Built once, opened in both orders, and they say the same."""
    llava, llama = _common.checkpoint(tmp_path / "checkpoint", MODEL)
    subject = engines.Subject("tiny", llava, llama, MODEL.vocab, (48,), new_tokens=6)
    entry = engines.measure(
        subject, tmp_path / "engines", "fp32", rounds=1, threads=1, load=_common.Load(), beside=(other,)
    )
    assert entry["notes"] == {}
    assert entry["says_the_same"] == dict.fromkeys([engines.OURS, engines.PLAIN, other], True)
    assert all(ratios[other]["median"] > 0 for ratios in entry["against"].values())


def test_in_llm() -> None:
    specs = ("fastv:layer=1,keep_ratio=0.5", "dycoke_kv:layer=1,keep_ratio=0.25")
    entry = in_llm.speed(specs, MODEL, rounds=1, threads=1, load=_common.Load())
    visual = 64
    for spec, cached in zip(
        (in_llm.FIRST, *specs), ((visual, visual), (visual, visual // 2), (visual, visual // 4)), strict=True
    ):
        tokens = sum(cached) + 2 * in_llm.TEXT
        wanted = tokens * 2 * MODEL.kv_heads * MODEL.hidden // MODEL.heads * 4
        assert entry[spec]["cache_bytes"] == entry[spec]["cache_bytes_found"] == wanted, spec
    assert entry[specs[0]]["flops_share"] < entry[specs[1]]["flops_share"] == 1
    assert all(entry[spec]["of_ideal"]["median"] > 0 for spec in specs)


def test_the_generator_copies_no_keys_or_values(tmp_path: Path) -> None:
    """What a step is fed is what the step before returned: the very values."""
    llava, _ = _common.checkpoint(tmp_path / "checkpoint", MODEL)
    _, graphs = _common.export(llava, tmp_path / "export", (LFTR,), 4, "fp32")
    files = tmp_path / "export" / "graphs"
    with (
        _common.runner(files / "vision.onnx", 1) as vision,
        _common.runner(files / "reduce.onnx", 1) as reduce,
        _common.runner(files / "decode.onnx", 1) as llm,
    ):
        llm._session = spy = Spy(llm._session)
        table = np.load(files / "embedding.npy")
        generator = decode.Generator({"vision": vision, "reduce": reduce, "decode": llm}, graphs, table)
        generator.generate(_common.pixels(MODEL, 4), [_common.prompt(MODEL, 4, 6)], 5)
    assert spy.steps >= 2


class Spy:
    """A session that checks what it is fed."""

    def __init__(self, session: Any) -> None:
        self._session, self._last, self.steps = session, dict[str, Any](), -1

    def run_with_ort_values(self, outputs: Any, feeds: dict[str, Any]) -> Any:
        if self._last:
            for name, value in feeds.items():
                if name.startswith("past_"):
                    assert value is self._last["present" + name[4:]], name
        found = self._session.run_with_ort_values(outputs, feeds)
        self._last = dict(zip(outputs, found, strict=True))
        self.steps += 1
        return found
