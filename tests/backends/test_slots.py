"""Caches with free slots on a fake GPU: what is in them, who may write behind whom, and steps that are replayed."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from exporter.backends import _slots, trt
from exporter.backends._cuda import Cuda, CudaError
from exporter.backends._device_memory import Device, size_class
from exporter.backends._slots import Place, Slots
from exporter.errors import ExportError, UsageError
from exporter.graphset import PAD
from exporter.runtime.generate import Generator
from exporter.runtime.sampling import greedy
from exporter.stages.build import shape_profile
from tests.backends import fake_trt
from tests.contract.test_runners import LIMITS, LONG, PIXELS, SHORT, Open, generator, on_fake, on_ort, on_tensorrt
from tests.runtime import tiny


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[ctypes.CDLL]:
    with fake_trt.installed(tmp_path) as found:
        yield found
        found.fake_limit(0)


@pytest.fixture
def device(driver: ctypes.CDLL) -> Iterator[Device]:
    found = Device.open()
    yield found
    found.synchronize()
    found.close()
    assert driver.fake_blocks() == 0


@pytest.mark.parametrize(("name", "axis", "free"), [("past_key_0", 2, 0), ("past_order_0", 1, PAD)])
def test_free_slots_hold_what_nothing_attends_to(device: Device, name: str, axis: int, free: int) -> None:
    value = np.arange(2 * 3 * 5, dtype=np.int64).reshape((2, 3, 5) if axis == 2 else (2, 5, 3)[: axis + 2])
    place = Place.of(name, axis, 100)
    empty, present = (device.to_device(v) for v in (value[:, :, :0] if axis == 2 else value[:, :0], value))
    held = Slots.of(device, place, empty, present, 5)
    assert np.array_equal(held.numpy(device), value)
    assert (held.shape, held.dtype) == (value.shape, value.dtype)
    shown = device.to_host(held.shown)
    assert shown.shape[axis] == _slots.STEPS
    assert (shown.take(range(5, _slots.STEPS), axis) == free).all()
    assert np.array_equal(device.to_host(held.dense(device)), value)
    assert np.array_equal(held.rows(device, np.array([1, 1, 0])).numpy(device), value[[1, 1, 0]])


def test_who_goes_on_from_older_tokens_gets_a_copy(device: Device) -> None:
    """Two conversations that begin alike: neither sees what the other appends."""
    random = np.random.default_rng(0)
    start, one, two, three = (random.standard_normal((2, 3, n, 4)).astype(np.float32) for n in (6, 1, 1, 2))
    place = Place.of("past_key_0", 2, 200)

    def appended(past: Any, new: Any) -> Slots:
        past = past.alone(device) if isinstance(past, Slots) else past
        seen = device.to_host(past.shown if isinstance(past, Slots) else past)
        present = device.to_device(np.concatenate([seen, new], axis=2))
        return Slots.of(device, place, past, present, new.shape[2])

    begin = appended(device.to_device(start[:, :, :0]), start)
    first = appended(begin, one)
    assert first.memory is begin.memory, "the newest goes on where it is"
    second = appended(begin, two)
    assert second.memory is not begin.memory
    assert not device.to_host(second.shown)[:, :, 7:].any(), "the other one's token"
    third = appended(first, three)
    for held, parts in ((begin, [start]), (first, [start, one]), (second, [start, two]), (third, [start, one, three])):
        assert np.array_equal(held.numpy(device), np.concatenate(parts, axis=2))


def test_slots_come_by_the_dozen_up_to_what_an_engine_takes() -> None:
    place = Place.of("past_key_0", 2, 150)
    assert [place.capacity(n) for n in (1, 63, 64, 129, 150, 151)] == [64, 64, 128, 150, 150, 151]


def answers(model: Generator) -> list[Any]:
    first = model.generate(PIXELS, [LONG, SHORT], 20)
    turn = model.reply(first.cache, [[5, 6, 7, 8, 9, 10, 11], [4]], 5)
    again = model.reply(turn.cache, [[9], [4, 5]], 3)
    return [first.tokens, turn.tokens, again.tokens]


@pytest.mark.parametrize("steps", [1, 4, 64])
def test_conversations_do_not_depend_on_the_slots(
    driver: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    monkeypatch.setattr(_slots, "STEPS", steps)
    graphs, found = tiny.export(tmp_path, stay=2), []
    for opens in (on_fake, on_ort):
        with ExitStack() as stack:
            found.append(answers(generator(stack, tmp_path, graphs, opens)))
    assert found[0] == found[1]
    assert driver.fake_blocks() == 0


def test_conversations_that_begin_alike_do_not_see_each_other(driver: ctypes.CDLL, tmp_path: Path) -> None:
    graphs, found = tiny.export(tmp_path), []
    for opens in (on_fake, on_ort):
        with ExitStack() as stack:
            model = generator(stack, tmp_path, graphs, opens)
            cache = model.generate(PIXELS, [LONG, SHORT], 8).cache
            other = replace(cache, pending=[list(row) for row in cache.pending])
            first = model.reply(cache, [[30, 31, 32, 33], [34, 35]], 6).tokens
            found.append((first, model.reply(other, [[5], [6]], 6).tokens))
            rows = other.rows(np.array([1, 0]), model._decode)
            found[-1] += (model.reply(rows, [[7], [8]], 4).tokens,)
    assert found[0] == found[1]


def wordy(logits: Any) -> Any:
    """Never ends."""
    logits[:, tiny.EOS] = -np.inf
    return greedy(logits)


def test_a_cache_that_is_full_is_run_once_more(driver: ctypes.CDLL, tmp_path: Path) -> None:
    """Behind the longest cache that the engine takes there is no free slot; nothing goes on behind that."""
    graphs, found = tiny.export(tmp_path), []
    most = shape_profile("decode", graphs, LIMITS).inputs["past_key_0"][2].max  # type: ignore[union-attr]
    prompt = graphs.visual.kept + len(LONG) - 1
    for opens in (on_fake, on_ort):
        with ExitStack() as stack:
            model = generator(stack, tmp_path, graphs, opens)
            found.append(model.generate(PIXELS[:1], [LONG], most - prompt + 2, sampler=wordy))
            if opens is on_fake:
                assert found[-1].cache.past["past_key_0"].shape[2] == most + 1
                with pytest.raises(UsageError, match=rf"not built for past_order_0 \[1, {most + 1}\]"):
                    model.generate(PIXELS[:1], [LONG], most - prompt + 3, sampler=wordy)
    assert found[0].tokens == found[1].tokens


def test_steps_are_replayed(driver: ctypes.CDLL, tmp_path: Path) -> None:
    """A step is shaped once for all that the slots take; recorded when it comes a second time and replayed from then on. As soon as
    memory is where it stays, an answer is replayed from its beginning. A prompt is never recorded."""
    graphs = tiny.export(tmp_path)
    with ExitStack() as stack:
        model = generator(stack, tmp_path, graphs, on_fake)
        context = next(e for e in fake_trt.Engine.opened if "past_key_0" in e.io).context
        model.generate(PIXELS[:1], [LONG], 24)
        inputs, launches = len(context.engine.session.get_inputs()), driver.fake_launches()
        assert context.shaped == 2 * inputs, "once for the prompt, once for all steps"
        assert (len(context.recorded), launches) == (1, 23 - (context.executed - 1))
        assert context.executed <= 4, "the prompt, two steps, and one more if memory had to come first"
        model.generate(PIXELS[:1], [LONG], 24)
        executed, recorded = context.executed, len(context.recorded)
        assert recorded <= 2
        model.generate(PIXELS[:1], [LONG], 24)
        assert (context.executed, len(context.recorded)) == (executed + 1, recorded), "the prompt alone"


def test_steps_that_cannot_be_recorded_are_run(driver: ctypes.CDLL, tmp_path: Path) -> None:
    graphs, found = tiny.export(tmp_path), []
    for capturable in (True, False):
        with ExitStack() as stack:
            model = generator(stack, tmp_path, graphs, on_fake)
            before = driver.fake_launches()
            for engine in fake_trt.Engine.opened:
                engine.context.capturable = capturable
            found.append(model.generate(PIXELS[:1], [LONG], 12).tokens)
            assert (driver.fake_launches() > before) is capturable
    assert found[0] == found[1]


def test_two_sets_of_buffers_and_a_tensor_are_enough(
    driver: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where slots run out and the cache moves."""
    monkeypatch.setattr(_slots, "STEPS", 4)
    taken: list[int] = []
    allocate = Cuda.allocate
    monkeypatch.setattr(Cuda, "allocate", lambda self, size: taken.append(size) or allocate(self, size))
    graphs = tiny.export(tmp_path)
    most = shape_profile("decode", graphs, LIMITS).inputs["past_key_0"][2].max  # type: ignore[union-attr]
    each = graphs.text.kv_heads * most * graphs.text.head_dim * np.dtype(np.float32).itemsize
    with ExitStack() as stack:
        model = generator(stack, tmp_path, graphs, on_fake)
        for _ in range(2):
            model.reply(model.generate(PIXELS[:1], [LONG], 20).cache, [[20, 21]], 4)
        held = [size for size in taken if size == size_class(each)]
        assert sum(held) == trt.BACKEND.holds([each] * 2 * graphs.text.layers)


