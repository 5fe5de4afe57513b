"""Measure which attention heads look at what is asked: `python -m exporter.embedded.heads FILE [CHECKPOINT] [--count N]`.

Writes the scores that `sparsemm:scores=FILE` divides a cache by. A question about a cell says where the answer is read from.
The score of a head is how often, when the model is about to give the right answer, the visual token that it attends to most
lies in that cell. The published scores come from text in images in the same way, with all tokens in place of the visual ones.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

import click
import torch

from exporter.embedded import CHECKPOINT, digits, evaluate

BATCH = 25


def cell(question: str, side: int) -> list[int]:
    """The visual tokens of the cell that a question is about, of side · side in raster order.

    >>> cell("Which digit is in row 1, column 2?", 8)
    [2, 3, 10, 11]
    """
    row, column = (int(n) - 1 for n in re.findall(r"\d+", question))
    part = side // digits.GRID
    return [(row * part + i) * side + column * part + j for i in range(part) for j in range(part)]


@torch.inference_mode()
def scores(folder: Path, count: int, seed: int = 0) -> dict[str, list[float]]:
    """ "layer-head" → [the share of `count` held-out questions in which it looks at the cell and the answer is right]."""
    model, processor = evaluate.load(folder)
    model.set_attn_implementation("eager")
    hits: dict[str, int] = {}
    examples = digits.held_out("cell", count, seed)
    for start in range(0, count, BATCH):
        part = examples[start : start + BATCH]
        inputs: dict[str, Any] = processor(
            text=[evaluate.prompt(processor, example) for example in part],
            images=[list(example.frames) for example in part],
            padding=True,
            return_tensors="pt",
        )
        out = model(**inputs, output_attentions=True)
        answers = processor.batch_decode(out.logits[:, -1:].argmax(-1))
        for row, example in enumerate(part):
            if answers[row].strip() != example.answer:
                continue
            visual = (inputs["input_ids"][row] == model.config.image_token_index).nonzero()[:, 0]
            asked = cell(example.question, math.isqrt(len(visual)))
            for layer, attention in enumerate(out.attentions):
                for head, looked in enumerate(attention[row, :, -1, visual].argmax(-1).tolist()):
                    hits[f"{layer}-{head}"] = hits.get(f"{layer}-{head}", 0) + (looked in asked)
    if not hits:
        raise click.ClickException(f"{folder} answers none of {count} questions right, so nothing can be measured.")
    return {head: [hit / count] for head, hit in hits.items()}


def main() -> None:
    """Write the scores, and print them layer by layer."""
    parser = argparse.ArgumentParser(description="Measure which attention heads look at what is asked.")
    parser.add_argument("file", type=Path, help="where to write the scores (JSON)")
    parser.add_argument("checkpoint", type=Path, nargs="?", default=CHECKPOINT)
    parser.add_argument("--count", type=int, default=200, help="questions asked")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = scores(options.checkpoint, options.count, options.seed)
    options.file.write_text(json.dumps(found, indent=1) + "\n")
    for head, (share,) in found.items():
        click.echo(f"{head:6} {share:.1%} of {options.count}")


if __name__ == "__main__":
    main()
