"""Measure a checkpoint through plain transformers: `python -m exporter.embedded.evaluate [CHECKPOINT] [--count N]`.

Greedy generation with the folder's own processor and chat template on held-out digits. An answer counts when the
decoded text is exactly the right one, so the model must also stop by itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import click
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from exporter.embedded import CHECKPOINT, digits

NEW_TOKENS = 32


def load(folder: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The checkpoint, computing in FP32 with its weights as stored, and its processor."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(folder)


def prompt(processor: LlavaProcessor, example: digits.Example) -> str:
    """The example's question, rendered by the chat template."""
    content = [{"type": "image"}] * len(example.frames) + [{"type": "text", "text": example.question}]
    chat = [{"role": "user", "content": content}]
    return str(processor.apply_chat_template(chat, add_generation_prompt=True))


@torch.inference_mode()
def answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    examples: list[digits.Example],
    batch: int = 50,
) -> list[str]:
    """The model's greedy answers, decoded."""
    texts = []
    for start in range(0, len(examples), batch):
        part = examples[start : start + batch]
        inputs = processor(
            text=[prompt(processor, example) for example in part],
            images=[list(example.frames) for example in part],
            padding=True,
            return_tensors="pt",
        )
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
        texts += processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def accuracy(folder: Path, count: int, seed: int = 0) -> dict[str, float]:
    """The share of `count` held-out questions answered right, by kind."""
    model, processor = load(folder)
    shares = {}
    for kind in digits.KINDS:
        examples = digits.held_out(kind, count, seed)
        given = answers(model, processor, examples)
        right = [answer == example.answer for answer, example in zip(given, examples, strict=True)]
        shares[kind] = sum(right) / count
    return shares


def main() -> None:
    """Print the accuracy by kind."""
    parser = argparse.ArgumentParser(description="Measure the embedded VLM on held-out digits.")
    parser.add_argument("checkpoint", type=Path, nargs="?", default=CHECKPOINT)
    parser.add_argument("--count", type=int, default=500, help="questions per kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for kind, share in accuracy(options.checkpoint, options.count, options.seed).items():
        click.echo(f"{kind:6} {share:.1%} of {options.count}")


if __name__ == "__main__":
    main()
