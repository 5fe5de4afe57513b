"""Draw a module made of atoms as one ONNX graph: each distinct atom is traced once, then stamped."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import sympy
import torch
from torch import nn

from exporter import __version__
from exporter.nn.atom import SHEET, Atom
from exporter.stages._trace import IR_VERSION, OPSET, symbolic, trace

Shape = Sequence[int | str]

KINDS = {
    torch.float32: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT16, torch.int64: ir.DataType.INT64,
    torch.int8: ir.DataType.INT8,
}  # fmt: skip
DTYPES = {kind: dtype for dtype, kind in KINDS.items()}

SIZES = {"batch": 2, "seq": 3, "text": 7, "past": 5, **{f"past_{g}": 5 + 6 * g for g in range(128)}}
"""Example sizes for tracing: above 1 and all different, so that nothing is specialised. `draw` can override them."""

_traced: dict[Hashable, tuple[ir.Model, bool]] = {}
"""Atoms traced in this process, and whether they return a single tensor."""


def draw(
    module: nn.Module,
    inputs: Mapping[str, tuple[Shape, torch.dtype]],
    call: Callable[[dict[str, ir.Value]], Sequence[ir.Value]],
    outputs: Sequence[str],
    sizes: Mapping[str, int] | None = None,
) -> ir.Model:
    """Run `call` on graph values and return the graph that it drew.

    Args:
        module: owner of the atoms; parameters are named by their path in it.
        inputs: name → shape (ints, and names for dynamic sizes) and dtype.
        call: gets the inputs by name, calls the module, returns the outputs in order.
        sizes: example sizes of the dynamic dimensions, where `SIZES` does not fit.
    """
    values = {
        name: ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(KINDS[dtype]))
        for name, (shape, dtype) in inputs.items()
    }
    sheet = _Sheet(module, {**SIZES, **(sizes or {})})
    token = SHEET.set(sheet)
    try:
        results = list(call(values))
    finally:
        SHEET.reset(token)
    for i, (value, name) in enumerate(zip(results, outputs, strict=True)):
        if value.name in values or value in results[:i]:
            value = results[i] = sheet.identity(value)
        value.name = name
    graph = ir.Graph(
        [*values.values(), *sheet.weights.values()], results, nodes=sheet.nodes,
        initializers=list(sheet.constants.values()), opset_imports={"": OPSET}, name="edgetrim",
    )  # fmt: skip
    _number(graph)
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="edgetrim", producer_version=__version__)


class _Sheet:
    def __init__(self, module: nn.Module, sizes: Mapping[str, int]) -> None:
        self.paths = {id(m): name for name, m in module.named_modules()}
        self.sizes = sizes
        self.nodes: list[ir.Node] = []
        self.weights: dict[str, ir.Value] = {}
        self.constants: dict[str, ir.Value] = {}
        self.stamps = 0

    def draw(self, atom: Atom, args: tuple[Any, ...]) -> Any:
        values = [a for a in args if a is not None]
        model, single = self._model(atom, args)
        outputs = self._stamp(model, atom, values)
        return outputs[0] if single else tuple(outputs)

    def _model(self, atom: Atom, args: tuple[Any, ...]) -> tuple[ir.Model, bool]:
        """The traced atom, its dynamic dimensions called d0, d1, … in order of appearance."""
        given = [a for a in args if a is not None]
        local = _local_names(given)
        shapes = tuple(None if a is None else (a.dtype, tuple(local.get(str(d), d) for d in a.shape)) for a in args)
        dtypes = tuple(sorted({str(p.dtype) for p in atom.parameters()}))
        key = (type(atom), atom.key(), dtypes, shapes)
        if key not in _traced:
            kinds: list[type] = []
            called = _Positional(atom, [a is not None for a in args], kinds)
            examples = [self._example(a) for a in given]
            axes = [{i: local[str(d)] for i, d in enumerate(a.shape) if not isinstance(d, int)} for a in given]
            names = [f"input_{i}" for i in range(len(given))]
            model = trace(called, {"values": examples}, {"values": axes}, None, names)
            _traced[key] = model, kinds[-1] is not tuple
        return _traced[key]

    def _example(self, value: ir.Value) -> torch.Tensor:
        assert value.shape is not None and value.dtype is not None
        sizes = [d if isinstance(d, int) else _evaluate(str(d.value), self.sizes) for d in value.shape]
        return torch.zeros(sizes, dtype=DTYPES[value.dtype])

    def _stamp(self, model: ir.Model, atom: Atom, inputs: Sequence[ir.Value]) -> list[ir.Value]:
        """Copy a traced atom's nodes, its inputs replaced by `inputs`, its weights named by the path of the module that
        owns them, which may lie in another atom."""
        self.stamps += 1
        path = self.paths[id(atom)]
        dims = {name: text for text, name in _local_names(inputs).items()}
        mapped: dict[int, ir.Value] = {}
        for old in symbolic(model):
            owner, _, leaf = (old.name or "").removeprefix("atom.").rpartition(".")
            name = ".".join(filter(None, [self.paths[id(atom.get_submodule(owner))], leaf]))
            if name not in self.weights:
                new = ir.Value(name=name, shape=old.shape, type=old.type)
                new.metadata_props["weight"] = "1"
                self.weights[name] = new
            mapped[id(old)] = self.weights[name]
        plain = [v for v in model.graph.inputs if not v.metadata_props.get("weight")]
        mapped.update((id(old), new) for old, new in zip(plain, inputs, strict=True))
        for old in _constants(model):
            mapped[id(old)] = self._constant(old)
        for node in model.graph:
            outputs = []
            for old in node.outputs:
                shape = None if old.shape is None else ir.Shape([_renamed(d, dims) for d in old.shape])
                new = ir.Value(name=f"v{self.stamps}_{old.name}", shape=shape, type=old.type)
                mapped[id(old)] = new
                outputs.append(new)
            scope = [p for p in (node.name or "").split("/")[:-1] if p != "atom"]
            name = "/".join([*path.split("."), *scope, node.op_type]) if path else "/".join([*scope, node.op_type])
            arguments = [None if v is None else mapped[id(v)] for v in node.inputs]
            self.nodes.append(
                ir.Node("", node.op_type, arguments, node.attributes.values(), outputs=outputs, name=name)
            )
        return [mapped[id(v)] for v in model.graph.outputs]

    def _constant(self, old: ir.Value) -> ir.Value:
        """Constants of equal type and bytes are stored once."""
        tensor = old.const_value
        assert tensor is not None
        array = tensor.numpy()
        digest = hashlib.sha256(array.tobytes()).hexdigest()[:12]
        key = f"{tensor.dtype.name.lower()}_{'x'.join(map(str, array.shape)) or 'scalar'}_{digest}"
        if key not in self.constants:
            copy = ir.tensor(array.copy(), dtype=tensor.dtype, name=key)
            self.constants[key] = ir.Value(name=key, shape=ir.Shape(array.shape), type=old.type, const_value=copy)
        return self.constants[key]

    def identity(self, value: ir.Value) -> ir.Value:
        out = ir.Value(name=None, shape=value.shape, type=value.type)
        self.nodes.append(ir.Node("", "Identity", [value], outputs=[out], name="Identity"))
        return out


class _Positional(nn.Module):
    """Calls an atom with a list of tensors, None where `given` says so; appends the type of what it returned to `kinds`."""

    def __init__(self, atom: Atom, given: Sequence[bool], kinds: list[type]) -> None:
        super().__init__()
        self.atom, self.given, self.kinds = atom, given, kinds

    def forward(self, values: Sequence[torch.Tensor]) -> Any:
        rest = iter(values)
        token = SHEET.set(None)
        try:
            out = self.atom(*(next(rest) if given else None for given in self.given))
        finally:
            SHEET.reset(token)
        self.kinds.append(type(out))
        return out


def _number(graph: ir.Graph) -> None:
    """Make node names unique: the first keeps its name, the next get _2, _3, …"""
    counts: dict[str, int] = {}
    for node in graph:
        name = node.name or node.op_type
        counts[name] = counts.get(name, 0) + 1
        node.name = name if counts[name] == 1 else f"{name}_{counts[name]}"


def _symbols(text: str) -> dict[str, sympy.Symbol]:
    words = "".join(c if c.isalnum() or c == "_" else " " for c in text).split()
    return {w: sympy.Symbol(w, integer=True, positive=True) for w in words if not w.isdigit()}


def _evaluate(text: str, sizes: Mapping[str, int]) -> int:
    expression = eval(text, {"__builtins__": {}}, _symbols(text))  # noqa: S307 - written by the tracer, not by a user
    return int(expression.subs({name: sizes[str(name)] for name in expression.free_symbols}))


def _constants(model: ir.Model) -> Iterator[ir.Value]:
    """A graph's constants. Where onnxscript's rules merge two reshapes, the new shape is not among the initializers."""
    known = model.graph.initializers.values()
    yield from known
    seen = {id(value) for value in known}
    for value in (v for node in model.graph for v in node.inputs if v is not None):
        if value.producer() is None and value.const_value is not None and id(value) not in seen:
            seen.add(id(value))
            yield value


def _local_names(values: Sequence[ir.Value]) -> dict[str, str]:
    """Dynamic dimensions of an atom's inputs → d0, d1, … in order of appearance."""
    names: dict[str, str] = {}
    for value in values:
        assert value.shape is not None
        for dim in value.shape:
            if not isinstance(dim, int):
                names.setdefault(str(dim), f"d{len(names)}")
    return names


def _renamed(dim: int | ir.SymbolicDim, dims: Mapping[str, str]) -> int | ir.SymbolicDim:
    """A traced atom's dimension in the names of the sheet, simplified: "(d0*4)//4" → "batch"."""
    if isinstance(dim, int) or dim.value is None:
        return dim
    text = re.sub(r"\bd\d+\b", lambda m: f"({dims.get(m.group(), m.group())})", str(dim.value))
    try:
        simple = sympy.expand(eval(text, {"__builtins__": {}}, _symbols(text)))  # noqa: S307 - written by the tracer
    except (TypeError, NameError, SyntaxError):
        return ir.SymbolicDim(None)
    return int(simple) if simple.is_Integer else ir.SymbolicDim(str(simple))
