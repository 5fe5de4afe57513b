"""Methods inside the language model, from their papers, in NumPy; and answers of Hugging Face's decoder layers with what they make
of the visual tokens, everything anew for every token."""

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
from tests.families import tiny
from tests.stages.uncached import Given, Layers, Stays

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Seen:
    """What a method may look at before a layer: visual tokens in front of what is per token, the text behind the image alone.

    hidden: [tokens, dim], what enters the layer. previous: what entered the one before. embeds: [entered, dim], all visual
    tokens as they entered the language model; words: that text. attention: [heads, tokens + text, tokens] of the layer before;
    plain: the same if nothing were rotated. alone: [heads, tokens], the last token's plain attention if it saw visual tokens only, all of
    them.
    ahead, plain_ahead: [heads, tokens], the last token's attention in the layer itself. response: [text, tokens], what the
    rotation makes of ones. queries, keys: [heads, tokens, head_dim] of the layer itself, before the rotation; rotated: the keys
    behind it. size: [tokens]. grid: rows and columns of the tokens that entered. there: which of those the tokens are. salient:
    [entered], the attention of the tower's class token in its last block; None without one.
    """

    hidden: Floats
    previous: Floats
    embeds: Floats
    words: Floats
    attention: Floats
    plain: Floats
    alone: Floats
    ahead: Floats
    plain_ahead: Floats
    response: Floats
    queries: Floats
    keys: Floats
    rotated: Floats
    size: Floats
    grid: tuple[int, int]
    there: list[int]
    salient: Floats | None


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


def chosen(places: list[int], seen: Seen) -> Merged:
    """Nothing is merged."""
    return Merged(np.eye(len(seen.hidden))[places], places, seen.size[places])


def pruned(score: Callable[[Seen], Floats], left: Mapping[int, int]) -> Rule:
    """The best stay. left: how many enter each layer."""
    return lambda layer, seen: chosen(best(score(seen), left[layer]), seen)


def looked_at(rope: bool = True) -> Callable[[Seen], Floats]:
    """arXiv:2403.06764: by the last token, in the layer before."""
    return lambda seen: (seen.attention[:, -1] if rope else seen.alone).mean(0)


def looked_ahead_at(rope: bool = True) -> Callable[[Seen], Floats]:
    """arXiv:2410.17247, arXiv:2505.22654: by the last token, in this layer."""
    return lambda seen: (seen.ahead if rope else seen.plain_ahead).mean(0)


def asked_for(rope: bool) -> Callable[[Seen], Floats]:
    """arXiv:2412.16117: by any token of the question in any head."""
    return lambda seen: (seen.attention if rope else seen.plain)[:, len(seen.hidden) :].max((0, 1))


def feather(left: Mapping[int, int], stride: int) -> Rule:
    """arXiv:2412.13180: first a grid and the best of the others, then the best."""

    def rule(layer: int, seen: Seen) -> Merged:
        score, (rows, cols) = seen.alone.mean(0), seen.grid
        forced = [y * cols + x for y in range(0, rows, stride) for x in range(0, cols, stride)]
        forced = forced if len(score) == rows * cols else []
        rest = [i for i in range(len(score)) if i not in forced]
        more = [rest[i] for i in best(score[rest], left[layer] - len(forced))]
        return chosen(sorted([*forced, *more]), seen)

    return rule


def topv(left: int, recovery: int = 4) -> Rule:
    """arXiv:2503.18278 with the constants of its reimplementation."""

    def rule(layer: int, seen: Seen) -> Merged:
        n, (rows, cols) = len(seen.hidden), seen.grid
        x, y = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (seen.previous, seen.hidden))
        at = np.array([divmod(i, cols) for i in range(n)], float)
        away = np.linalg.norm(at[:, None] - at[None], axis=-1)
        centre = np.linalg.norm(at - [(rows - 1) / 2, (cols - 1) / 2], axis=1)
        far = np.linalg.norm(x[:, None] - y[None], axis=-1)
        plan = np.exp(-(far + 1 - np.exp(-(away**2) / 200) + 0.01 * centre) / 0.1)
        for _ in range(3):
            plan = plan / plan.sum(1, keepdims=True)
            taken = plan.sum(0)
            plan = plan / taken
        count = max(t for t in range(left + 1) if t + math.ceil((n - t) / recovery) <= left)
        first = best(taken, count)
        others = [i for i in range(n) if i not in first]
        return chosen(sorted([*first, *others[::recovery][: left - count]]), seen)

    return rule