def test_a_copy_that_fails_is_told(driver: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Cuda, *args: int) -> None:
        raise CudaError(700, "The NVIDIA driver's cuMemcpy2DAsync_v2 failed: CUDA_ERROR_ILLEGAL_ADDRESS (700).")

    graphs = tiny.export(tmp_path)
    with ExitStack() as stack:
        model = generator(stack, tmp_path, graphs, on_fake)
        monkeypatch.setattr(Cuda, "copy_rows", fails)
        with pytest.raises(ExportError, match=r"decode\.engine: The NVIDIA driver's cuMemcpy2DAsync_v2 failed"):
            model.generate(PIXELS[:1], [LONG], 2)


def test_tensorrt_rtx_records_by_itself(driver: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where something repeats: not in an engine for prompts alone."""
    strategies = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole", DISABLED="disabled")
    monkeypatch.setattr(sys.modules["tensorrt"], "IRuntimeCache", fake_trt.IRuntimeCache, raising=False)
    monkeypatch.setattr(sys.modules["tensorrt"], "CudaGraphStrategy", strategies, raising=False)
    graphs = tiny.export(tmp_path, stay=2)
    with ExitStack() as stack:
        fake_trt.Engine.opened.clear()
        model = generator(stack, tmp_path, graphs, on_fake)
        told = [engine.config.cuda_graph_strategy for engine in fake_trt.Engine.opened]
        prompts = ["past_key_0" not in e.io and "inputs_embeds" in e.io for e in fake_trt.Engine.opened]
        assert told == ["disabled" if alone else "whole" for alone in prompts]
        assert {*told} == {"disabled", "whole"}
        model.generate(PIXELS[:1], [LONG], 12)
        assert driver.fake_launches() == 0


@pytest.mark.gpu
def test_real_steps_are_replayed(tmp_path: Path) -> None:
    """On a GPU: what is replayed answers as ONNX Runtime does."""
    graphs, found = tiny.export(tmp_path), []
    ways: tuple[Open, ...] = (on_tensorrt, on_ort)
    for opens in ways:
        with ExitStack() as stack:
            model = generator(stack, tmp_path, graphs, opens)
            found.append(answers(model))
            if opens is on_tensorrt and model._decode._trt.__name__ == "tensorrt":  # type: ignore[attr-defined]
                assert any(graph is not None for graph in model._decode._recorded.values())  # type: ignore[attr-defined]
    assert found[0] == found[1]
