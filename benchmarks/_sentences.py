"""The embedded model, taught to answer in whole sentences: what it takes to see anything change while an answer is written.

"Which digit is in row 2, column 3?" → "7 is in row 2, column 3"; "How many sevens are there?" → "there are two sevens".
Only the first needs the image for its first word; the rest copies the question. All words are in its vocabulary.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from exporter.embedded import CHECKPOINT, digits

KINDS = ("cell", "count")
BATCH, RATE = 48, 6e-4


def answer(question: str, word: str) -> str:
    """The sentence.

    >>> answer("How many sevens are there?", "two")
    'there are two sevens'
    """
    if found := re.fullmatch(r"Which digit (is in row \d, column \d)\?", question):
        return f"{word} {found[1]}"
    counted = re.fullmatch(r"How many (\w+) are there\?", question)
    assert counted is not None, question
    return f"there are {word} {counted[1]}"


def asked(kind: str, rng: np.random.Generator, held_out: bool) -> digits.Example:
    """A question with its sentence."""
    found = digits._example(kind, rng, digits.glyphs(held_out))
    return digits.Example(kind, found.frames, found.question, answer(found.question, found.answer))


def teach(folder: Path, steps: int = 400, seed: int = 0, log: Callable[[str], None] = lambda text: None) -> Path:
    """Train all of the language model on it, from the shipped weights on; the tower stays. Writes the checkpoint and returns
    `folder`, which is left as it is if it is there."""
    import torch

    from exporter.embedded.evaluate import load, prompt

    if (folder / "config.json").is_file():
        return folder
    torch.manual_seed(seed)
    model, processor = load(CHECKPOINT)
    model.requires_grad_(False)
    weights = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, weight_decay=0.0)
    rng = np.random.default_rng(seed)
    began = time.perf_counter()
    for step in range(steps):
        examples = [asked(KINDS[i % 2], rng, held_out=False) for i in range(BATCH)]
        inputs = _inputs(processor, [(e, prompt(processor, e)) for e in examples])
        rate = RATE * min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step % 20 == 19:
            log(
                f"sentences: step {step + 1} of {steps}, loss {float(loss.detach()):.4f}, {time.perf_counter() - began:.0f} s"
            )
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    return folder


def _inputs(processor: Any, examples: list[tuple[digits.Example, str]]) -> dict[str, Any]:
    """A batch for transformers, padded in front; only the answers are to be learned."""
    whole = [f"{text}{e.answer}<eos>" for e, text in examples]
    found = processor(text=whole, images=[list(e.frames) for e, _ in examples], padding=True, return_tensors="pt")
    labels = found["input_ids"].clone()
    for row, (e, _) in enumerate(examples):
        labels[row, : -len(processor.tokenizer(e.answer)["input_ids"]) - 1] = -100
    return {**found, "labels": labels}