def adatp(left: int, frames: int, segments: int, rope: bool = True) -> Rule:
    """arXiv:2505.20100, as `graphs/adatp.py` reads it."""

    def rule(layer: int, seen: Seen) -> Merged:
        score, n = looked_at(rope)(seen), len(seen.hidden)
        each = n // frames
        frame = seen.embeds.reshape(frames, each, -1).mean(1)
        frame = frame / np.linalg.norm(frame, axis=1, keepdims=True)
        begins = best(-np.array([frame[i] @ frame[i - 1] for i in range(1, frames)]), segments - 1)
        segment = [sum(f >= b + 1 for b in begins) for f in range(frames)]
        question = seen.words.mean(0)
        near = frame @ question / np.linalg.norm(question)
        near = (near - near.min()) / (near.max() - near.min())
        share = np.array([sum(1 + near[f] for f in range(frames) if segment[f] == s) for s in range(segments)])
        share = share / share.sum() * left
        quota = np.floor(share).astype(int)
        for s in np.argsort(quota - share, kind="stable")[: left - quota.sum()]:
            quota[s] += 1

        def turn(i: int) -> int:
            """In how many frames of its segment this place is looked at more."""
            rivals = [f * each + i % each for f in range(frames) if segment[f] == segment[i // each]]
            return sum(score[j] > score[i] for j in rivals)

        order = sorted(range(n), key=lambda i: (turn(i), -score[i]))
        stays: list[int] = []
        for s in range(segments):
            stays += [i for i in order if segment[i // each] == s][: quota[s]]
        stays += [i for i in order if i not in stays][: left - len(stays)]
        return chosen(sorted(stays), seen)

    return rule


def mustdrop(left: Mapping[int, int], ratio: float, keys: int) -> Rule:
    """arXiv:2411.10803: dropped is what is below both thresholds, of which the first is `ratio` times the second, and no key token."""

    def rule(layer: int, seen: Seen) -> Merged:
        paid = seen.attention[:, len(seen.hidden) :].mean(0).astype(np.float64)
        share, most = paid.sum(0) / paid.sum(), paid.max(0)
        key = [] if seen.salient is None or not keys else best(seen.salient, keys)
        assert len(key) == keys
        held = np.isin(seen.there, key)
        assert held.sum() == keys, "a key token is gone"
        for threshold in sorted([*share / ratio, *most], reverse=True):
            stays = np.flatnonzero((share >= ratio * threshold) | (most >= threshold) | held)
            if len(stays) >= left[layer]:
                break
        assert len(stays) == left[layer]
        return chosen(stays.tolist(), seen)

    return rule


def raters(seen: Seen) -> npt.NDArray[np.bool_]:
    """arXiv:2410.04417: the words that belong to the image."""
    share = softmax(seen.embeds @ seen.words.T).mean(0)
    found = share > 1 / len(share)
    return found if found.any() else np.ones_like(found)


def sparsevlm_plus(left: Mapping[int, int], heads: int) -> Rule:
    """The second version, in the order of the official code."""

    def rule(layer: int, seen: Seen) -> Merged:
        asked = seen.attention[:, len(seen.hidden) :] / seen.response
        asked = asked[:, raters(seen)]
        loudest = np.argsort(-asked.sum((1, 2)), kind="stable")[:heads]
        return chosen(best(asked[loudest].mean(0).mean(0), left[layer]), seen)

    return rule


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


def ficoco(goes: Mapping[int, int], quantile: float, beta: float = 0.6, gamma: float = 0.6, rope: bool = True) -> Rule:
    """arXiv:2411.17686, inside the language model. goes: how many leave before each layer."""

    def rule(layer: int, seen: Seen) -> Merged:
        n, r = len(seen.hidden), goes[layer]
        rows = (seen.attention if rope else seen.plain).mean(0)
        among, asked = rows[:n], rows[n:]
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


def pact(left: int, share: float, cutoff: float, coef: float = 1.5, rope: bool = True) -> Rule:
    """arXiv:2504.08966: pruned by the mean query, clustered around density peaks of the keys, some of what was pruned recovered."""

    def rule(layer: int, seen: Seen) -> Merged:
        n, (heads, _, width), kv_heads = len(seen.hidden), seen.queries.shape, len(seen.keys)
        attention = np.zeros(n)
        for head in range(heads):
            keys = seen.keys[head * kv_heads // heads]
            attention += softmax(keys @ seen.queries[head].mean(0) / math.sqrt(width)) / heads
        alive = best(attention * np.linalg.norm(seen.hidden, axis=-1), max(left, int(share * n)))
        distance = 1 - cosines((seen.rotated if rope else seen.keys).transpose(1, 0, 2).reshape(n, -1))
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


def sparsevlm(left: Mapping[int, int], rope: bool = True) -> Rule:
    """arXiv:2410.04417, its first version: what the raters look at stays, the best of the rest is clustered."""

    def rule(layer: int, seen: Seen) -> Merged:
        n, count = len(seen.hidden), left[layer]
        score = (seen.attention if rope else seen.plain).mean(0)[n:][raters(seen)].mean(0)
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


def by_kv_head(attention: Tensor, heads: int) -> Floats:
    """[KV heads, …], mean over those that share keys."""
    return attention.unflatten(0, (heads, -1)).mean(1).numpy()


def last_looks_at(keep: int) -> Stays:
    """arXiv:2411.15024, its second stage: by the last token."""
    return lambda attention, visual, heads: [best(attention.mean(0)[-1].numpy(), keep)] * heads


def received(keep: int) -> Stays:
    """arXiv:2406.18139 without merging: by all that was paid, per KV head."""
    return lambda attention, visual, heads: [best(row, keep) for row in by_kv_head(attention, heads).sum(1)]


def sparsemm(capacities: list[int], kernel: int, window: int) -> Stays:
    """arXiv:2506.05344: by the last text tokens, averaged over neighbours; on the documented grid, as sums with a neighbour that
    gets nearly nothing are nearly equal."""

    def rule(attention: Tensor, visual: list[int], heads: int) -> list[list[int]]:
        text = [p for p in range(attention.shape[1]) if p not in visual][-window:]
        rows = by_kv_head(attention[:, text], heads).mean(1)
        pooled = [np.convolve(row, np.ones(kernel) / kernel, "same") for row in rows]
        grid = 4096 * len(visual)
        return [best(np.round(row * grid), count) for row, count in zip(pooled, capacities, strict=True)]

    return rule


@torch.no_grad()
def answer(
    model: Any, asked: tiny.Question, ours: Generator, rules: Mapping[int, Rule], length: int, *, counted: bool = False,
    compact: bool = False, since: int | None = None,
) -> tuple[list[int], dict[int, Merged]]:  # fmt: skip
    """`length` greedy tokens, and what became of the visual tokens before each layer in `rules`.

    Args:
        counted: whether a merged token counts in later layers' attention as often as its size says. compact: from there on
            positions are counted anew. since: in this layer and all behind it what is behind the prompt sees no token that goes
            before any of them.
    """
    stack, given = Layers(model), Given.of(model, asked, ours)
    embeds, positions, visual = given.embeds, given.positions, given.visual
    salient, last = salience(model, asked), visual
    tokens: list[int] = []
    merged: dict[int, Merged] = {}
    while len(tokens) < length:
        seq = embeds.shape[1]
        order, places, present, size = torch.arange(seq), positions, visual, torch.ones(seq)
        x = first = stack.entering(embeds, places)
        before: tuple[Any, ...] = ()
        for i in range(len(stack)):
            if i in rules:
                at = [order.tolist().index(p) for p in present]
                if not tokens:
                    bias = size.log() if counted else None
                    words = first[0, max(visual) + 1 :].numpy()
                    seen = look(stack, i, at, before, (x, places, order, bias), first[0, visual].numpy(), words, size)
                    there = [visual.index(p) for p in present]
                    merged[i] = rules[i](i, seen(ours.graphs.visual.grid, there, salient))
                made = merged[i]
                x, size = x.clone(), size.clone()
                heirs = [at[p] for p in made.places]
                x[0, heirs] = torch.from_numpy(made.weight).to(x.dtype) @ x[0, at]
                size[heirs] = torch.from_numpy(made.size).to(size.dtype)
                stays = [n for n in range(len(order)) if n not in at or n in heirs]
                x, size, order, places = x[:, stays], size[stays], order[stays], places[..., stays]
                present = [present[p] for p in made.places]
                if compact:
                    places = torch.arange(len(stays))[None]
            entered, bias = x, size.log() if counted else None
            lost = [p for p in visual if tokens and since is not None and i >= since and p not in last]
            unseen = (order >= given.prompt)[:, None] & torch.isin(order, torch.tensor(lost))
            x, attention = stack.run(i, x, places, order, bias, unseen[None])
            before = entered, attention, places, order, bias
            x = given.later(x, i, present, [order.tolist().index(p) for p in present])
        last = present
        tokens.append(stack.next(x))
        embeds, positions = given.longer(stack, embeds, positions, tokens[-1])
    return tokens, merged


def salience(model: Any, asked: tiny.Question) -> Floats | None:
    """[entered], what the class token pays every patch in the last block of Hugging Face's CLIP, mean over heads."""
    tower = getattr(model.model, "vision_tower", None)
    if tower is None or tower.config.model_type != "clip_vision_model":
        return None
    found = tower(torch.from_numpy(asked.pixels)[:, 0], output_attentions=True).attentions[-1]
    return np.asarray(found[0, :, 0, 1:].mean(0))


def look(
    stack: Layers, layer: int, at: list[int], before: tuple[Any, ...], now: tuple[Any, ...], embeds: Floats, words: Floats,
    size: Tensor,
) -> Callable[[tuple[int, int], list[int], Floats | None], Seen]:  # fmt: skip
    """What there is to see before a layer, but for what it is told: the grid, which tokens are there, what CLS looks at.

    Args:
        at: where the visual tokens are. before: what entered the layer before, its attention, positions, order and bias. now:
            what enters this one, positions, order and bias.
    """
    x, places, order, bias = now
    entered, attention, old_places, old_order, old_bias = before
    rows = [*at, *range(len(order) - len(words), len(order))]
    plain = stack.plain(layer - 1, entered, old_places, old_order, old_bias)
    everything = stack.plain(layer - 1, entered, old_places, torch.zeros_like(old_order), old_bias)  # beyond any window
    q, k, turned = (part[:, at].numpy() for part in stack.projected(layer, x, places))
    rotary, width = stack.rotary(layer - 1, x, places), q.shape[-1]
    ones = np.ones((len(order), width))
    if rotary is not None:
        cos, sin = (part[0].numpy() for part in rotary)
        ones = cos + np.repeat([-1, 1], width // 2) * sin
    response = ones @ ones.T / (ones[0] @ ones[0])

    def shown(grid: tuple[int, int], there: list[int], salient: Floats | None) -> Seen:
        return Seen(
            hidden=x[0, at].numpy(), previous=entered[0, at].numpy(), embeds=embeds, words=words,
            attention=attention[:, rows][..., at].numpy(), plain=plain.softmax(-1)[:, rows][..., at].numpy(),
            alone=everything[:, -1, at].softmax(-1).numpy(), ahead=stack.run(layer, x, places, order, bias)[1][:, -1, at].numpy(),
            plain_ahead=stack.plain(layer, x, places, order, bias).softmax(-1)[:, -1, at].numpy(),
            response=response[rows[len(at) :]][:, at], queries=q, keys=k, rotated=turned, size=size[at].numpy(), grid=grid,
            there=there, salient=salient,
        )  # fmt: skip

    return shown


@torch.no_grad()
def answer_from_merged_cache(model: Any, asked: tiny.Question, ours: Generator, keep: int, length: int) -> list[int]:
    """`length` greedy tokens from Hugging Face's own cache, in which LOOK-M (arXiv:2406.18139) merged the visual tokens of every KV
    head around the `keep` that got most attention."""
    stack, given = Layers(model), Given.of(model, asked, ours)
    visual, positions = given.visual, given.positions
    planes = {}
    if given.planes:
        where = torch.isin(torch.arange(given.prompt), torch.tensor(visual))[None]
        planes = {"visual_pos_masks": where, "deepstack_visual_embeds": given.planes}
    found = model.model.language_model(
        inputs_embeds=given.embeds, position_ids=positions, use_cache=True, output_attentions=True, **planes
    )
    tokens = [int(model.lm_head(found.last_hidden_state[:, -1]).argmax())]
    cache = found.past_key_values
    for layer, attention in zip(cache.layers, found.attentions, strict=True):
        kv_heads = layer.keys.shape[1]
        received = attention[0].sum(1).unflatten(0, (kv_heads, -1)).mean(1)[:, visual].numpy()
        pairs = [merged_pair(layer.keys[0, h], layer.values[0, h], visual, received[h], keep) for h in range(kv_heads)]
        layer.keys, layer.values = (torch.stack(part)[None] for part in zip(*pairs, strict=True))
    while len(tokens) < length:
        _, positions = given.longer(stack, given.embeds, positions, tokens[-1])
        found = model.model.language_model(
            inputs_embeds=stack.embed(tokens[-1:]), past_key_values=cache, position_ids=positions[..., -1:], use_cache=True,
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
