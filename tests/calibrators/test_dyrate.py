"""DyRate's training on the embedded model: what it runs is the model, what it learns is what the engine does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from exporter.calibrators._predictor import Dropping, Predictor, Recipe, measure, train
from exporter.calibrators._schedule import schedule, written
from exporter.embedded import CHECKPOINT
from exporter.embedded.evaluate import prompt
from exporter.job import Job
from exporter.runtime.generate import Generator
from exporter.stages import _task
from graphs import _spec
from tests.conftest import Said

LAYER = 1


@pytest.fixture(scope="module")
def rollout() -> Dropping:
    torch.set_num_threads(1)
    return Dropping(Job("embedded", (), "cpu_fp32").plan(), LAYER)


@pytest.fixture(scope="module")
def questions() -> list[_task.Question]:
    return _task.embedded(1, 8)


def everything(shares: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(ranks, dtype=torch.float32)


@torch.inference_mode()
def test_keeping_everything_is_the_model(rollout: Dropping, questions: list[_task.Question]) -> None:
    from transformers import AutoProcessor

    model = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    asked = [questions[0], questions[-1]]
    batch = rollout.batch(asked)
    found = rollout.run(batch, everything)
    for row, q in enumerate(asked):
        text = prompt(processor, q) + q.answer  # type: ignore[arg-type]
        inputs = processor(text=[text], images=[q.frames], return_tensors="pt")
        theirs = model(**inputs).logits[0, -2:]
        torch.testing.assert_close(found[row, -2:], theirs, rtol=1e-4, atol=1e-3)
    assert batch.labels[:, -1].tolist() == [1, 1], "answers end with the end-of-sequence token"


def test_shares_and_ranks(rollout: Dropping, questions: list[_task.Question]) -> None:
    seen = []

    def keep(shares: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
        seen.append((shares, ranks))
        return everything(shares, ranks)

    rollout.run(rollout.batch(questions), keep)
    ((shares, ranks),) = seen
    torch.testing.assert_close(shares.sum(-1), torch.ones(shares.shape[:2]))
    assert (shares[:, 0, 3] < 1e-6).all(), "there is no answer yet to look at"
    assert (shares[:, 1, 3] > 0).all()
    assert (ranks.sort(-1).values == torch.arange(rollout.visual)).all()


def test_fewer_tokens_change_the_answer(rollout: Dropping, questions: list[_task.Question]) -> None:
    """At layer 1 the image is still needed: the best token alone does not do."""
    batch = rollout.batch(questions)
    whole = rollout.run(batch, everything).argmax(-1)
    one = rollout.run(batch, lambda shares, ranks: (ranks < 1).float()).argmax(-1)
    assert (whole[:, 0] == batch.labels[:, 0]).float().mean() > 0.85
    assert (one[:, 0] == batch.labels[:, 0]).float().mean() < 0.6


@pytest.mark.parametrize("state", [0, 4])
def test_training_finds_a_cheaper_rate(state: int, rollout: Dropping, questions: list[_task.Question]) -> None:
    predictor = Predictor(10, state)
    before = {name: p.detach().clone() for name, p in predictor.named_parameters()}
    first = measure(rollout, predictor, questions)
    train(rollout, predictor, questions, Recipe(steps=25, batch=4, cost=1.0))
    after = measure(rollout, predictor, questions)
    assert all(not torch.equal(p, before[name]) for name, p in predictor.named_parameters()), "a weight never learned"
    assert all(p.grad is None for p in rollout.decoder.parameters())
    assert sum(after.kept) < sum(first.kept)
    assert after.right >= 0.5


def test_the_engine_wants_what_training_saw(rollout: Dropping, questions: list[_task.Question], tmp_path: Path) -> None:
    """The classifier in the decode graph, step by step, against the same classifier on whole answers."""
    from exporter.runtime.images import preprocess
    from exporter.runtime.prompt import Prompt
    from exporter.stages._reference import reference

    predictor = Predictor(10, 4, seed=3)
    with torch.no_grad():  # the rate follows one unit of the state, which follows the share of the answer
        predictor.candidate[3] = 40.0
        predictor.weight.copy_(torch.linspace(-9, 9, 10).expand(4, -1) * predictor.weight[:, :1])
    predictor.save(tmp_path / "w.safetensors")
    spec = written(LAYER, [0, 9], [60, 30], weights=str(tmp_path / "w.safetensors"), state=4)
    runners, graphs, table = reference(Job("embedded", (spec,), "cpu_fp32").plan())
    engine, ask = Generator(runners, graphs, table), Prompt.load(CHECKPOINT, graphs.text.image_token)
    counts = predictor.kept(rollout.visual)
    found = []
    for q in questions[:4]:
        wanted = []

        def keep(shares: torch.Tensor, ranks: torch.Tensor, out: list[int] = wanted) -> torch.Tensor:
            out.extend(counts[predictor(shares, torch.ones(1, 2, dtype=torch.bool)).argmax(-1)][0].tolist())
            return everything(shares, ranks)

        rollout.run(rollout.batch([q]), keep)
        visual = engine.reduce(engine.vision(preprocess(q.frames, graphs.image)))
        state = engine.prefill(visual, [ask.ask(q.question)])
        assert state.cache.shrunk is not None
        steps = [int(state.cache.shrunk.wanted[0])]  # type: ignore[index]
        engine.step(state.cache, np.array([ask.tokenizer.encode(q.answer).ids[0]]))
        steps.append(int(state.cache.shrunk.wanted[0]))  # type: ignore[index]
        assert steps == wanted
        found += steps
    assert len(set(found)) > 1, "one rate for all shows nothing"


def all_schedules(kept: list[float], buckets: int) -> list[tuple[int, int]]:
    """Cost of every schedule, by brute force."""
    import itertools

    need = [int(np.ceil(max(kept[i:]))) for i in range(len(kept))]
    found = []
    for n in range(buckets):
        for cuts in itertools.combinations(range(1, len(kept)), n):
            starts = [0, *cuts]
            found.append((sum(need[s] * (e - s) for s, e in zip(starts, [*cuts, len(kept)], strict=True)), n))
    return found


def test_schedules_are_the_cheapest_that_suffice() -> None:
    rng = np.random.default_rng(0)
    for trial in range(40):
        kept, buckets = (rng.integers(1, 20, rng.integers(1, 9)) - rng.random()).tolist(), int(rng.integers(1, 4))
        starts, counts = schedule(kept, buckets)
        assert starts[0] == 0 and len(starts) <= buckets and starts == sorted(set(starts))
        assert counts == sorted(counts, reverse=True)
        holds = [counts[sum(start <= step for start in starts) - 1] for step in range(len(kept))]
        assert all(h >= k for h, k in zip(holds, kept, strict=True)), trial
        assert sum(holds) == min(cost for cost, _ in all_schedules(kept, buckets))
        spec = written(3, starts, counts)
        assert _spec.format(_spec.parse(spec)) == spec
        assert spec.startswith("dyrate:" if len(starts) > 1 else "fastv:")


def test_the_command(edgetrim: Callable[..., Said], tmp_path: Path, questions: list[_task.Question]) -> None:
    lines = []
    for i, q in enumerate(questions):
        q.frames[0].save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"images": [f"{i}.png"], "question": q.question, "answer": q.answer}))
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    given = ["--questions", tmp_path / "q.jsonl", "-o", tmp_path / "new" / "w.safetensors", "--json"]
    said = edgetrim("calibrate", "dyrate:layer=1,steps=3,batch=2", "embedded", *given)
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert found["file"] == str(tmp_path / "new" / "w.safetensors") and Path(found["file"]).is_file()
    assert f"weights={found['file']}" in found["specs"][1]
    for spec in found["specs"]:
        assert Job("embedded", (spec,), "cpu_fp32").plan().steps[-1].after <= found["visual_tokens"] == 64
    (tmp_path / "q.jsonl").write_text(lines[0])
    said = edgetrim("calibrate", "dyrate", "embedded", *given)
    assert said.code == 2 and "holds 1 questions; dyrate needs 8 or more" in said.err
