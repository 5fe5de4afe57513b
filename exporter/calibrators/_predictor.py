"""DyRate's classifier as it is trained: Gumbel-softmax over the rates, masks over the ranked visual tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporter.calibrators._rollout import Batch, Layers, Rollout
from exporter.nn.cuts import group_shares
from exporter.plan import Plan
from exporter.stages._task import Question
from exporter.workspace import write_bytes
from graphs._contract import Site
from graphs.dyrate import DyRate

Log = Callable[[str], None]
Keep = Callable[[Tensor, Tensor], Tensor]
"""(shares [batch, steps, 4], rank of every visual token int64 [batch, steps, tokens], 0 for the one looked at most) → how
much of each visual token a step sees: float32 [batch, steps, tokens], 0 to 1."""


class Dropping(Rollout):
    """A model whose steps see fewer visual tokens from a layer on, which is at least 1."""

    def __init__(self, plan: Plan, layer: int) -> None:
        super().__init__(plan)
        self.layer = layer

    def run(self, batch: Batch, keep: Keep) -> Tensor:
        """Logits [batch, steps, vocab]. Steps see of each visual token what `keep` says, from the layer on."""
        decoder, spec = self.decoder, self.decoder.spec
        steps, seq = batch.labels.shape[1], batch.order.shape[1]
        layers = Layers(decoder, batch)
        x = layers.entered
        hidden: Tensor | None = None
        for i in range(spec.layers):
            x, seen = layers(i, x, hidden)
            if i == self.layer - 1:
                rows = seen.whole_rows(seen.q, seen.k, slice(seq - steps, seq)).mean((1, 2))
                part = keep(group_shares(rows, batch.order, batch.starts), _ranks(rows[..., : self.visual]))
                hidden = torch.zeros(len(x), 1, seq, seq)
                hidden[:, 0, seq - steps :, : self.visual] = torch.log(part.clamp_min(1e-9))
                hidden = hidden.repeat(1, 1, spec.heads // spec.kv_heads, 1)
        out: Tensor = decoder.lm_head(decoder.norm.every(x[:, -steps:]))
        return out


def _ranks(rows: Tensor) -> Tensor:
    """The place of every token, the highest score being 0; among equals the earlier first."""
    order: Tensor = rows.argsort(stable=True, dim=-1, descending=True)
    return order.argsort(-1)


class Predictor(nn.Module):
    """Shares of attention → rate, step by step. The same mathematics as `graphs.dyrate`, whose `predict` it calls.

    Args:
        rates: K. state: width of the GRU, 0 for the linear classifier.
    """

    def __init__(self, rates: int, state: int, seed: int = 0) -> None:
        super().__init__()
        self.method = DyRate(weights="-", rates=rates, state=state)
        draw = torch.Generator().manual_seed(seed)
        for name, shape in self.method.trained(Site(1)).items():
            start = torch.randn(shape, generator=draw) * shape[0] ** -0.5 if len(shape) == 2 else torch.zeros(shape)
            self.register_parameter(name, nn.Parameter(start))

    def forward(self, shares: Tensor, real: Tensor) -> Tensor:
        """Logits [batch, steps, K]; shares [batch, steps, 4]; real: bool [batch, steps]."""
        signals = dict(self.named_parameters())
        if not self.method.state:
            return self.method.predict(signals | {"shares": shares})[0]
        state, logits = torch.zeros(len(shares), self.method.state), []
        for step in range(shares.shape[1]):
            out, new = self.method.predict(signals | {"shares": shares[:, step], "state": state})
            assert new is not None
            state = torch.where(real[:, step, None], new, state)
            logits.append(out)
        return torch.stack(logits, 1)

    def kept(self, visual: int) -> Tensor:
        """int64 [K]: visual tokens that stay at each rate."""
        return torch.tensor([visual - rate * visual // self.method.rates for rate in range(self.method.rates)])

    def dumped(self) -> bytes:
        """Its tensors as a safetensors file."""
        from safetensors.torch import save

        found: bytes = save({name: p.detach().contiguous() for name, p in self.named_parameters()})
        return found

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, self.dumped())


@dataclass(frozen=True)
class Recipe:
    """cost: weight of the mean share of visual tokens kept, against the answer's cross-entropy. temperature: of the
    Gumbel-softmax, falling to a fifth."""

    steps: int = 300
    batch: int = 16
    rate: float = 3e-2
    cost: float = 0.5
    temperature: float = 1.0
    seed: int = 0


def train(
    rollout: Dropping, predictor: Predictor, questions: Sequence[Question], recipe: Recipe, log: Log = lambda text: None
) -> None:
    """End to end through the frozen model: p = Gumbel-softmax(logits); a step sees Σ p_i · M_i of each visual token, where
    M_i keeps the best of rate i in the step's own ranking."""
    torch.manual_seed(recipe.seed)
    counts = predictor.kept(rollout.visual)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=recipe.rate)
    for step in range(recipe.steps):
        first = step * recipe.batch % len(questions)
        chosen = [questions[(first + i) % len(questions)] for i in range(recipe.batch)]
        batch = rollout.batch(chosen)
        heat = recipe.temperature * 0.2 ** (step / recipe.steps)
        share: list[Tensor] = []

        def keep(
            shares: Tensor, ranks: Tensor, batch: Batch = batch, heat: float = heat, out: list[Tensor] = share
        ) -> Tensor:
            p = F.gumbel_softmax(predictor(shares, batch.real), tau=heat)
            out.append((p @ counts.float() / rollout.visual)[batch.real].mean())
            return torch.einsum("bsk,bsvk->bsv", p, (ranks[..., None] < counts).float())

        logits = rollout.run(batch, keep)
        wrong = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
        loss = wrong + recipe.cost * share[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 19:
            log(
                f"step {step + 1} of {recipe.steps}: cross-entropy {wrong.item():.4f}, kept {100 * share[0].item():.1f} %"
            )


@dataclass(frozen=True)
class Found:
    """What a predictor does on questions, every step ranking the whole image anew, as in the paper.

    right: share of answers whose every token is right. kept: per step, mean visual tokens that the argmax rate keeps;
    most: the highest such count; answers: how many answers are that long. shares: per step, mean shares of attention.
    """

    right: float
    kept: list[float]
    most: list[int]
    answers: list[int]
    shares: list[list[float]]


@torch.inference_mode()
def measure(rollout: Dropping, predictor: Predictor | None, questions: Sequence[Question], batch: int = 32) -> Found:
    """By the most likely rate of every step; None keeps everything."""
    counts = torch.tensor([rollout.visual]) if predictor is None else predictor.kept(rollout.visual)
    right, kept, seen = 0, [], []
    for first in range(0, len(questions), batch):
        part = rollout.batch(questions[first : first + batch])
        notes: list[tuple[Tensor, Tensor]] = []

        def keep(shares: Tensor, ranks: Tensor, part: Batch = part, out: list[tuple[Tensor, Tensor]] = notes) -> Tensor:
            zero = torch.zeros(shares.shape[:2], dtype=torch.int64)
            count = counts[zero if predictor is None else predictor(shares, part.real).argmax(-1)]
            out.append((count, shares))
            return (ranks < count[..., None]).float()

        found = rollout.run(part, keep).argmax(-1)
        right += int(((found == part.labels) | ~part.real).all(1).sum())
        (count, shares) = notes[0]
        for row in range(len(found)):
            kept.append(count[row, part.real[row]].tolist())
            seen.append(shares[row, part.real[row]].tolist())
    longest = max(map(len, kept))
    at = [[row[step] for row in kept if step < len(row)] for step in range(longest)]
    looked = [[row[step] for row in seen if step < len(row)] for step in range(longest)]
    return Found(
        right / len(questions), [sum(c) / len(c) for c in at], [max(c) for c in at], [len(c) for c in at],
        [[sum(group) / len(step) for group in zip(*step, strict=True)] for step in looked],
    )  # fmt: skip
