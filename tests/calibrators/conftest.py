"""Tiny models that can be asked in words."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel

from exporter.calibrators._rollout import Batch, Rollout
from exporter.families._contract import Request
from exporter.runtime.images import preprocess
from exporter.stages._task import Question
from tests.families import hugging_face, tiny

TEMPLATE = (
    "w9 w10 {% for m in messages %}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }} "
    "{% else %}SHOWN {% endif %}{% endfor %}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
)


IMAGE = "<image_soft_token>"
NAMES = {tiny.IMAGE: IMAGE, tiny.START: "<start_of_image>", tiny.END: "<end_of_image>", tiny.EOS: "</s>"}


def with_words(folder: Path, mark: str = "") -> None:
    """A tokenizer whose word "w11" is token 11, and a chat template. mark: see `VisualLayout`."""
    tokenizer = Tokenizer(models.WordLevel({NAMES.get(i, f"w{i}"): i for i in range(tiny.VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(NAMES.values()))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("SHOWN", mark or IMAGE))


@dataclass(frozen=True)
class Asked:
    """A question to a tiny model: ours, Hugging Face's, and what that one gets."""

    rollout: Rollout
    theirs: PreTrainedModel
    arguments: dict[str, Any]
    question: Question
    batch: Batch


def ask(theirs: PreTrainedModel, folder: Path, size: tuple[int, int] | None, answer: str, answered: bool) -> Asked:
    plan = tiny.plan(folder, (), Request(1, size))
    with_words(folder, plan.geometry.mark)
    theirs.set_attn_implementation("eager")
    rollout = Rollout(plan)
    noise = torch.randint(0, 256, (90, 120, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    question = Question("custom", [Image.fromarray(noise.numpy())], "w11 w12 w13", answer)
    graphs = rollout.graphs
    prompt = rollout.prompt.ask(question.question, graphs.visual.placeholders, graphs.visual.media)
    asked = tiny.Question(prompt, preprocess(question.frames, graphs.image), {})
    arguments = hugging_face.arguments(asked, graphs)
    return Asked(rollout, theirs, arguments, question, rollout.batch([question], answered))
