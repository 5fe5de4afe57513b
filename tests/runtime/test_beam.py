"""Beam search: transformers' on the same weights, and every continuation there is on graphs small enough for that."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from exporter.errors import ExportError, UsageError
from exporter.families._contract import Request
from exporter.runtime.beam import Beams, search
from exporter.runtime.generate import Generator
from exporter.stages._reference import reference
from tests.families import hugging_face
from tests.families import tiny as families
from tests.runtime import tiny
from tests.runtime.test_generate import LONG, PIXELS, SHORT, opened

EOS = [families.EOS, 7, 22, 30, 38, 44, 51, 60, 77, 85]
"""Many, so that answers of a model of random weights end at all lengths."""
NEW_TOKENS = 14


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Generator]:
    folder = tmp_path_factory.mktemp("llava")
    theirs = families.llava(folder)
    runners, graphs, table = reference(families.plan(folder, (), Request()))
    graphs.text.eos[:] = EOS
    return theirs, Generator(runners, graphs, table)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(("count", "penalty"), [(2, 1.0), (4, 1.0), (3, 0.0), (3, -1.0), (4, 2.5)])
def test_the_answers_and_scores_of_transformers(
    llama: tuple[PreTrainedModel, Generator], count: int, penalty: float, early: bool
) -> None:
    theirs, generator = llama
    lengths = set()
    for seed in range(4):
        asked = families.question(generator.graphs, seed)
        arguments = hugging_face.arguments(asked, generator.graphs)
        with torch.no_grad():
            true = theirs.generate(
                **arguments, num_beams=count, num_return_sequences=count, do_sample=False, early_stopping=early,
                length_penalty=penalty, max_new_tokens=NEW_TOKENS, eos_token_id=EOS, pad_token_id=0,
                return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
        expected = [ended(row.tolist()) for row in true.sequences[:, arguments["input_ids"].shape[1] :]]
        visual = generator.reduce(generator.vision(asked.pixels))
        start = generator.prefill(visual, [asked.prompt])
        beams = Beams(count, penalty, early)
        (found,) = search(generator, start.logits, start.cache, beams, NEW_TOKENS, EOS)
        assert [answer.tokens for answer in found] == expected
        np.testing.assert_allclose([answer.score for answer in found], true.sequences_scores, rtol=1e-4, atol=1e-5)
        lengths |= set(map(len, expected))
    assert penalty > 2 or len(lengths) > 2, "answers that all end alike test little"


def ended(tokens: list[int]) -> list[int]:
    """Up to the first eos."""
    end = next((i + 1 for i, token in enumerate(tokens) if token in EOS), len(tokens))
    return tokens[:end]


def test_the_best_of_all_answers(tmp_path: Path) -> None:
    """With as many beams as continuations, no answer of three tokens is overlooked."""
    graphs = tiny.export(tmp_path)
    with opened(tmp_path, graphs) as generator:
        start = generator.prefill(generator.reduce(generator.vision(PIXELS[:1])), [SHORT])
        best: list[tuple[float, list[int]]] = []
        (found,) = search(generator, start.logits, start.cache, Beams(19, 0.0), 2, [])
        first = log_softmax(start.logits[0])
        for token in range(tiny.VOCAB):
            again = generator.rows(start.cache, np.array([0]))
            second = log_softmax(generator.step(again, np.array([token]))[0])
            best += [(float(first[token] + second[n]), [token, n]) for n in range(tiny.VOCAB)]
    best.sort(key=lambda pair: -pair[0])
    assert found[0].tokens == best[0][1]
    assert found[0].score == pytest.approx(best[0][0], abs=1e-4)


def log_softmax(logits: Any) -> Any:
    exact = logits.astype(np.float64)
    return exact - np.log(np.exp(exact).sum())


@pytest.mark.parametrize("stay", [None, 2])
def test_a_batch_is_its_rows_and_a_turn_follows(tmp_path: Path, stay: int | None) -> None:
    """Rows that end at different times, cache groups of different lengths; the cache is as if the answer had been decoded."""
    graphs = tiny.export(tmp_path, keep=4, stay=stay)
    with opened(tmp_path, graphs) as generator:
        graphs.text.eos[:] = [tiny.EOS, *range(20, 26)]
        told: list[tuple[int, int]] = []
        beams = Beams(3)
        both = generator.generate(PIXELS, [LONG, SHORT], 9, on_token=lambda *said: told.append(said), sampler=beams)
        alone = [
            generator.generate(PIXELS[i : i + 1], [prompt], 9, sampler=beams) for i, prompt in enumerate((LONG, SHORT))
        ]
        assert both.tokens == [one.tokens[0] for one in alone]
        assert [[token for r, token in told if r == row] for row in (0, 1)] == both.tokens
        assert len(both.timings.decode_ms) == max(len(one.timings.decode_ms) for one in alone)

        forced = generator.prefill(generator.reduce(generator.vision(PIXELS)), [LONG, SHORT]).cache
        said = [[token for token in row if token not in graphs.text.eos] for row in both.tokens]
        turns = [[33, 34], [35]]
        logits = generator.extend(forced, [[*a, *b] for a, b in zip(said, turns, strict=True)])
        np.testing.assert_allclose(generator.extend(both.cache, turns), logits, atol=1e-5)


def test_what_cannot_be_searched_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="1 beams: expected 2 or more"):
        Beams(1)
    graphs = tiny.export(tmp_path)
    with opened(tmp_path, graphs) as generator:
        with pytest.raises(UsageError, match="21 beams looks at 42 tokens a step; the vocabulary has 40"):
            generator.generate(PIXELS, [LONG, SHORT], 2, sampler=Beams(21))
        with pytest.raises(ExportError, match="returned NaN"):
            generator.generate(np.full_like(PIXELS, np.nan), [LONG, SHORT], 2, sampler=Beams(2))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, np.bool_])
def test_rows_of_device_values(tmp_path: Path, dtype: Any) -> None:
    import onnx
    import onnxruntime

    from exporter.backends import _gather

    graphs = tiny.export(tmp_path)
    with opened(tmp_path, graphs) as generator:
        runner = generator._decode
        for shape, rows in product(((3, 2), (3, 2, 4, 5)), ([0, 0, 2, 1], [2])):
            value = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
            device = onnxruntime.OrtValue.ortvalue_from_numpy(value)
            found = runner.gather(device, np.array(rows))
            assert isinstance(found, onnxruntime.OrtValue)
            assert (runner.numpy(found) == value[rows]).all() and runner.numpy(found).dtype == dtype
            assert (runner.gather(value, np.array(rows)) == value[rows]).all()
            model = onnx.load_model_from_string(_gather.model(device.data_type(), len(shape)))
            onnx.checker.check_model(model, full_check=True)
