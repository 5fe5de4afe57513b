"""VTW's search for K, against Hugging Face's model with an explicit mask that hides the image from layer K on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from exporter.calibrators import _contract
from exporter.calibrators.vtw import Vtw, divergences
from exporter.errors import UsageError
from exporter.job import Job
from exporter.stages import _task
from tests.calibrators.conftest import ask
from tests.families import tiny


def next_token(theirs: PreTrainedModel, arguments: dict[str, Any], first: int | None) -> np.ndarray:
    """Probabilities float64 [vocab]; text sees no image token from layer `first` on."""
    image = arguments["input_ids"][0] == theirs.config.image_token_id

    def hide(module: Any, given: Any, named: dict[str, Any]) -> Any:
        mask = named["attention_mask"].clone()
        mask[:, :, :, image] = torch.finfo(mask.dtype).min
        return given, {**named, "attention_mask": mask}

    layers = theirs.model.language_model.layers
    hooks = [] if first is None else [a.register_forward_pre_hook(hide, with_kwargs=True) for a in layers[first:]]
    with torch.inference_mode():
        logits = theirs(**arguments).logits[0, -1].double().numpy()
    for hook in hooks:
        hook.remove()
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


@pytest.mark.parametrize(
    ("build", "size"),
    [
        pytest.param(tiny.llava, None, id="llama"),
        pytest.param(tiny.qwen2_5_vl, (84, 56), id="three axes"),
        pytest.param(tiny.qwen3_vl, (84, 56), id="planes"),
        pytest.param(tiny.gemma3, None, id="windows, and tokens of an image see each other"),
        pytest.param(tiny.paligemma, None, id="the whole prompt sees itself"),
    ],
)
def test_divergences(build: Any, size: tuple[int, int] | None, tmp_path: Path) -> None:
    asked = ask(build(tmp_path), tmp_path, size, "w20", answered=False)
    found = divergences(asked.rollout.decoder, asked.batch, 1)
    full = next_token(asked.theirs, asked.arguments, None)
    expected = []
    for k in (1, 2, 3):
        withdrawn = next_token(asked.theirs, asked.arguments, k)
        expected.append(float((withdrawn * np.log(withdrawn / full)).sum()))
    assert min(expected) > 1e-4, "a model that does not miss its image shows nothing"
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3)


def test_the_smallest_k_below_the_threshold() -> None:
    plan, questions = Job("embedded", (), "cpu_fp32").plan(), _task.for_calibration(1, 4)
    found = Vtw(threshold=1e9, samples=2).calibrate(plan, questions, "", lambda text: None).found["layers"]
    assert [at["k"] for at in found] == [1, 2, 3]
    for at in found:  # with each one's own divergence for the threshold, it or an earlier one is chosen
        threshold = at["divergence"]
        chosen = Vtw(threshold=threshold, samples=2).calibrate(plan, questions, "", lambda text: None)
        k = min(a["k"] for a in found if a["divergence"] <= threshold)
        assert chosen.specs == {"": f"vtw:k={k}"} and chosen.found["k"] == k
    best = min(found, key=lambda at: at["divergence"])
    with pytest.raises(UsageError, match=rf"No K from 2 to 3 .* is {best['divergence']:.4g}, at K = {best['k']}"):
        Vtw(threshold=0, first=2, samples=2).calibrate(plan, questions, "", lambda text: None)


@pytest.mark.parametrize(("text", "error"), [("vtw:threshold=-1", "0 or more"), ("vtw:samples=0", "1 or more")])
def test_knobs(text: str, error: str) -> None:
    with pytest.raises(UsageError, match=error):
        _contract.parse(text)


@pytest.mark.parametrize("first", [0, 4])
def test_where_the_search_begins(first: int) -> None:
    with pytest.raises(UsageError, match=rf"`first` of vtw must be in 1..3, .* found {first}"):
        Vtw(first=first).calibrate(Job("embedded", (), "cpu_fp32").plan(), [], "", lambda text: None)
