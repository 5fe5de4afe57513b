"""Scores → the indices of the best, ascending, and those rows of several tensors: one launch.

    index, kept_1, … = token_select<tokens, keep, tensors>(score, x_1, …)

score: float32 [batch, tokens], tokens <= 4096; no NaN. x_i: float32, float16 or int64 [batch, tokens or more, …], rank 2 to 4, at most 8
of them. index: int64 [batch, keep], ascending. kept_i: [batch, keep and what follows the first `tokens` rows of x_i, …].

The rule is that of `graphs._blocks.select`: the largest scores, of equal ones those of lower index (-0 equals 0).

It replaces TopK, the TopK that sorts, and every GatherND by that index, with the Slices and the Concat around it where what follows
the candidates is appended again: that is how a reduction inside the language model drops tokens, of hidden states, positions and
orders alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from plugins._contract import Case, Found, Plugin
from plugins._find import NoMatch, attribute, behind, integer, made, nodes, only_user, part, rank, size, users

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

MOST, TENSORS = 4096, 8


class TokenSelect(Plugin):
    summary = "TopK, its sort, and all gathers by what it chose, in one launch"
    attributes = ("tokens", "keep", "tensors")
    cases = (
        Case([("score", (1, 16)), ("x", (1, 16, 8))], dict(tokens=16, keep=5, tensors=1)),
        Case([("score", (2, 577)), ("x", (2, 600, 20)), ("index", (2, 600))], dict(tokens=577, keep=64, tensors=2)),
        Case([("score", (1, 4096)), ("x", (1, 4100, 3))], dict(tokens=4096, keep=1000, tensors=1)),
        Case([("score", (3, 9)), ("x", (3, 9, 2, 5))], dict(tokens=9, keep=9, tensors=1)),
    )

    def eager(self, inputs: Sequence[Tensor], attributes: Mapping[str, int]) -> list[Tensor]:
        import torch

        from graphs._blocks import select, take

        score, *tensors = inputs
        tokens = attributes["tokens"]
        index = select(score, attributes["keep"])
        return [index, *(torch.cat([take(x[:, :tokens], index), x[:, tokens:]], 1) for x in tensors)]

    def find(self, graph: ir.Graph) -> Iterator[Found]:
        for node in nodes(graph, "TopK"):
            try:
                yield _at(node)
            except NoMatch:
                continue


def _at(sort: ir.Node) -> Found:
    """The selection that ends in a sort."""
    index = sort.outputs[0]
    ranked, k = made(index, "TopK", 2)
    score, count = made(ranked, "TopK", 2)
    tokens, keep = size(score, 1), integer(count)
    best = ranked.producer()
    assert best is not None
    if attribute(index, "largest", 1) != 0 or attribute(ranked, "largest", 1) != 1 or ranked is not best.outputs[1]:
        raise NoMatch
    if any(attribute(v, "axis", -1) not in (-1, 1) for v in (index, ranked)) or rank(score) != 2 or tokens > MOST:
        raise NoMatch
    if integer(k) != keep or any(v.consumers() or v.is_graph_output() for v in (best.outputs[0], sort.outputs[1])):
        raise NoMatch
    if score.dtype is None or score.dtype.name != "FLOAT":
        raise NoMatch
    only_user(ranked, "TopK")
    inputs, outputs = [score], [index]
    for lifted in users(index, "Unsqueeze"):
        if integer(_input(lifted, 1)) not in (-1, 2):
            continue
        for gather in users(lifted.outputs[0], "GatherND"):
            try:
                x, kept = _gathered(gather, tokens)
            except NoMatch:
                continue
            if x not in behind(outputs) and len(inputs) <= TENSORS:  # else it would wait for itself
                inputs.append(x)
                outputs.append(kept)
    if len(inputs) == 1:
        raise NoMatch
    return Found(inputs, outputs, dict(tokens=tokens, keep=keep, tensors=len(inputs) - 1))


def _gathered(gather: ir.Node, tokens: int) -> tuple[ir.Value, ir.Value]:
    """What is gathered from, and what comes out: with what follows, if that is appended again."""
    x, kept = _input(gather, 0), gather.outputs[0]
    if attribute(kept, "batch_dims", 0) != 1 or rank(x) > 4 or size(x, 1) != tokens:
        raise NoMatch
    if x.dtype is None or x.dtype.name not in ("FLOAT", "FLOAT16", "INT64"):
        raise NoMatch
    try:
        whole, axis, start, stop, step = part(x)
        joined = only_user(kept, "Concat").outputs[0]
        first, *rest = made(joined, "Concat")
        if len(rest) != 1 or first is not kept or attribute(joined, "axis", 0) != 1:
            raise NoMatch
        after = part(rest[0])
        if (axis, start, stop, step) != (1, 0, tokens, 1) or after.of is not whole:
            raise NoMatch
        if after[1:3] != (1, tokens) or after.stop < 2**31 - 1 or after.step != 1:
            raise NoMatch
        return whole, joined
    except NoMatch:
        return x, kept


def _input(node: ir.Node, i: int) -> ir.Value:
    value = node.inputs[i]
    if value is None:
        raise NoMatch
    return value


PLUGIN = TokenSelect()
