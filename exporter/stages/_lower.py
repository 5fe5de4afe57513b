"""Two of torch.onnx's own steps, without running what was run before. The graphs are the same.

It traces every program once more to decompose what it cannot translate, which takes nearly half of the time of an export; our modules
hold few such operators: those are replaced one by one, and only a program with others takes the long way (`lower`). And it
runs every operator once more to see where types are promoted, although the trace says what each of them returned (`promote`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.onnx._internal.exporter import _decomp, _fx_passes, _registration
from torch.onnx._internal.fx.passes import type_promotion

aten = torch.ops.aten
_decompose = _fx_passes.decompose_with_registry

CHECKS = {aten._assert_tensor_metadata.default, aten._assert_scalar.default}
RENAMED = {
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.detach_.default: aten.detach.default,  # of constants
}
CASTS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout}


def lower(exported_program: ExportedProgram, registry: _registration.ONNXRegistry) -> ExportedProgram:
    """In place of `torch.onnx`'s own step: a program of operators that `registry` translates."""
    graph = exported_program.graph_module.graph
    for node in list(graph.nodes):
        if node.target in CHECKS:
            graph.erase_node(node)
        elif node.target in RENAMED:
            node.target = RENAMED[node.target]
        elif node.target in CASTS:
            _cast(node)
        elif node.target == aten.conv2d.padding:
            _pad(node)
        elif node.target == aten.eye.default:
            _identity(node)
        elif node.target == aten.numpy_T.default:
            node.target, node.args = aten.permute.default, (node.args[0], [*range(node.meta["val"].ndim)][::-1])
        elif node.target == aten.rsub.Scalar and len(node.args) == 2:
            node.target, node.args = aten.sub.Tensor, node.args[::-1]
    known = set(_decomp.get_onnx_implemented_overloads(registry))
    plain = all(_is_plain(node.target, known) for node in graph.nodes if node.op == "call_function")
    return exported_program if plain else _decompose(exported_program, registry)


def promote(self: type_promotion._TypePromotionInterpreter, n: Node) -> Any:
    """In place of the `run_node` of `torch.onnx`'s type promotion: only operators whose arguments are cast are run again."""
    before = n.args, n.kwargs
    with self._set_current_node(n):
        rule = type_promotion.get_type_promotion_rule(n, self.type_promotion_table)
        if rule is not None:
            self._maybe_promote_node(n, rule)
    if n.op == "call_function" and "val" in n.meta and (n.args, n.kwargs) == before:
        return n.meta["val"]
    return super(type_promotion._TypePromotionInterpreter, self).run_node(n)


def _given(node: Node) -> dict[str, Any]:
    """What an operator is given, by name."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    found = {a.name: a.default_value for a in arguments if a.has_default_value()}
    return found | {a.name: value for a, value in zip(arguments, node.args, strict=False)} | node.kwargs


def _cast(node: Node) -> None:
    """There is one device, so that only the type can be another one."""
    given = _given(node)
    x, dtype = given["self"], given["dtype"]
    assert isinstance(x, Node)
    if given["copy"] or given["memory_format"] is not None:
        return
    if dtype in (None, x.meta["val"].dtype):  # still a node, as it may be an output
        node.target, node.args, node.kwargs = aten.alias.default, (x,), {}
    else:
        node.target, node.args, node.kwargs = aten._to_copy.default, (x,), {"dtype": dtype}


def _pad(node: Node) -> None:
    """A convolution whose padding is a word: the same in numbers, where it is none."""
    given = _given(node)
    if given["padding"] == "valid":
        names = ("input", "weight", "bias", "stride")
        arguments = *(given[name] for name in names), [0, 0], given["dilation"], given["groups"]
        node.target, node.args, node.kwargs = aten.conv2d.default, arguments, {}


def _identity(node: Node) -> None:
    """A place equals a place."""
    (n,), dtype = node.args, node.meta["val"].dtype

    def call(target: Any, *args: Any, **more: Any) -> Node:
        made = node.graph.call_function(target, args, more)
        values = [a.meta["val"] if isinstance(a, Node) else a for a in args]
        made.meta = node.meta | {"val": target(*values, **more)}
        return made

    with node.graph.inserting_before(node), node.meta["val"].fake_mode:
        place = call(aten.arange.default, n, device=torch.device("cpu"))
        same = call(aten.eq.Tensor, call(aten.unsqueeze.default, place, -1), place)
        node.target, node.args, node.kwargs = aten._to_copy.default, (same,), {"dtype": dtype}


def _is_plain(target: Any, known: set[Any]) -> bool:
    return target in known and not (hasattr(target, "_schema") and target._schema.is_mutable)
