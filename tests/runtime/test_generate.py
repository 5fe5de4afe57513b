"""The generator, on graphs small enough to be run again in full for every token: without cache, padding or reordering."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from exporter.backends._contract import Runner
from exporter.backends.ort import OnnxRuntime
from exporter.errors import ExportError, UsageError, VerificationError
from exporter.graphset import PAD, GraphSet
from exporter.runtime.beam import Beams
from exporter.runtime.cache import Cache
from exporter.runtime.generate import Generator, embedding
from exporter.runtime.sampling import Sampling, greedy
from exporter.runtime.sequence import Tokens, split
from tests.runtime import tiny

LONG, SHORT = [1, 10, 11, 12, tiny.IMAGE, 13, 14, 15, 16, 17], [1, tiny.IMAGE, 20, 21]
PIXELS = np.random.default_rng(0).uniform(-1, 1, (2, 1, 3, tiny.SIDE, tiny.SIDE)).astype(np.float32)


@contextmanager
def opened(folder: Path, graphs: GraphSet, **kwargs: Any) -> Iterator[Generator]:
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(OnnxRuntime().runner(folder / name, 1)) for name in set(graphs.files.values())
        }
        yield Generator({r: files[f] for r, f in graphs.files.items()}, graphs, embedding(folder, graphs), **kwargs)


class Reference:
    """Runs the whole sequence anew, in prompt order, with nothing but the decoder graph and arange."""

    def __init__(self, folder: Path, runner: Runner) -> None:
        self.folder, self.runner = folder, runner

    def logits(self, embeds: Any) -> Any:
        places = np.arange(len(embeds))[None]
        feeds = {"inputs_embeds": embeds[None], "position_ids": places, "order": places}
        for name in self.runner.inputs:
            if name.startswith("past_order"):
                feeds[name] = np.empty((1, 0), np.int64)
            elif name.startswith("past"):
                feeds[name] = np.empty((1, tiny.KV_HEADS, 0, tiny.HEAD_DIM), embeds.dtype)
        return self.runner.numpy(self.runner.run(feeds)["logits"])[0]

    def embeds(self, visual: Any, prompt: list[int]) -> Any:
        table, parts, seen = tiny.table(), [], 0
        count = prompt.count(tiny.IMAGE)
        for token in prompt:
            if token == tiny.IMAGE:
                parts.append(visual[seen : seen + len(visual) // count])
                seen += len(visual) // count
            else:
                parts.append(table[token][None])
        return np.concatenate(parts)

    def greedy(self, embeds: Any, count: int) -> list[int]:
        tokens: list[int] = []
        while len(tokens) < count and tiny.EOS not in tokens:
            tokens.append(int(self.logits(embeds).argmax()))
            embeds = np.concatenate([embeds, tiny.table()[tokens[-1]][None]])
        return tokens


@pytest.fixture
def whole(tmp_path: Path) -> Iterator[tuple[Generator, Reference]]:
    """Nothing reduced, one graph for prefill and decode."""
    graphs = tiny.export(tmp_path)
    with opened(tmp_path, graphs) as generator, OnnxRuntime().runner(tmp_path / "decode.onnx", 1) as runner:
        yield generator, Reference(tmp_path, runner)


def test_a_batch_of_unequal_prompts_is_each_prompt_run_in_full(whole: tuple[Generator, Reference]) -> None:
    generator, reference = whole
    seen = generator.reduce(generator.vision(PIXELS)).embeds
    told: list[tuple[int, int]] = []
    result = generator.generate(PIXELS, [LONG, SHORT], 12, on_token=lambda row, token: told.append((row, token)))
    wanted = [reference.greedy(reference.embeds(seen[i], p), 12) for i, p in enumerate((LONG, SHORT))]
    assert result.tokens == wanted
    assert all(len(set(row)) > 3 for row in wanted), "a model that repeats itself tests little"
    assert [[t for r, t in told if r == row] for row in (0, 1)] == wanted
    assert result.index.tolist() == [[0, 1, 2, 3]] * 2
    assert len(result.timings.decode_ms) == max(map(len, wanted)) - 1
    assert result.timings.ttft_ms >= result.timings.prefill_ms > 0


def test_logits_of_prefill_and_step_match(whole: tuple[Generator, Reference]) -> None:
    generator, reference = whole
    visual = generator.reduce(generator.vision(PIXELS))
    prefilled = generator.prefill(visual, [LONG, SHORT])
    rows = [reference.embeds(visual.embeds[i], p) for i, p in enumerate((LONG, SHORT))]
    np.testing.assert_allclose(prefilled.logits, [reference.logits(r) for r in rows], atol=1e-4)
    for tokens in ([7, 8], [9, 30]):
        logits = generator.step(prefilled.cache, np.array(tokens))
        rows = [np.concatenate([r, tiny.table()[[t]]]) for r, t in zip(rows, tokens, strict=True)]
        np.testing.assert_allclose(logits, [reference.logits(r) for r in rows], atol=1e-4)


@pytest.mark.parametrize("chunk", [None, 1, 2, 4])
def test_the_next_turn_continues_each_row_from_its_own_end(
    whole: tuple[Generator, Reference], chunk: int | None
) -> None:
    generator, reference = whole
    generator = Generator(
        {"vision": generator._vision, "reduce": generator._reduce, "prefill": generator._prefill},
        generator.graphs, tiny.table(), chunk,
    )  # fmt: skip
    seen = generator.reduce(generator.vision(PIXELS)).embeds
    first = generator.generate(PIXELS, [LONG, SHORT], 3)
    # One row ended early by an eos of its own choice: what it was fed since must leave no trace.
    turns = [[22, 23, 24, 25, 26], [27, 28]]
    again = generator.reply(first.cache, turns, 6)
    for row, prompt in enumerate((LONG, SHORT)):
        said = [t for t in first.tokens[row] if t != tiny.EOS]
        everything = reference.embeds(seen[row], [*prompt, *said, *turns[row]])
        assert again.tokens[row] == reference.greedy(everything, 6)
    assert again.index.shape == (2, 0)


def test_a_row_that_ended_leaves_no_trace(whole: tuple[Generator, Reference]) -> None:
    generator, reference = whole
    graphs = generator.graphs
    long, short = generator.generate(PIXELS, [LONG, SHORT], 12).tokens
    # Make something that the second row says, and the first does not say up to two tokens later, an eos.
    end = next(i for i, token in enumerate(short) if token not in short[:i] + long[: i + 3])
    early = short[end]
    text = type(graphs.text)(**{**vars(graphs.text), "eos": [early]})
    ending = Generator(
        {"vision": generator._vision, "reduce": generator._reduce, "prefill": generator._prefill},
        type(graphs)(**{**vars(graphs), "text": text}), tiny.table(),
    )  # fmt: skip
    result = ending.generate(PIXELS, [LONG, SHORT], end + 3)
    assert result.tokens == [long[: end + 3], short[: end + 1]]
    assert result.cache.pending == [[long[end + 2]], []]
    order = generator._decode.numpy(result.cache.past["past_order_0"])
    assert (order[1, -2:] == PAD).all(), "the steps after the eos"
    seen = generator.reduce(generator.vision(PIXELS)).embeds
    logits = ending.extend(result.cache, [[], [early, 30]])
    wanted = reference.logits(reference.embeds(seen[1], [*SHORT, *short[:end], early, 30]))
    np.testing.assert_allclose(logits[1], wanted, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 14])
@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"frames": 2, "placeholders": 2, "keep": 5},
        {"frames": 2, "placeholders": 2, "axes": 3},
        {"frames": 2, "keep": 5, "policy": "compact"},
        {"frames": 2, "placeholders": 2, "sized": True},
    ],
    ids=["llava", "reduced", "mrope", "compact", "sized"],
)
def test_prefill_in_chunks_is_prefill_in_one_go(tmp_path: Path, layout: dict[str, Any], chunk: int) -> None:
    graphs = tiny.export(tmp_path, **layout)
    visual = graphs.visual
    pixels = np.random.default_rng(1).uniform(-1, 1, (2, visual.frames, 3, tiny.SIDE, tiny.SIDE)).astype(np.float32)
    more = [tiny.IMAGE, 18] * (visual.placeholders - 1)
    prompts = [[*LONG, *more, 30], [*SHORT, *more]]
    with opened(tmp_path, graphs, chunk=10**6) as whole:
        seen = whole.reduce(whole.vision(pixels))
        runners = {role: getattr(whole, f"_{role}") for role in ("vision", "reduce", "decode")}
        parts, ran = Generator(runners, graphs, tiny.table(), chunk), []
        run = type(whole._decode).run

        def watched(self: Any, feeds: Any) -> dict[str, Any]:
            ran.append(feeds["order"].shape[1])
            return run(self, feeds)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(whole._decode), "run", watched)
            found = parts.prefill(seen, prompts)
        expected = whole.prefill(seen, prompts)
        np.testing.assert_allclose(found.logits, expected.logits, rtol=0, atol=1e-5 * np.abs(expected.logits).max())
        assert max(ran) <= chunk
        assert sum(ran) == visual.kept + len(prompts[0]) - visual.placeholders
        assert (found.cache.next_position == expected.cache.next_position).all()
        assert (found.cache.next_order == expected.cache.next_order).all()
        tokens = [g.generate(pixels, prompts, 6).tokens for g in (parts, whole)]
    assert tokens[0] == tokens[1]


def test_tokens_of_one_place_stay_in_one_chunk() -> None:
    """CLS has the place of the first patch and they see each other; padding parts anywhere."""
    order = np.array([[2, 2, 3, 5, PAD, 0, 1, 9], [1, 1, 2, 3, PAD, PAD, PAD, 0]])
    tokens = Tokens(order[..., None].astype(np.float64), order, order).in_prompt_order()
    assert tokens.order.tolist() == [[PAD, 0, 1, 2, 2, 3, 5, 9], [PAD, PAD, PAD, 0, 1, 1, 2, 3]]
    assert (tokens.embeds[..., 0] == tokens.order).all()
    assert [part.order.shape[1] for part in tokens.chunks(4)] == [3, 4, 1]
    assert np.concatenate([part.order for part in tokens.chunks(4)], axis=1).tolist() == tokens.order.tolist()


def test_a_prefill_graph_of_its_own_is_never_cut(tmp_path: Path) -> None:
    graphs = tiny.export(tmp_path, stay=2)
    with opened(tmp_path, graphs, chunk=3) as parts, opened(tmp_path, graphs, chunk=100) as whole:
        results = [g.generate(PIXELS, [LONG, SHORT], 5) for g in (parts, whole)]
    assert results[0].tokens == results[1].tokens
    assert results[0].kept["kept_1"].tolist() == [[0, 1]] * 2


def test_without_a_chunk_the_runner_is_asked(tmp_path: Path) -> None:
    graphs = tiny.export(tmp_path)
    with opened(tmp_path, graphs) as generator, opened(tmp_path, graphs, chunk=9) as other:
        assert generator._chunk == generator._decode.chunk(cached=False) == 512
        assert other._chunk == 9


def test_an_image_token_that_was_generated_is_a_word(whole: tuple[Generator, Reference]) -> None:
    generator, reference = whole
    visual = generator.reduce(generator.vision(PIXELS[:1]))
    cache = generator.prefill(visual, [SHORT]).cache
    cache.pending = [[tiny.IMAGE]]
    embeds = np.concatenate([reference.embeds(visual.embeds[0], SHORT), tiny.table()[[tiny.IMAGE, 30]]])
    np.testing.assert_allclose(generator.extend(cache, [[30]])[0], reference.logits(embeds), atol=1e-4)


def test_keys_and_values_never_come_to_the_host(tmp_path: Path) -> None:
    graphs, brought = tiny.export(tmp_path), []
    with opened(tmp_path, graphs) as generator:
        original = type(generator._decode).numpy

        def numpy(runner: Any, value: Any) -> Any:
            brought.append(original(runner, value))
            return brought[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(generator._decode), "numpy", numpy)
            result = generator.generate(PIXELS, [LONG, SHORT], 4)
    assert {value.shape for value in brought} == {(2, 4), (2, 4, tiny.HIDDEN), (2, tiny.VOCAB)}
    assert all(isinstance(value, onnxruntime.OrtValue) for value in result.cache.past.values())


@pytest.mark.parametrize("axes", [1, 3])
def test_pruning_inside_the_language_model(tmp_path: Path, axes: int) -> None:
    """Cache groups of different lengths; a padded batch equals its rows alone."""
    graphs = tiny.export(tmp_path, frames=2, placeholders=2, keep=6, stay=2, axes=axes)
    pixels = np.random.default_rng(1).uniform(-1, 1, (2, 2, 3, tiny.SIDE, tiny.SIDE)).astype(np.float32)
    prompts = [[1, tiny.IMAGE, 10, 11, tiny.IMAGE, 12, 13, 14], [tiny.IMAGE, tiny.IMAGE, 20]]
    with opened(tmp_path, graphs) as generator:
        both = generator.generate(pixels, prompts, 6)
        alone = [generator.generate(pixels[i : i + 1], prompts[i : i + 1], 6).tokens[0] for i in (0, 1)]
        length = {n: generator._decode.numpy(v).shape[-1] for n, v in both.cache.past.items() if "order" in n}
    assert both.tokens == alone
    assert both.index.shape == (2, 6)
    assert both.kept["kept_1"].tolist() == [[0, 1]] * 2
    assert length["past_order_0"] - length["past_order_1"] == 4


def test_fp16_and_a_guided_reduction(tmp_path: Path) -> None:
    graphs = tiny.export(tmp_path, keep=2, half=True, guided=True)
    with opened(tmp_path, graphs) as generator:
        both = generator.generate(PIXELS, [LONG, SHORT], 4)
        alone = generator.generate(PIXELS[1:], [SHORT], 4)
        kind = generator._decode.numpy(both.cache.past["past_key_0"]).dtype
        signals = generator.vision(PIXELS)
        other = generator.reduce(signals, split([LONG, LONG], graphs)).embeds
        assert not np.array_equal(other[1], generator.reduce(signals, split([LONG, SHORT], graphs)).embeds[1])
        with pytest.raises(UsageError, match="guided by the prompt"):
            generator.reduce(signals)
    assert kind == np.float16
    assert both.tokens[1] == alone.tokens[0]


def test_a_compact_layout_still_answers(tmp_path: Path) -> None:
    graphs = tiny.export(tmp_path, keep=2, policy="compact")
    with opened(tmp_path, graphs) as generator, OnnxRuntime().runner(tmp_path / "decode.onnx", 1) as runner:
        result = generator.generate(PIXELS, [LONG, SHORT], 6)
        seen = generator.reduce(generator.vision(PIXELS)).embeds
        reference = Reference(tmp_path, runner)
        assert result.tokens == [reference.greedy(reference.embeds(seen[i], p), 6) for i, p in enumerate((LONG, SHORT))]


class Listed(Runner):
    """A runner whose device values are lists of one array: anything but OrtValue."""

    def __init__(self, inner: Runner) -> None:
        self._inner = inner

    def __enter__(self) -> Listed:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    @property
    def inputs(self) -> Mapping[str, np.dtype[Any]]:
        return self._inner.inputs

    @property
    def outputs(self) -> Sequence[str]:
        return self._inner.outputs

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        plain = {name: value[0] if isinstance(value, list) else value for name, value in feeds.items()}
        assert all(isinstance(value, np.ndarray) for value in plain.values())
        return {name: [self._inner.numpy(value)] for name, value in self._inner.run(plain).items()}

    def numpy(self, value: Any) -> Any:
        return value[0]


def test_runners_of_different_kinds_meet_on_the_host(whole: tuple[Generator, Reference]) -> None:
    generator, _ = whole
    wanted = generator.generate(PIXELS, [LONG, SHORT], 5).tokens
    searched = generator.generate(PIXELS, [LONG, SHORT], 5, sampler=Beams(3)).tokens
    for foreign in ({"vision"}, {"decode"}, {"prefill"}, {"vision", "reduce", "prefill", "decode"}):
        runners: dict[str, Any] = {
            role: Listed(getattr(generator, f"_{role}")) if role in foreign else getattr(generator, f"_{role}")
            for role in ("vision", "reduce", "prefill", "decode")
        }
        mixed = Generator(runners, generator.graphs, tiny.table(), chunk=6)
        assert mixed.generate(PIXELS, [LONG, SHORT], 5).tokens == wanted
        assert mixed.generate(PIXELS, [LONG, SHORT], 5, sampler=Beams(3)).tokens == searched


def test_what_does_not_fit_is_told(whole: tuple[Generator, Reference], tmp_path: Path) -> None:
    generator, _ = whole
    graphs = generator.graphs
    with pytest.raises(UsageError, match=r"2 images .* and 1 prompts"):
        generator.generate(PIXELS, [LONG], 1)
    with pytest.raises(UsageError, match=r"pixel_values has shape \[2, 1, 3, 4, 4\]"):
        generator.vision(PIXELS[..., :4, :4])
    with pytest.raises(UsageError, match="max_new_tokens is 0"):
        generator.generate(PIXELS, [LONG, SHORT], 0)
    cache = generator.generate(PIXELS, [LONG, SHORT], 1).cache
    with pytest.raises(UsageError, match="1 texts for 2 conversations"):
        generator.extend(cache, [[5]])
    with pytest.raises(UsageError, match="Text 1 holds an image token"):
        generator.extend(cache, [[5], [tiny.IMAGE]])
    with pytest.raises(UsageError, match="Text 0 is empty"):
        generator.extend(Cache({}, np.zeros(1, np.int64), np.zeros(1, np.int64), [[]]), [[]])
    with pytest.raises(UsageError, match="No runner for vision, reduce"):
        Generator({"decode": generator._decode}, graphs, tiny.table())
    runners = {role: getattr(generator, f"_{role}") for role in ("vision", "reduce", "prefill")}
    runners["decode"] = generator._vision
    with pytest.raises(VerificationError, match="engine for decode has no output logits"):
        Generator(runners, graphs, tiny.table())
    with pytest.raises(VerificationError, match=r"shape \[39, 16\], expected \[40, 16\]"):
        Generator({}, graphs, tiny.table()[1:])
    (tmp_path / "embedding.npy").write_bytes(b"nothing")
    with pytest.raises(VerificationError, match="cannot be read"):
        embedding(tmp_path, graphs)


def test_nan_is_an_error(whole: tuple[Generator, Reference]) -> None:
    generator, _ = whole
    with pytest.raises(ExportError, match="returned NaN"):
        generator.generate(np.full_like(PIXELS, np.nan), [LONG, SHORT], 2)


def test_greedy_takes_the_lower_of_equal_tokens() -> None:
    assert greedy(np.array([[0, 2, 2], [1, 1, 1]], np.float32)).tolist() == [1, 0]


def test_sampling() -> None:
    logits = np.log(np.array([[0.1, 0.6, 0.3, 1e-9]], np.float32)).repeat(4000, axis=0)
    share = np.bincount(Sampling(seed=1)(logits), minlength=4) / 4000
    np.testing.assert_allclose(share, [0.1, 0.6, 0.3, 0], atol=0.03)
    assert set(Sampling(top_k=2)(logits).tolist()) == {1, 2}
    assert set(Sampling(top_p=0.6)(logits).tolist()) == {1}
    assert set(Sampling(top_p=0.61)(logits).tolist()) == {1, 2}
    assert set(Sampling(temperature=0.01)(logits).tolist()) == {1}
    assert Sampling(seed=5)(logits).tolist() == Sampling(seed=5)(logits).tolist()
    with pytest.raises(UsageError, match="temperature 0"):
        Sampling(temperature=0)
