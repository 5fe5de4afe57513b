"""Methods that merge tokens inside the language model, from their papers, in NumPy; and answers of Hugging Face's decoder layers
with what they make of the visual tokens, everything anew for every token."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from exporter.runtime.generate import Generator
from tests.families import hugging_face, tiny
from tests.stages.uncached import Layers

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Seen:
    """What a method may look at before a layer: visual tokens in front of what is per token, the text behind the image alone.

    hidden: [tokens, dim], what enters the layer. embeds: what entered the language model, of these tokens; words: of that text.
    attention: [tokens + text, tokens] of the layer before, mean over heads. queries, keys: [heads, tokens, head_dim] of the layer
    itself, before the rotation; rotated: the keys behind it. size: [tokens].
    """

    hidden: Floats
    embeds: Floats
    words: Floats
    attention: Floats
    queries: Floats
    keys: Floats
    rotated: Floats
    size: Floats


@dataclass(frozen=True)
class Merged:
    """weight: [left, tokens], what of every token is in each that is left. places: whose place those take, ascending."""

    weight: Floats
    places: list[int]
    size: Floats


Rule = Callable[[int, Seen], Merged]


def best(scores: Floats, count: int) -> list[int]:
    """The largest, ascending by place; of equals the earlier."""
    return sorted(np.argsort(-scores, kind="stable")[:count].tolist())


def cosines(x: Floats) -> Floats:
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return unit @ unit.T


def softmax(x: Floats) -> Floats:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def llavolta(left: int) -> Rule:
    """arXiv:2406.20092: runs of neighbours become their mean, at their middle."""

    def rule(layer: int, seen: Seen) -> Merged:
        n = len(seen.hidden)
        weight, places = np.zeros((left, n)), []
        for i in range(left):
            run = range(math.floor(i * n / left), math.floor((i + 1) * n / left))
            weight[i, run] = 1 / len(run)
            places.append(run[(len(run) - 1) // 2])
        return Merged(weight, places, (weight > 0) @ seen.size)

    return rule


def ficoco(goes: Mapping[int, int], quantile: float, beta: float = 0.6, gamma: float = 0.6) -> Rule:
    """arXiv:2411.17686, inside the language model. goes: how many leave before each layer."""

    def rule(layer: int, seen: Seen) -> Merged:
        n, r = len(seen.hidden), goes[layer]
        among, asked = seen.attention[:n], seen.attention[n:]
        redundant = beta * among.mean(0) - (1 - beta) * asked.mean(0)
        out = best(redundant, r)
        stays = [i for i in range(n) if i not in out]
        correlation = gamma * (among + among.T) + (1 - gamma) * asked.T @ asked
        targets = min(max(1, math.ceil(round((1 - quantile) * n, 9))), n - r)
        weight = np.zeros((n - r, n))
        for row, i in enumerate(stays):
            weight[row, i] = 1
        for i in out:
            order = np.argsort(-correlation[i, stays], kind="stable")[:targets]
            share = np.round(softmax(correlation[i, stays][order]) * 256) / 256
            share[0] += 1 - share.sum()
            weight[order, i] = share
        size = weight @ seen.size
        return Merged(weight / weight.sum(1, keepdims=True), stays, size)

    return rule


def pact(left: int, share: float, cutoff: float, coef: float = 1.5) -> Rule:
    """arXiv:2504.08966: pruned by the mean query, clustered around density peaks of the keys, some of what was pruned recovered."""

    def rule(layer: int, seen: Seen) -> Merged:
        n, (heads, _, width), kv_heads = len(seen.hidden), seen.queries.shape, len(seen.keys)
        attention = np.zeros(n)
        for head in range(heads):
            keys = seen.keys[head * kv_heads // heads]
            attention += softmax(keys @ seen.queries[head].mean(0) / math.sqrt(width)) / heads
        alive = best(attention * np.linalg.norm(seen.hidden, axis=-1), max(left, int(share * n)))
        distance = 1 - cosines(seen.rotated.transpose(1, 0, 2).reshape(n, -1))
        d = distance[np.ix_(alive, alive)]
        density = np.exp(-((d / 2) ** 2)).sum(1)
        delta = np.empty(len(alive))
        for a in range(len(alive)):
            denser = [b for b in range(len(alive)) if (density[b], -b) > (density[a], -a)]
            delta[a] = d[a, denser].min() if denser else d.max()
        centres = [alive[a] for a in best(density * delta, left)]
        member = np.zeros((left, n))
        for i in range(n):
            if i in centres:
                member[centres.index(i), i] = 1
            else:
                nearest = int(distance[i, centres].argmin())
                member[nearest, i] = i in alive or distance[i, centres[nearest]] <= coef * cutoff
        weight = member * seen.size
        return Merged(weight / weight.sum(1, keepdims=True), centres, weight.sum(1))

    return rule


def sparsevlm(left: Mapping[int, int]) -> Rule:
    """arXiv:2410.04417, its first version: what the raters look at stays, the best of the rest is clustered."""

    def rule(layer: int, seen: Seen) -> Merged:
        n, count = len(seen.hidden), left[layer]
        share = softmax(seen.embeds @ seen.words.T).mean(0)
        raters = share > 1 / len(share)
        score = seen.attention[n:][raters if raters.any() else slice(None)].mean(0)
        for kept in reversed(range(1, n + 1)):
            again = 3 * (n - kept) // 10 + 1
            clusters = again // 10 + 1 if kept < n else 0
            if kept + clusters <= count:
                break
        assert kept + clusters == count, "counts at which the publication's own arithmetic comes out"
        stays = best(score, kept)
        rest = [i for i in range(n) if i not in stays]
        again_ = [rest[i] for i in best(score[rest], again)] if clusters else []
        weight = {i: np.eye(n)[i] for i in stays}
        for centre, group in density_peaks(seen.hidden[again_], clusters):
            row = np.zeros(n)
            row[[again_[i] for i in group]] = 1 / len(group)
            weight[again_[centre]] = row
        places = sorted(weight)
        rows = np.stack([weight[i] for i in places])
        return Merged(rows, places, (rows > 0) @ seen.size)

    return rule


def density_peaks(x: Floats, clusters: int) -> list[tuple[int, list[int]]]:
    """Centre and members of every cluster, as many neighbours as clusters (DPC-kNN, as the official code has it)."""
    if not clusters:
        return []
    d = np.linalg.norm(x[:, None] - x[None], axis=-1) / math.sqrt(x.shape[1])
    density = np.exp(-(np.sort(d, 1)[:, :clusters] ** 2).mean(1))
    delta = np.empty(len(x))
    for a in range(len(x)):
        denser = [b for b in range(len(x)) if (density[b], -b) > (density[a], -a)]
        delta[a] = d[a, denser].min() if denser else d.max()
    centres = best(density * delta, clusters)
    owner = [centres.index(i) if i in centres else int(d[i, centres].argmin()) for i in range(len(x))]
    return [(centre, [i for i in range(len(x)) if owner[i] == c]) for c, centre in enumerate(centres)]


@torch.no_grad()
def answer(
    model: Any, asked: tiny.Question, ours: Generator, rules: Mapping[int, Rule], length: int, *, counted: bool = False,
    compact: bool = False,
) -> tuple[list[int], dict[int, Merged]]:  # fmt: skip
    """`length` greedy tokens, and what became of the visual tokens before each layer in `rules`.

    Args:
        counted: whether a merged token counts in later layers' attention as often as its size says. compact: from there on
            positions are counted anew.
    """
    stack = Layers(model)
    ids = hugging_face.arguments(asked, ours.graphs)["input_ids"][0].tolist()
    visual = [p for p, token in enumerate(ids) if token == ours.graphs.text.image_token]
    embeds = stack.embed(ids)
    embeds[:, visual] = torch.from_numpy(ours.reduce(ours.vision(asked.pixels)).embeds)
    tokens: list[int] = []
    merged: dict[int, Merged] = {}
    while len(tokens) < length:
        order, places = torch.arange(embeds.shape[1]), torch.arange(embeds.shape[1])[None]
        x = first = stack.entering(embeds, places)
        size = torch.ones(embeds.shape[1])
        attention = torch.empty(0)
        present = visual
        for i in range(len(stack)):
            if i in rules:
                at = [order.tolist().index(p) for p in present]
                behind = [n for n, p in enumerate(order.tolist()) if p > max(visual)]
                if not tokens:
                    q, k, turned = (part[:, at].numpy() for part in stack.projected(i, x, places))
                    rows = attention.mean(0)[[*at, *behind]][:, at].numpy()
                    merged[i] = rules[i](
                        i,
                        Seen(
                            x[0, at].numpy(), first[0, present].numpy(), first[0, max(visual) + 1 :].numpy(), rows, q, k, turned,
                            size[at].numpy(),
                        ),
                    )  # fmt: skip
                made = merged[i]
                x, size = x.clone(), size.clone()
                heirs = [at[p] for p in made.places]
                x[0, heirs] = torch.from_numpy(made.weight).to(x.dtype) @ x[0, at]
                size[heirs] = torch.from_numpy(made.size).to(size.dtype)
                stays = [n for n in range(len(order)) if n not in at or n in heirs]
                x, size, order, places = x[:, stays], size[stays], order[stays], places[:, stays]
                present = [present[p] for p in made.places]
                if compact:
                    places = torch.arange(len(stays))[None]
            x, attention = stack.run(i, x, places, order, size.log() if counted else None)
        tokens.append(stack.next(x))
        embeds = torch.cat([embeds, stack.embed(tokens[-1:])], 1)
    return tokens, merged


@torch.no_grad()
def answer_from_merged_cache(model: Any, asked: tiny.Question, ours: Generator, keep: int, length: int) -> list[int]:
    """`length` greedy tokens from Hugging Face's own cache, in which LOOK-M (arXiv:2406.18139) merged the visual tokens of every KV
    head around the `keep` that got most attention."""
    stack = Layers(model)
    ids = hugging_face.arguments(asked, ours.graphs)["input_ids"][0].tolist()
    visual = [p for p, token in enumerate(ids) if token == ours.graphs.text.image_token]
    embeds = stack.embed(ids)
    embeds[:, visual] = torch.from_numpy(ours.reduce(ours.vision(asked.pixels)).embeds)
    found = model.model.language_model(inputs_embeds=embeds, use_cache=True, output_attentions=True)
    tokens = [int(model.lm_head(found.last_hidden_state[:, -1]).argmax())]
    cache = found.past_key_values
    for layer, attention in zip(cache.layers, found.attentions, strict=True):
        kv_heads = layer.keys.shape[1]
        received = attention[0].sum(1).unflatten(0, (kv_heads, -1)).mean(1)[:, visual].numpy()
        pairs = [merged_pair(layer.keys[0, h], layer.values[0, h], visual, received[h], keep) for h in range(kv_heads)]
        layer.keys, layer.values = (torch.stack(part)[None] for part in zip(*pairs, strict=True))
    while len(tokens) < length:
        place = torch.tensor([[len(ids) + len(tokens) - 1]])
        found = model.model.language_model(
            inputs_embeds=stack.embed(tokens[-1:]), past_key_values=cache, position_ids=place, use_cache=True,
            attention_mask=torch.ones(1, cache.get_seq_length() + 1, dtype=torch.long),
        )  # fmt: skip
        tokens.append(int(model.lm_head(found.last_hidden_state[:, -1]).argmax()))
    return tokens


def merged_pair(keys: Tensor, values: Tensor, visual: list[int], score: Floats, keep: int) -> tuple[Tensor, Tensor]:
    """Keys and values [tokens, head_dim] of one head, pivots merged."""
    kept = [visual[i] for i in best(score, keep)]
    alike = cosines(keys.numpy().astype(np.float64))
    pivots: dict[int, list[int]] = {p: [] for p in kept}
    for p in visual:
        if p not in kept:
            pivots[kept[int(alike[p, kept].argmax())]].append(p)
    stays = [p for p in range(len(keys)) if p not in visual or p in kept]

    def merge(x: Tensor) -> Tensor:
        out = x.clone()
        for p, came in pivots.items():
            out[p] = torch.stack([x[p], *((x[p] + x[c]) / 2 for c in came)]).mean(0)
        return out[stays]

    return merge(keys), merge(values)
