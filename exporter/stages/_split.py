"""Splits matrices that are larger than what a device allocates in one piece, such as an LM head with a large vocabulary.

x @ [a b] = [x @ a, x @ b]: a MatMul becomes one per block of columns, and a Concat. Every number is computed as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch

from exporter.checkpoint import Checkpoint
from exporter.quantize._contract import Quantized
from exporter.weights import Source

ALIGNED = 128
"""Columns: blocks begin at multiples of it, which kernels read fastest."""


@dataclass(frozen=True)
class Columns(Source):
    """Columns `start` to `stop` of another source's matrix."""

    whole: Source
    start: int
    stop: int

    def read(self, checkpoint: Checkpoint) -> torch.Tensor:
        return self.whole.read(checkpoint)[:, self.start : self.stop]

    def expect(self, checkpoint: Checkpoint) -> None:
        self.whole.expect(checkpoint)

    def numbers(self, checkpoint: Checkpoint) -> str | None:
        return self.whole.numbers(checkpoint)

    def quantized(self, checkpoint: Checkpoint) -> Quantized:
        return self.whole.quantized(checkpoint).columns(self.start, self.stop)

    def bytes(self, checkpoint: Checkpoint) -> int:
        """Shares of the whole's; those of all blocks add up to it."""
        size, columns = self.whole.bytes(checkpoint), self.whole.shape[1]
        return size * self.stop // columns - size * self.start // columns


def blocks_of_columns(source: Source, bits: int, largest: int) -> list[Columns]:
    """A matrix [in, out] in blocks of columns, as equal as alignment lets them be, none above `largest` bytes.

    Args:
        bits: of one element.
    """
    rows, columns = source.shape
    most = max(1, largest * 8 // (rows * bits) // ALIGNED) * ALIGNED
    count = -(-columns // most)
    width = -(-columns // count // ALIGNED) * ALIGNED
    ends = [min(columns, stop) for stop in range(width, columns + width, width)]
    return [
        Columns(source.name, (rows, stop - start), source.transposed, whole=source, start=start, stop=stop)
        for start, stop in zip([0, *ends], ends, strict=False)
    ]


def split_matmuls(model: ir.Model, weight: ir.Value, names: Sequence[str], widths: Sequence[int]) -> list[ir.Value]:
    """Replace every MatMul with `weight`, which is its second input, by one per block; returns the blocks, as graph inputs that stand
    for weights still to be written, like `weight` was."""
    assert weight.shape is not None
    rows = weight.shape[0]
    blocks = []
    for name, width in zip(names, widths, strict=True):
        block = ir.Value(name=name, shape=ir.Shape([rows, width]), type=weight.type)
        block.metadata_props.update(weight.metadata_props)
        blocks.append(block)
    for node in [use.node for use in weight.uses()]:
        product = node.outputs[0]
        parts = [_matmul(node, block, number) for number, block in enumerate(blocks)]
        joined = ir.Value(name=f"{product.name}_joined", shape=product.shape, type=product.type)
        concat = ir.Node(
            "", "Concat", [part.outputs[0] for part in parts], [ir.AttrInt64("axis", -1)], outputs=[joined],
            name=f"{node.name}_joined",
        )  # fmt: skip
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [*parts, concat], [product], [joined])
    model.graph.inputs.remove(weight)
    model.graph.inputs.extend(blocks)
    return blocks


def _matmul(node: ir.Node, block: ir.Value, number: int) -> ir.Node:
    product = node.outputs[0]
    assert product.shape is not None and block.shape is not None
    shape = ir.Shape([*list(product.shape)[:-1], block.shape[1]])
    made = ir.Value(name=f"{product.name}_{number}", shape=shape, type=product.type)
    return ir.Node("", "MatMul", [node.inputs[0], block], outputs=[made], name=f"{node.name}_{number}")
