"""torch → ONNX without weights: modules are traced on the meta device, weights stay names until they are written.

The result is plain opset 21, IR 10, standard operators of the default domain, functions inlined.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
import torch._dynamo.config
from torch.export import Dim
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.onnx._internal.exporter import _fx_passes, _registration
from torch.onnx._internal.fx.passes import type_promotion

from exporter import __version__
from exporter.stages._lower import lower, promote

OPSET, IR_VERSION = 21, 10

Axes = Mapping[int, str]
Inputs = Mapping[str, torch.Tensor | Sequence[torch.Tensor]]
Dynamic = Mapping[str, Axes | Sequence[Axes]]


def trace(
    module: torch.nn.Module,
    inputs: Inputs,
    dynamic: Dynamic,
    outputs: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
) -> ir.Model:
    """Trace `module(**inputs)` to an ONNX graph.

    Args:
        module: parameters on the meta device stay symbolic: they become graph *inputs* named like the parameter and
            carry no data. Parameters and buffers with data become initializers.
        inputs: example tensors (meta or real) by argument name. Dynamic axes need sizes above 1, all different.
        dynamic: input name → axis → dimension name; for a list one mapping per tensor.
        outputs: names for the flattened outputs, in order.
        names: names for the flattened inputs, in order, where an input is a list; default: the argument names.
    Returns:
        The optimized model. `symbolic(model)` tells weights from inputs.
    """
    shapes = {name: _spec(value, dynamic.get(name, {})) for name, value in inputs.items()}
    with torch.no_grad(), _stand_in(module) as weights, _quiet(), _quick():
        program = torch.export.export(
            module, (), kwargs=dict(inputs), dynamic_shapes=shapes, strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )  # fmt: skip
        from graphs._ops import TRANSLATIONS

        onnx_program = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, custom_translation_table=dict(TRANSLATIONS),
            input_names=None if names is None else list(names), output_names=None if outputs is None else list(outputs), optimize=False, verbose=False,
        )  # fmt: skip
    assert onnx_program is not None
    model = onnx_program.model
    _free_weights(model, weights)
    _optimize(model)
    _name_dims(model, inputs, dynamic)
    _tidy(model)
    assert set(model.opset_imports) == {""}, f"operators outside the default domain: {model.opset_imports}"
    return model


def symbolic(model: ir.Model) -> list[ir.Value]:
    """Graph inputs that stand for weights still to be written."""
    return [v for v in model.graph.inputs if v.metadata_props.get("weight") == "1"]


def _spec(value: torch.Tensor | Sequence[torch.Tensor], axes: Axes | Sequence[Axes]) -> Any:
    if isinstance(value, torch.Tensor):
        return dict.fromkeys(axes, Dim.DYNAMIC)
    return [_spec(v, a) for v, a in zip(value, _per_tensor(value, axes), strict=True)]


def _per_tensor(value: torch.Tensor | Sequence[torch.Tensor], axes: Axes | Sequence[Axes]) -> list[Axes]:
    if isinstance(axes, Mapping):
        return [axes] if isinstance(value, torch.Tensor) else [axes] * len(value)
    return list(axes)


@contextlib.contextmanager
def _stand_in(module: torch.nn.Module) -> Iterator[set[str]]:
    """Replace meta parameters by CPU tensors of one element, expanded: right shape and device, no memory. Yields their names,
    and puts them back: another atom may share them."""
    meta = {name: p for name, p in module.named_parameters() if p.device.type == "meta"}

    def put(name: str, parameter: torch.nn.Parameter) -> None:
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, parameter)

    for name, old in meta.items():
        stand_in = torch.zeros((), dtype=old.dtype).expand(old.shape)
        put(name, torch.nn.Parameter(stand_in, requires_grad=False))
    try:
        yield set(meta)
    finally:
        for name, old in meta.items():
            put(name, old)


def _free_weights(model: ir.Model, names: set[str]) -> None:
    for name in [n for n in model.graph.initializers if n in names]:
        value = model.graph.initializers.pop(name)
        value.const_value = None
        value.metadata_props["weight"] = "1"
        model.graph.inputs.append(value)


def _optimize(model: ir.Model) -> None:
    """As `onnxscript.optimizer.optimize`, but without the rules that drop `x + c` for any |c| ≤ 1e-8 (and `x * c` for c
    within 1e-5 of 1): an epsilon that keeps a division from 0 / 0 is not nothing."""
    from onnx_ir.passes import Sequential, common
    from onnxscript import optimizer, rewriter

    common.InlinePass()(model)
    # Fewer nodes to fold: what operators become repeats what their neighbours became.
    common.RemoveUnusedNodesPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    for _ in range(2):
        optimizer.fold_constants(model, onnx_shape_inference=True)
        rewriter.rewrite(model, _rules())
    Sequential(
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)
    used = {id(v) for node in model.graph for v in node.inputs if v is not None}
    outputs = {id(v) for v in model.graph.outputs}
    for value in symbolic(model):
        if id(value) not in used and id(value) not in outputs:
            model.graph.inputs.remove(value)


@functools.cache
def _rules() -> list[Any]:
    """onnxscript's but those, each tried only at nodes of the operator that it ends with: it would match every rule with every node,
    and for one that ends with two walk through the whole graph each time."""
    from onnxscript import rewriter
    from onnxscript.rewriter.rules.common import _no_op

    def at(operator: str, try_rewrite: Any) -> Any:
        return lambda model, graph, node, **how: (
            try_rewrite(model, graph, node, **how) if node.op_type == operator else None
        )

    rules = [copy.copy(rule) for rule in rewriter._DEFAULT_REWRITE_RULES if rule not in set(_no_op.rules)]
    for rule in rules:
        if (last := rule._target_pattern.output_nodes[0].op_identifier()) is not None:
            rule.try_rewrite = at(last[1], rule.try_rewrite)  # type: ignore[method-assign]
    return rules


def _name_dims(
    model: ir.Model,
    inputs: Inputs,
    dynamic: Dynamic,
) -> None:
    """Give symbolic dimensions their names; torch calls them s77. A sum of two keeps its form: "past + seq"."""
    flat = [axes for name, value in inputs.items() for axes in _per_tensor(value, dynamic.get(name, {}))]
    renamed: dict[str, str] = {}
    for value, axes in zip(model.graph.inputs, flat, strict=False):
        assert value.shape is not None
        for axis, name in axes.items():
            old = value.shape[axis]
            if isinstance(old, ir.SymbolicDim) and old.value is not None:
                renamed.setdefault(old.value, name)

    def name_of(dim: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
        if isinstance(dim, int) or dim.value is None:
            return dim
        return ir.SymbolicDim(re.sub(r"\bs\d+\b", lambda m: _term(renamed.get(m.group(), m.group())), str(dim.value)))

    for value in [*model.graph.inputs, *(o for node in model.graph for o in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([name_of(d) for d in value.shape])


def _term(text: str) -> str:
    return text if text.isidentifier() else f"({text})"


def _tidy(model: ir.Model) -> None:
    """Name nodes after the module they come from ("visionzip/TopK_3") and drop the tracer's notes, which hold file paths."""
    counts: dict[str, int] = {}
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        scope = next((s for s in reversed(scopes[:-1]) if s), "")
        stem = "/".join([*scope.split("."), node.op_type]) if scope else node.op_type
        counts[stem] = counts.get(stem, 0) + 1
        node.name = f"{stem}_{counts[stem]}"
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in model.graph.inputs:
        for key in [k for k in value.metadata_props if k != "weight"]:
            del value.metadata_props[key]
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.producer_name, model.producer_version = "edgetrim", __version__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter logs about packages we do not use; keep the user's terminal for what matters."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextlib.contextmanager
def _quick() -> Iterator[None]:
    """torch's exporter rebuilds its operator table (over a second) for every call, and runs twice more what it has traced; keep the
    table for the next atom, `lower` and `promote` instead. It reads an operator's schema again for every node: once is enough. And its
    cache of what operators return takes longer to fill than it saves where sizes are symbols, and nobody reads where in the source a
    node comes from, or runs the Python that a graph is written as each time it changes."""
    signature = ir.schemas.OpSignature.__dict__["from_op_schema"]
    registry, interpreter = _registration.ONNXRegistry, type_promotion._TypePromotionInterpreter
    built, decompose, run_node = registry.from_torchlib, _fx_passes.decompose_with_registry, interpreter.run_node
    registry.from_torchlib = staticmethod(_operator_table)  # type: ignore[method-assign]
    _fx_passes.decompose_with_registry = lower
    interpreter.run_node = promote  # type: ignore[method-assign]
    ir.schemas.OpSignature.from_op_schema = staticmethod(_signature)  # type: ignore[assignment]
    where, torch.fx.config.do_not_emit_stack_traces = torch.fx.config.do_not_emit_stack_traces, True
    try:
        with torch._dynamo.config.patch(fake_tensor_cache_enabled=False), _use_lazy_graph_module(True):
            yield
    finally:
        registry.from_torchlib = built  # type: ignore[method-assign]
        _fx_passes.decompose_with_registry = decompose
        interpreter.run_node = run_node  # type: ignore[method-assign]
        ir.schemas.OpSignature.from_op_schema = signature  # type: ignore[method-assign]
        torch.fx.config.do_not_emit_stack_traces = where


_from_schema = ir.schemas.OpSignature.from_op_schema
_signatures: dict[tuple[str, str, int], ir.schemas.OpSignature] = {}


def _signature(schema: Any) -> ir.schemas.OpSignature:
    """Of an operator as ONNX defines it: read once."""
    key = schema.domain, schema.name, schema.since_version
    if key not in _signatures:
        _signatures[key] = _from_schema(schema)
    return _signatures[key]


_from_torchlib = _registration.ONNXRegistry.from_torchlib


@functools.cache
def _operator_table(opset_version: int = OPSET) -> _registration.ONNXRegistry:
    return _from_torchlib(opset_version)
