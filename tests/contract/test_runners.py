"""What every runner must do, the same on ONNX Runtime, on TensorRT's interface over a fake GPU, and (`-m gpu`) on TensorRT."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.backends import trt
from exporter.backends._contract import Range, Runner, ShapeProfile
from exporter.backends.ort import OnnxRuntime
from exporter.errors import ExportError, UsageError
from exporter.graphset import GraphSet
from exporter.runtime.beam import Beams
from exporter.runtime.generate import Generator, embedding
from exporter.stages.build import shape_profiles
from profiles._schema import Limits
from tests.backends import fake_trt
from tests.backends.test_ort import cache
from tests.runtime import tiny

LIMITS = Limits(batch=4, frames=1, text=32, new_tokens=32, image=(64, 64))
LONG, SHORT = [1, 10, 11, 12, tiny.IMAGE, 13, 14, 15, 16, 17], [1, tiny.IMAGE, 20, 21]
PIXELS = np.random.default_rng(0).uniform(-1, 1, (2, 1, 3, tiny.SIDE, tiny.SIDE)).astype(np.float32)
GROWS = ShapeProfile(
    "grows", {"new": (Range(1, 2, 3), Range(1, 3, 4), 4), "past": (Range(1, 2, 3), Range(0, 8, 64), 4)}
)

Open = Callable[[Path, Sequence[ShapeProfile]], Runner]
"""(graph, optimization profiles) → a runner, not entered yet."""


def on_ort(graph: Path, profiles: Sequence[ShapeProfile]) -> Runner:
    return OnnxRuntime().runner(graph, 1)


def on_fake(graph: Path, profiles: Sequence[ShapeProfile]) -> Runner:
    return trt.BACKEND.runner(fake_trt.engine(graph.with_suffix(".engine"), graph, profiles))


def on_tensorrt(graph: Path, profiles: Sequence[ShapeProfile]) -> Runner:
    if missing := trt.BACKEND.missing_to_run():
        pytest.skip(missing)
    record = trt.BACKEND.build(graph, ("decode",), profiles, graph.parent / "engines", {}, print)
    return trt.BACKEND.runner(graph.parent / "engines" / record.file)


@pytest.fixture(params=[on_ort, on_fake, pytest.param(on_tensorrt, marks=pytest.mark.gpu)], ids=lambda f: f.__name__)
def opens(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    with ExitStack() as stack:
        if request.param is on_fake:
            stack.enter_context(fake_trt.installed(tmp_path_factory.mktemp("driver")))
        yield request.param


def generator(stack: ExitStack, folder: Path, graphs: GraphSet, opens: Open) -> Generator:
    runners = {}
    for file, roles in graphs.roles().items():
        runner = opens(folder / file, shape_profiles(roles, graphs, LIMITS))
        runners |= dict.fromkeys(roles, stack.enter_context(runner))
    return Generator(runners, graphs, embedding(folder, graphs))


def test_a_cache_grows_from_device_value_to_device_value(opens: Open, tmp_path: Path) -> None:
    random, held = np.random.default_rng(1), []
    with opens(cache(tmp_path / "g.onnx"), [GROWS]) as runner:
        assert dict(runner.inputs) == {"new": np.float32, "past": np.float32}
        assert set(runner.outputs) == {"logits", "present"}
        assert runner.in_words
        past: Any = np.empty((2, 0, 4), np.float32)
        whole = np.empty((2, 0, 4), np.float32)
        for step in range(9):
            new = random.standard_normal((2, 1 + step % 3, 4)).astype(np.float32)
            found, grown = runner.grow({"new": new}, {"past": past}, new.shape[1])
            assert (found.keys(), grown.keys()) == ({"logits"}, {"past"})
            whole = np.concatenate([whole, new], axis=1)
            past = grown["past"]
            assert not isinstance(past, np.ndarray), "it came to the host"
            held.append((past, whole))
        for value, wanted in held:
            assert np.array_equal(runner.numpy(value), wanted), "a later run wrote into an earlier result"


def test_values_of_the_host_and_of_the_device_mix(opens: Open, tmp_path: Path) -> None:
    new = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    with opens(cache(tmp_path / "g.onnx"), [GROWS]) as runner:
        first = runner.run({"new": new[:, ::-1], "past": np.empty((2, 0, 4), np.float32)})
        assert np.array_equal(runner.numpy(first["present"]), new[:, ::-1]), "a strided array is what it shows"
        again = runner.run({"new": first["present"], "past": first["present"]})
        assert np.array_equal(runner.numpy(again["present"]), np.concatenate([new[:, ::-1]] * 2, axis=1))
        assert runner.numpy(new) is new


def test_rows_in_any_order_and_often(opens: Open, tmp_path: Path) -> None:
    new, rows = np.arange(24, dtype=np.float32).reshape(2, 3, 4), np.array([1, 1, 0])
    with opens(cache(tmp_path / "g.onnx"), [GROWS]) as runner:
        found = runner.run({"new": new, "past": np.empty((2, 0, 4), np.float32)})["present"]
        assert np.array_equal(runner.numpy(runner.gather(found, rows)), new[rows])
        assert np.array_equal(runner.numpy(found), new)
        assert np.array_equal(runner.numpy(runner.gather(new, rows)), new[rows])
        of_a_cache = runner.rows({"past": found}, rows)
        assert np.array_equal(runner.numpy(of_a_cache["past"]), new[rows])


def test_wrong_feeds_are_told(opens: Open, tmp_path: Path) -> None:
    new, past = np.zeros((1, 2, 4), np.float32), np.zeros((1, 0, 4), np.float32)
    with opens(cache(tmp_path / "g.onnx"), [GROWS]) as runner:
        with pytest.raises(UsageError, match=r"g\.\w+ has no input 'pats'\. Did you mean 'past'"):
            runner.run({"new": new, "pats": past})
        with pytest.raises(UsageError, match=r"inputs not fed: past\. Fed: new"):
            runner.run({"new": new})
        with pytest.raises(UsageError, match="input 'past' is float64, expected float32"):
            runner.run({"new": new, "past": past.astype(np.float64)})
        with pytest.raises(ExportError, match=r"g\.\w+"):
            runner.run({"new": new, "past": np.zeros((1, 2, 5), np.float32)})
        assert runner.run({"new": new, "past": past}).keys() == {"logits", "present"}, "still works"
    with pytest.raises(AssertionError, match="context manager"):
        runner.run({"new": new, "past": past})


@pytest.mark.parametrize("kind", [{}, {"stay": 2}, {"axes": 3}, {"sized": True}, {"guided": True, "keep": 2}], ids=str)
def test_whole_conversations_are_those_of_onnx_runtime(opens: Open, tmp_path: Path, kind: dict[str, Any]) -> None:
    graphs = tiny.export(tmp_path, **kind)
    results = []
    for how in (opens, on_ort):
        with ExitStack() as stack:
            model = generator(stack, tmp_path, graphs, how)
            first = model.generate(PIXELS, [LONG, SHORT], 8)
            turn = model.reply(first.cache, [[5, 6, 7, 8, 9, 10, 11], [4]], 5)
            beams = model.generate(PIXELS[:1], [SHORT], 6, sampler=Beams(3))
            results.append((first.tokens, turn.tokens, beams.tokens, first.index.tolist()))
    assert results[0] == results[1]
    assert len(set(results[1][0][0])) > 2, "a model that repeats itself tests little"
