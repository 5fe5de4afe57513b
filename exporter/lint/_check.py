"""Applies a table to a graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.errors import EnvironmentMismatch, ExportError
from exporter.lint._table import Table, Verdict

if TYPE_CHECKING:
    import onnx_ir as ir

NAMES = {
    "FLOAT": "FP32", "DOUBLE": "FP32", "FLOAT16": "FP16", "BFLOAT16": "BF16", "FLOAT8E4M3FN": "FP8", "FLOAT4E2M1": "FP4",
}  # fmt: skip
"""ONNX's names of types → TensorRT's, where they differ. DOUBLE is read as FP32."""


@dataclass(frozen=True)
class Finding:
    """One thing that a target would not do, or not do right, with a node. `node`: its name, or that of its first output."""

    graph: str
    node: str
    op: str
    verdict: Verdict
    what: str
    fix: str
    source: str

    @property
    def fatal(self) -> bool:
        """Whether the graph cannot be used as it is."""
        return self.verdict != "slow"


def lint(path: Path, table: Table) -> list[Finding]:
    """Findings in an ONNX file, in the order of its nodes, those in subgraphs and local functions too. Weights are not read.

    Raises:
        EnvironmentMismatch: onnx is not installed. ExportError: the file is no ONNX graph.
    """
    return list(findings(path.name, read(path), table))


def in_words(found: Sequence[Finding], most: int = 4) -> list[str]:
    """One text for what is the same of several nodes; at most `most` of them by name.

    >>> in_words([finding])
    ["decode.onnx: TopK `lm/rank` is rejected: `K` is above 3840. Rank by …\\n  Source: …"]
    """
    alike: dict[tuple[str, ...], list[str]] = {}
    for f in found:
        alike.setdefault((f.graph, f.op, f.verdict, f.what, f.fix, f.source), []).append(f.node)
    texts = []
    for (graph, op, verdict, what, fix, source), nodes in alike.items():
        shown = ", ".join(f"`{node}`" for node in nodes[:most])
        more = f" and {len(nodes) - most} more" if len(nodes) > most else ""
        are = "is" if len(nodes) == 1 else "are"
        texts.append(f"{graph}: {op} {shown}{more} {are} {verdict}: {what}. {fix}\n  Source: {source}")
    return texts


def read(path: Path) -> ir.Model:
    """A graph with the types and shapes of its values. Raises as `lint`."""
    try:
        import onnx_ir as ir
        from onnx_ir.passes import common
    except ImportError as e:
        raise EnvironmentMismatch(
            "Reading a graph needs the Python packages onnx and onnx_ir: `pip install 'edgetrim[export]'`."
        ) from e
    try:
        model = ir.load(path)
        if not len(model.graph) and not model.graph.outputs:
            raise ValueError("it has no nodes")
        if any(value.dtype is None or value.shape is None for node in model.graph for value in node.outputs):
            model = common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model).model
    except Exception as e:  # protobuf's errors share no base
        raise ExportError(f"{path} cannot be read as ONNX ({type(e).__name__}: {e}). Export it again.") from e
    return model


def findings(graph: str, model: ir.Model, table: Table) -> Iterator[Finding]:
    """As `lint`, of a graph that has been read. graph: what it is called."""
    import onnx_ir as ir

    opset = model.graph.opset_imports.get("", 1)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        yield from _of_node(graph, node, opset, model, table)
    for function in model.functions.values():
        for rule in table.functions:
            if all(holds(function, model) for holds in rule.when):
                name = f"{function.domain}.{function.name}"
                yield Finding(graph, name, "local function", rule.verdict, rule.what, rule.fix, rule.source)
        for node in ir.traversal.RecursiveGraphIterator(function.graph):
            yield from _of_node(graph, node, function.opset_imports.get("", opset), model, table)


def _of_node(graph: str, node: ir.Node, opset: int, model: ir.Model, table: Table) -> Iterator[Finding]:
    if node.op_identifier() in model.functions:
        return
    name = node.name or next((v.name for v in node.outputs if v.name), "") or "(no name)"
    domain = "" if node.domain == "ai.onnx" else node.domain
    op = f"{domain}.{node.op_type}" if domain else node.op_type

    def found(verdict: Verdict, what: str, fix: str, source: str) -> Finding:
        return Finding(graph, name, op, verdict, what, fix, source)

    source = table.operators.get((domain, node.op_type))
    if source is None:
        known = sorted({source for (owner, _), source in table.operators.items() if owner in ("", domain)})
        yield found(
            "rejected", f"{table.name} has no importer for it",
            "Compose it of other operators, or choose a reduction or a flavour without it.", "; ".join(known),
        )  # fmt: skip
        return
    types = None if domain else table.types.get(node.op_type)
    value = None if types is None or types.input >= len(node.inputs) else node.inputs[types.input]
    if types is not None and value is not None and value.dtype is not None:
        kind = NAMES.get(value.dtype.name, value.dtype.name)
        if kind not in types.names:
            taken = ", ".join(sorted(types.names))
            yield found(
                "rejected",
                f"its input `{value.name}` is {kind}; taken: {taken}",
                f"Cast it to one of {taken}.",
                types.source,
            )
    for rule in () if domain else table.rules.get(node.op_type, ()):
        if all(holds(node, opset) for holds in rule.when):
            yield found(rule.verdict, rule.what, rule.fix, rule.source)
