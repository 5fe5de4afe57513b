"""Whole answers at once: what every layer and the head say is what the model says token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from exporter.calibrators._rollout import Layers
from tests.calibrators.conftest import ask
from tests.families import tiny

ANSWER = "w20 w30 w40"


@pytest.mark.parametrize(
    ("build", "size"),
    [
        pytest.param(tiny.llava, None, id="llava"),
        pytest.param(tiny.llava_next, (56, 112), id="row ends"),
        pytest.param(tiny.qwen2_5_vl, (84, 56), id="three axes"),
        pytest.param(tiny.qwen3_vl, (84, 56), id="planes"),
        pytest.param(tiny.gemma3, None, id="tokens of an image see each other"),
        pytest.param(tiny.paligemma, None, id="the whole prompt sees itself"),
        pytest.param(tiny.blip_2, None, id="learned positions"),
    ],
)
def test_it_is_the_model(build: Any, size: tuple[int, int] | None, tmp_path: Path) -> None:
    """Hugging Face's model says token by token, with its cache."""
    asked = ask(build(tmp_path), tmp_path, size, ANSWER, answered=True)
    tokens = [20, 30, 40, tiny.EOS]
    assert asked.batch.labels.tolist() == [tokens] and asked.batch.real.all()
    with torch.inference_mode():
        layers = Layers(asked.rollout.decoder, asked.batch)
        x = layers.entered
        for i in range(asked.rollout.decoder.spec.layers):
            x, _ = layers(i, x)
        ours = asked.rollout.decoder.lm_head(asked.rollout.decoder.norm.every(x[:, -len(tokens) :]))[0]
        length = asked.arguments["input_ids"].shape[1]
        theirs = asked.theirs.generate(
            **asked.arguments, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True,
            prefix_allowed_tokens_fn=lambda _, ids: [tokens[len(ids) - length]],
        )  # fmt: skip
    expected = torch.cat(theirs.logits)
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()
