"""One round of ToMe's bipartite matching and size-weighted merge (arXiv:2210.09461).

    tokens, index, new_size = token_merge<r, protected>(metric, hidden, size)

metric: float32 or float16 [batch, n, depth], 2 <= n <= 4096. hidden: float32 or float16 [batch, n, dim]. size: float32 [batch, n], positive.
tokens: [batch, n - r, dim]: the even tokens that stay, then all odd ones, with what was merged into them. index: int64 [batch, n - r],
where each was. new_size: float32 [batch, n - r].

The rule is that of `graphs._bipartite`: cosines snapped to a grid, the earlier partner among equals, the r even tokens with the
best partner go, the earlier among equals, the first `protected` ones never. Sums in float32, always in the same order.

It replaces what `match` and `merge` draw, about 50 nodes with a product of one-hot rows in the middle. Cosines are computed in float32;
TensorRT may take TF32 for the subgraph, whose choice then differs where two are close.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from plugins._contract import Case, Found, Plugin
from plugins._find import NoMatch, attribute, integer, is_made, made, nodes, number, part, rank, size, uncast, users

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

MOST = 4096
SNAP, NEVER = 4096.0, -1e9  # graphs/_blocks.py, graphs/_bipartite.py


class TokenMerge(Plugin):
    summary = "one round of ToMe: match, and merge weighted by size"
    attributes = ("r", "protected")
    cases = (
        Case([("metric", (1, 17, 12)), ("x", (1, 17, 8)), ("size", (1, 17))], dict(r=4, protected=1)),
        Case([("metric", (2, 64, 16)), ("x", (2, 64, 20)), ("size", (2, 64))], dict(r=32, protected=0)),
        Case([("metric", (1, 197, 64)), ("x", (1, 197, 48)), ("size", (1, 197))], dict(r=16, protected=1)),
        Case([("metric", (1, 3, 5)), ("x", (1, 3, 2)), ("size", (1, 3))], dict(r=2, protected=0)),
    )

    def eager(self, inputs: Sequence[Tensor], attributes: Mapping[str, int]) -> list[Tensor]:
        from graphs._bipartite import match, merge

        metric, hidden, size = inputs
        out = merge(hidden, size, match(metric, attributes["r"], attributes["protected"]))
        assert out.size is not None
        return [out.tokens, out.index, out.size]

    def find(self, graph: ir.Graph) -> Iterator[Found]:
        for node in nodes(graph, "Concat"):
            try:
                yield _at(node.outputs[0])
            except NoMatch:
                continue


def _at(tokens: ir.Value) -> Found:
    """The round that returns these tokens."""
    stay, gone = made(tokens, "Concat", 2)
    if attribute(tokens, "axis", 0) != 1:
        raise NoMatch
    merged = made(gone, "Cast")[0] if is_made(gone, "Cast") else gone
    total, divisor = made(merged, "Div", 2)
    new_odd_size, axis = made(divisor, "Unsqueeze", 2)
    own, added = made(total, "Add", 2)
    into, sources = made(added, "MatMul", 2)
    weighted = _every_other(own, 1)
    going_weighted, goes = _taken(sources)
    if number(axis) not in (-1, 2) or _every_other(going_weighted, 0) is not weighted:
        raise NoMatch
    floats, weights = made(weighted, "Mul", 2)
    new_size, _ = made(weights, "Unsqueeze", 2)
    hidden, sizes = uncast(floats), new_size
    staying, stays = _taken(stay)
    if _every_other(staying, 0) is not hidden or rank(hidden) != 3 or rank(sizes) != 2:
        raise NoMatch
    _check_size(new_odd_size, sizes, into, goes)
    metric, r, protected = _match(_partner(into, goes, size(hidden, 1) // 2), goes)
    n = size(hidden, 1)
    if n > MOST or size(metric, 1) != n or rank(metric) != 3:
        raise NoMatch
    _check_stays(stays, goes, n - n // 2, r)
    found_size = _concat_with(new_odd_size, lambda v: _is_taken(v, sizes, stays))
    found_index = _index(stays)
    return Found([metric, hidden, sizes], [tokens, found_index, found_size], dict(r=r, protected=protected))


def _every_other(value: ir.Value, start: int) -> ir.Value:
    """What a value is every second of, along axis 1."""
    of, axis, found, stop, step = part(value)
    if (axis, found, step) != (1, start, 2) or stop < 2**31 - 1:
        raise NoMatch
    return of


def _taken(value: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(x, index) of a gather along axis 1."""
    x, lifted = made(value, "GatherND", 2)
    index, axis = made(lifted, "Unsqueeze", 2)
    if attribute(value, "batch_dims", 0) != 1 or number(axis) not in (-1, 2):
        raise NoMatch
    return x, index


