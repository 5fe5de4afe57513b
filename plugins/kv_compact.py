"""The keys and values of a KV group without the visual tokens that go: one launch for all layers.

    left_1, … = kv_compact<tokens, keep, tensors>(index, cache_1, …)

index: int64 [batch, keep], or [batch, kv_heads, keep] where heads keep tokens of their own; -1 is token 0. cache_i: float32 or float16
[batch, kv_heads, past, head_dim], all alike, `tokens` visual tokens in front; at most 128. left_i: [batch, kv_heads,
past - tokens + keep, head_dim]: what the index names, then all that follows the visual tokens.

*In place*: called with outputs that are the inputs, the kernel keeps every head's tokens where they begin (so the cache is used as one
of capacity `past`), which needs an index that ascends and has no -1. TensorRT's own outputs are never the inputs.

It replaces what `exporter.nn.cuts.prune_cache` draws: Slice, Reshape, GatherND, Reshape, Slice and Concat for every tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from plugins._contract import Case, Found, Plugin
from plugins._find import NoMatch, attribute, behind, is_made, made, nodes, number, part, rank, size

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

TENSORS = 128


class KvCompact(Plugin):
    summary = "the gathers that shorten the cache of a KV group, all layers in one launch"
    attributes = ("tokens", "keep", "tensors")
    cases = (
        Case([("index", (1, 3)), ("x", (1, 2, 9, 4)), ("x", (1, 2, 9, 4))], dict(tokens=5, keep=3, tensors=2)),
        Case([("index", (2, 3, 20)), ("x", (2, 3, 70, 16))], dict(tokens=64, keep=20, tensors=1)),
        Case([("index", (1, 200)), *[("x", (1, 2, 600, 32))] * 4], dict(tokens=576, keep=200, tensors=4)),
        Case([("index", (1, 7)), ("x", (1, 1, 7, 5))], dict(tokens=7, keep=7, tensors=1)),
    )

    def eager(self, inputs: Sequence[Tensor], attributes: Mapping[str, int]) -> list[Tensor]:
        import torch

        from graphs._contract import take_per_head

        index, *caches = inputs
        tokens = attributes["tokens"]
        out = []
        for x in caches:
            each = index if index.ndim == 3 else index[:, None].expand(-1, x.shape[1], -1)
            out.append(torch.cat([take_per_head(x[:, :, :tokens], each), x[:, :, tokens:]], 2))
        return out

    def find(self, graph: ir.Graph) -> Iterator[Found]:
        groups: dict[object, list[tuple[ir.Value, ir.Value, ir.Value, int]]] = {}
        for node in nodes(graph, "Concat"):
            try:
                index, x, tokens = _pruned(node.outputs[0])
            except NoMatch:
                continue
            groups.setdefault((index, tokens, x.dtype, str(x.shape)), []).append((index, x, node.outputs[0], tokens))
        for members in groups.values():
            index, tokens = members[0][0], members[0][3]
            inputs: list[ir.Value] = [index]
            outputs: list[ir.Value] = []
            for _, x, left, _ in members:
                if len(outputs) < TENSORS and x not in behind(outputs):  # else it would wait for itself
                    inputs.append(x)
                    outputs.append(left)
            yield Found(inputs, outputs, dict(tokens=tokens, keep=size(index, -1), tensors=len(outputs)))


def _pruned(left: ir.Value) -> tuple[ir.Value, ir.Value, int]:
    """The index, the cache that it prunes, and how many visual tokens that has."""
    kept, *rest = made(left, "Concat")
    if len(rest) != 1 or attribute(left, "axis", 0) not in (2, -2) or rank(left) != 4:
        raise NoMatch
    after = part(rest[0])
    x, tokens = after.of, after.start
    if after.axis != 2 or after.stop < 2**31 - 1 or after.step != 1 or tokens <= 0:
        raise NoMatch
    if x.dtype is None or x.dtype.name not in ("FLOAT", "FLOAT16"):
        raise NoMatch
    heads, depth = size(x, 1), size(x, 3)
    gathered = made(kept, "Reshape")[0]
    flat, lifted = made(gathered, "GatherND", 2)
    before = part(made(flat, "Reshape")[0])
    if before != (x, 2, 0, tokens, 1) or attribute(gathered, "batch_dims", 0) != 1:
        raise NoMatch
    # Reshape keeps the order of elements: with these last axes it merges, and parts, the first two
    if (size(flat, -2), size(flat, -1), rank(flat)) != (tokens, depth, 3):
        raise NoMatch
    if (size(kept, 1), size(kept, 3), rank(kept)) != (heads, depth, 4):
        raise NoMatch
    places, axis = made(lifted, "Unsqueeze", 2)
    if number(axis) not in (-1, 2):
        raise NoMatch
    clipped = made(places, "Reshape")[0]
    each, least, *most = made(clipped, "Clip")
    if number(least) != 0 or most or rank(places) != 2 or size(places, 1) != size(kept, 2):
        raise NoMatch
    return _index(each, heads), x, tokens


def _index(each: ir.Value, heads: int) -> ir.Value:
    """The index [batch, keep], if all heads have the same, else [batch, kv_heads, keep]."""
    if is_made(each, "Expand"):
        lifted = made(each, "Expand")[0]
        if is_made(lifted, "Unsqueeze"):
            index, axis = made(lifted, "Unsqueeze", 2)
            if number(axis) in (1, -2) and rank(index) == 2:
                return index
    if rank(each) != 3 or size(each, 1) != heads:
        raise NoMatch
    return each


PLUGIN = KvCompact()
