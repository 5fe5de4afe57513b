"""The shipped checkpoint: loads through plain transformers, keeps its prompt, and answers held-out questions."""

from __future__ import annotations

import numpy as np
import pytest

from exporter.embedded import CHECKPOINT, digits

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

BAR = {"cell": 0.95, "count": 0.90, "moved": 0.95}


@pytest.fixture(scope="module")
def loaded() -> tuple:
    from exporter.embedded.evaluate import load

    return load(CHECKPOINT)


def test_prompt_is_the_one_it_was_trained_on(loaded: tuple) -> None:
    from exporter.embedded.evaluate import prompt

    _, processor = loaded
    for kind, frames in (("cell", 1), ("moved", 4)):
        example = digits.held_out(kind, 1)[0]
        text = prompt(processor, example)
        assert text == f"<|user|>{'<image>' * frames}{example.question}<|assistant|>"
        inputs = processor(text=text, images=list(example.frames), return_tensors="pt")
        ids = inputs["input_ids"][0].tolist()
        assert ids.count(processor.image_token_id) == frames * 64
        assert processor.tokenizer.unk_token_id not in ids
        pixels = inputs["pixel_values"].permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(pixels, example.frames / 127.5 - 1, atol=1e-6)


def test_shapes_suit_the_targets(loaded: tuple) -> None:
    model, processor = loaded
    text = model.config.text_config
    assert model.config.vision_feature_select_strategy == "default"
    assert text.hidden_size % 64 == text.intermediate_size % 64 == text.head_dim % 16 == 0
    assert text.num_key_value_heads < text.num_attention_heads
    assert not text.tie_word_embeddings
    assert text.vocab_size == len(processor.tokenizer) == 64
    assert 2.5e6 < sum(weight.numel() for weight in model.parameters()) < 4e6


def test_weights_are_stored_in_fp16() -> None:
    from safetensors import safe_open

    with safe_open(CHECKPOINT / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}  # noqa: SIM118


@pytest.mark.parametrize("kind", digits.KINDS)
def test_accuracy_on_held_out_digits(kind: str, loaded: tuple) -> None:
    from exporter.embedded.evaluate import answers

    model, processor = loaded
    examples = digits.held_out(kind, 200)
    given = answers(model, processor, examples)
    right = [answer == example.answer for answer, example in zip(given, examples, strict=True)]
    assert np.mean(right) >= BAR[kind]