def _is_taken(value: ir.Value, sizes: ir.Value, stays: ir.Value) -> bool:
    try:
        x, index = _taken(value)
        return index is stays and _every_other(x, 0) is sizes
    except NoMatch:
        return False


def _check_size(new: ir.Value, sizes: ir.Value, into: ir.Value, goes: ir.Value) -> None:
    """size of the odd tokens + into @ size of those that go"""
    own, added = made(new, "Add", 2)
    product = made(added, "Squeeze")[0]
    same, column = made(product, "MatMul", 2)
    x, index = _taken(made(column, "Unsqueeze")[0])
    if same is not into or index is not goes or _every_other(own, 1) is not sizes or _every_other(x, 0) is not sizes:
        raise NoMatch


def _partner(into: ir.Value, goes: ir.Value, odd: int) -> ir.Value:
    """The partners of all even tokens, from the one-hot rows of those that go."""
    (cast,) = made(into, "Transpose", 1)
    (equal,) = made(cast, "Cast", 1)
    column, numbers = made(equal, "Equal", 2)
    if numbers.const_value is None or list(numbers.const_value.numpy().reshape(-1)) != list(range(odd)):
        raise NoMatch
    all_partners, index = _taken(made(column, "Unsqueeze")[0])
    if index is not goes:
        raise NoMatch
    return all_partners


def _match(partners: ir.Value, goes: ir.Value) -> tuple[ir.Value, int, int]:
    """(metric, r, protected) of a matching."""
    first = made(partners, "Squeeze")[0]
    similarity, one = made(first, "TopK", 2)
    ranked, k = made(goes, "TopK", 2)
    best, r = made(ranked, "TopK", 2)
    largest = [attribute(v, "largest", 1) for v in (first, goes, ranked)]
    if integer(one) != 1 or integer(k) != integer(r) or largest != [1, 0, 1]:
        raise NoMatch
    protected = 0
    if is_made(best, "Where"):
        mask, never, best = made(best, "Where", 3)
        if mask.const_value is None or number(never) != NEVER:
            raise NoMatch
        flags = mask.const_value.numpy().reshape(-1)
        protected = int(flags.sum())
        if not flags[:protected].all():
            raise NoMatch
    if made(best, "ReduceMax")[0] is not similarity:
        raise NoMatch
    (scaled,) = made(similarity, "Round", 1)
    cosine, snap = made(scaled, "Mul", 2)
    even, transposed = made(cosine, "MatMul", 2)
    (odd,) = made(transposed, "Transpose", 1)
    unit = _every_other(even, 0)
    if number(snap) != SNAP or _every_other(odd, 1) is not unit:
        raise NoMatch
    metric, length = made(unit, "Div", 2)
    (clipped,) = made(length, "Sqrt", 1)
    squares = made(made(clipped, "Clip")[0], "ReduceSum")[0]
    base, exponent = made(squares, "Pow", 2)
    if base is not metric or number(exponent) != 2:
        raise NoMatch
    return uncast(metric), integer(r), protected


def _check_stays(stays: ir.Value, goes: ir.Value, even: int, r: int) -> None:
    """That those which stay are the complement, as `graphs._blocks.complement` draws it."""
    numbers, counted = made(stays, "Add", 2)
    (below,) = made(made(counted, "ReduceSum")[0], "Cast", 1)
    shifted, _ = made(below, "LessOrEqual", 2)
    index, _ = made(made(shifted, "Unsqueeze")[0], "Sub", 2)
    if index is not goes or numbers.const_value is None:
        raise NoMatch
    if list(numbers.const_value.numpy().reshape(-1)) != list(range(even - r)):
        raise NoMatch


def _concat_with(second: ir.Value, fits: object) -> ir.Value:
    """The Concat whose second part is this, and whose first one fits."""
    assert callable(fits)
    for node in users(second, "Concat"):
        first, *rest = [v for v in node.inputs if v is not None]
        if rest == [second] and fits(first):
            return node.outputs[0]
    raise NoMatch


def _index(stays: ir.Value) -> ir.Value:
    """2 * stays, then the odd numbers."""
    for node in users(stays, "Mul"):
        doubled = node.outputs[0]
        for joined in users(doubled, "Concat"):
            first, *rest = [v for v in joined.inputs if v is not None]
            if first is doubled and len(rest) == 1:
                rows = made(rest[0], "Expand")[0] if is_made(rest[0], "Expand") else rest[0]
                if rows.const_value is not None:
                    odd = rows.const_value.numpy()
                    if (odd == np.arange(1, 2 * odd.shape[-1], 2)).all():
                        return joined.outputs[0]
    raise NoMatch


PLUGIN = TokenMerge()
