"""The layer at which VTW withdraws the visual tokens: the first one behind which the model hardly misses them.

For every K from `first` on, the questions are asked with all visual tokens gone from layer K on, and what the model would say
next is compared with what it says with them: the Kullback-Leibler divergence Σ p_K log(p_K / p) over the vocabulary, with p_K the
withdrawn model's, averaged over questions. K is the smallest with at most `threshold` of it, in nats.

Up to layer K nothing differs from the full model, whose text is taken there and run on alone: all K at once, in a batch that grows.

Source: Lin et al. 2024, "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference",
arXiv:2405.05803, and its code.
Knobs:
    threshold: the code's 0.003 for LLaVA-1.5-7B, 0.0005 for 13B, 0.0001 for LLaVA-1.6-7B.
    first: the code's 5 of 32 layers, fewer in models with fewer, at least 1.
    samples: the first so many questions, 20 as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exporter.calibrators._contract import Calibration, Calibrator, Log, Table
from exporter.calibrators._rollout import Batch, Layers, Rollout
from exporter.errors import UsageError
from exporter.nn.decoder import Decoder
from exporter.plan import Plan
from exporter.stages._task import Question
from graphs._layers import DEPTH
from graphs._spec import format as spec_of
from graphs.vtw import Vtw as Reduction

FIRST = 5


@dataclass(frozen=True)
class Vtw(Calibrator):
    """Look for the smallest K."""

    threshold: float = 0.003
    first: int | None = None
    samples: int = 20

    def __post_init__(self) -> None:
        if self.threshold < 0 or self.samples < 1:
            raise UsageError(
                "`threshold` of vtw must be 0 or more, in nats, and `samples` 1 or more; found "
                f"{self.threshold:g} and {self.samples}."
            )

    @property
    def least(self) -> int:
        return self.samples

    @property
    def reduction(self) -> str:
        return spec_of(Reduction())

    def calibrate(self, plan: Plan, questions: Sequence[Question], file: str, log: Log) -> Calibration:
        depth = plan.geometry.layers
        first = max(1, min(FIRST, round(FIRST * depth / DEPTH))) if self.first is None else self.first
        if not 1 <= first < depth:
            raise UsageError(
                f"`first` of vtw must be in 1..{depth - 1}, as the model has {depth} decoder layers; found {first}."
            )
        rollout, seen = Rollout(plan), []
        for number, question in enumerate(questions[: self.samples], 1):
            log(f"question {number} of {self.samples}")
            seen.append(divergences(rollout.decoder, rollout.batch([question], answered=False), first))
        each = torch.stack(seen)
        means, worst = each.mean(0).tolist(), each.amax(0).tolist()
        k = next((first + i for i, kl in enumerate(means) if kl <= self.threshold), None)
        if k is None:
            best = min(range(len(means)), key=means.__getitem__)
            raise UsageError(
                f"No K from {first} to {depth - 1} brings the divergence down to {self.threshold:g}: the smallest is "
                f"{means[best]:.4g}, at K = {first + best}. Pass a `threshold` above that, or do without vtw."
            )
        layers = [
            {"k": first + i, "divergence": mean, "largest": most}
            for i, (mean, most) in enumerate(zip(means, worst, strict=True))
        ]
        table = Table(
            "Visual tokens withdrawn at layer K",
            (">K", ">divergence", ">largest", ""),
            [
                (at["k"], f"{at['divergence']:.3g}", f"{at['largest']:.3g}", "chosen" if at["k"] == k else "")
                for at in layers
            ],
            f"Mean and largest of {self.samples} questions: nats between the next token and the full model's.",
        )
        found = {"k": k, "threshold": self.threshold, "questions": self.samples, "layers": layers}
        return Calibration({"": spec_of(Reduction(k=k))}, found, table)


@torch.inference_mode()
def divergences(decoder: Decoder, batch: Batch, first: int) -> Tensor:
    """float64 [layers - first]: of every K from `first` on. batch: one prompt."""
    whole, alone = Layers(decoder, batch), Layers(decoder, batch.text())
    visual, x = batch.index.shape[1], whole.entered
    withdrawn = x[:0, visual:]
    for i in range(decoder.spec.layers):
        if i >= first:
            withdrawn, _ = alone(i, torch.cat([withdrawn, x[:, visual:]]))
        x, _ = whole(i, x)
    full, parts = (torch.log_softmax(decoder.lm_head(decoder.norm(h)).double(), -1) for h in (x, withdrawn))
    return (parts.exp() * (parts - full)).sum(-1)


CALIBRATOR = Vtw
