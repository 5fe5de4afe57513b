"""`edgetrim inspect`: what is in a bundle, an output folder or a graph."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click

from exporter.cli import _options as options
from exporter.cli._output import Output, table


@click.command()
@click.argument("path", type=click.Path(path_type=Path), metavar="FOLDER|GRAPH.onnx|ENGINE")
@click.option(
    "--verify/--no-verify", default=True, show_default=True, help="Compare every file of a bundle with its manifest."
)
@click.option(
    "--depth",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="N",
    help="Of a graph's scopes: levels shown.",
)
@options.json_option
def command(path: Path, verify: bool, depth: int, as_json: bool) -> None:
    """Show what is in a bundle, an output folder or an ONNX file.

    Of a bundle: tokens, engines, evidence, versions; every file is compared with the manifest, exit code 6 if one differs.
    Of a graph: inputs, outputs, and nodes by scope, which carry the names of modules and reductions. Of a TensorRT engine in a
    bundle's `engines/`, on a machine that can run it: its layers.
    """
    from exporter.bundle import MANIFEST
    from exporter.errors import UsageError

    out = Output(as_json)
    if path.is_file() and path.suffix == ".onnx":
        with out.stage("read"):
            data, parts = _graph(path, depth)
    elif path.is_file() and path.suffix == ".engine":
        with out.stage("open"):
            data, parts = _engine(path)
    elif (path / MANIFEST).is_file():
        with out.stage("verify" if verify else "read"):
            data, parts = _bundle(path, verify)
    elif (path / "graphs" / "graphs.json").is_file():
        data, parts = _folder(path)
    else:
        raise UsageError(
            f"{path} is neither a bundle ({MANIFEST}), an output folder (graphs/graphs.json), an .onnx file nor an .engine. "
            "`edgetrim run` makes a bundle."
        )
    out.result(data, *parts)


def _bundle(folder: Path, verify: bool) -> tuple[dict[str, Any], list[Any]]:
    from exporter.bundle import Bundle
    from exporter.cli import _results
    from exporter.errors import VerificationError
    from exporter.report.report import in_bytes
    from exporter.workspace import Workspace

    bundle = Bundle.open(folder, verify)
    manifest, files = bundle.manifest, bundle.manifest["files"]
    try:
        versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
        checked = "every hash is right" if verify else "not verified"
        lines = [
            f"Bundle {folder}: {len(files)} files, {in_bytes(bundle.bytes)}, {checked}",
            f"Packed by edgetrim {manifest['edgetrim']}, opset {manifest['opset']}, with {versions}",
            "",
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise VerificationError(
            f"{folder}/manifest.json is damaged ({type(e).__name__}: {e}). Pack or copy the bundle again."
        ) from e
    found = _results.summary(Workspace(folder))
    data = {
        "verified": verify,
        "manifest": manifest,
        "manifest_sha256": bundle.digest,
        "largest": _largest(files),
        **found.data,
    }
    return data, ["\n".join(lines), *found.parts, _sizes(files), *_devices(folder)]


LISTED = 8
"""Files shown with their size; of the rest the sum."""


def _largest(files: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"file": n, "bytes": e["bytes"]}
        for n, e in sorted(files.items(), key=lambda f: (-f[1]["bytes"], f[0]))[:LISTED]
    ]


def _devices(folder: Path) -> list[Any]:
    """What devices recorded that this bundle was deployed to; no part of what is verified."""
    from exporter.deploy.deploy import medians, records
    from exporter.deploy.ssh import printable

    def told(value: Any) -> str | None:
        return None if value is None else printable(str(value))[:60]

    rows = []
    for record in records(folder):
        facts = found if isinstance(found := record.get("facts"), dict) else {}
        ttft = medians(record).get("ttft")
        stack = (told(facts.get(key)) for key in ("model", "jetpack", "tensorrt", "power_mode"))
        rows.append((told(record.get("host")), told(record.get("utc")), *stack, ttft and f"{ttft:.1f} ms"))
    columns = ("device", "deployed (UTC)", "model", "JetPack", "TensorRT", "power mode", ">to first token")
    return [table("Devices", columns, rows)] if rows else []


def _sizes(files: dict[str, Any]) -> Any:
    from exporter.report.report import in_bytes

    total = sum(entry["bytes"] for entry in files.values())
    largest = _largest(files)
    rest = total - sum(f["bytes"] for f in largest)
    rows = [(f["file"], in_bytes(f["bytes"]), f"{100 * f['bytes'] / max(1, total):.0f} %") for f in largest]
    if len(files) > len(largest):
        rows.append((f"{len(files) - len(largest)} more", in_bytes(rest), f"{100 * rest / max(1, total):.0f} %"))
    return table("Files, largest first", ("file", ">size", ">share"), rows)


def _folder(folder: Path) -> tuple[dict[str, Any], list[Any]]:
    from exporter.cli import _results
    from exporter.workspace import Workspace

    found = _results.summary(Workspace(folder))
    words = f"Folder {folder}: not packed, so there is nothing to verify it with. `edgetrim pack {folder}` packs it.\n"
    return {"verified": False, "manifest": None, **found.data}, [words, *found.parts]


def _graph(path: Path, depth: int) -> tuple[dict[str, Any], list[Any]]:
    from exporter.errors import EnvironmentMismatch, ExportError

    try:
        import onnx
    except ImportError as e:
        raise EnvironmentMismatch("Reading a graph needs the Python package onnx: `pip install onnx`.") from e
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as e:  # protobuf's errors share no base
        raise ExportError(f"{path} cannot be read as ONNX ({type(e).__name__}). Export it again.") from e
    graph = model.graph
    kinds = {v: k for k, v in onnx.TensorProto.DataType.items()}

    def values(infos: Any) -> list[dict[str, Any]]:
        return [
            {
                "name": info.name,
                "type": kinds.get(info.type.tensor_type.elem_type, "unknown").lower(),
                "shape": [d.dim_param or d.dim_value for d in info.type.tensor_type.shape.dim],
            }
            for info in infos
        ]

    scopes: dict[str, Counter[str]] = {}
    for node in graph.node:
        scope = "/".join(node.name.split("/")[:-1][:depth])
        scopes.setdefault(scope, Counter())[node.op_type] += 1
    operators = Counter(node.op_type for node in graph.node)
    data: dict[str, Any] = {
        "graph": path,
        "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "nodes": len(graph.node),
        "initializers": len(graph.initializer),
        "inputs": values(graph.input),
        "outputs": values(graph.output),
        "operators": dict(operators.most_common()),
        "scopes": {scope: dict(counted.most_common()) for scope, counted in scopes.items()},
    }
    opset = ", ".join(f"{domain} {version}" for domain, version in data["opset"].items())
    head = f"{path}: {len(graph.node)} nodes, {len(graph.initializer)} initializers, opset {opset}\n"
    ports = [
        ("in" if way == "inputs" else "out", v["name"], v["type"], ", ".join(map(str, v["shape"])))
        for way in ("inputs", "outputs")
        for v in data[way]
    ]
    rows = [(scope or "(top)", counted.total(), _listed(counted)) for scope, counted in scopes.items()]
    return data, [
        head,
        table("Inputs and outputs", ("", "name", "type", "shape"), ports),
        table(
            "Nodes by scope", ("scope", ">nodes", "operators"), [*rows, ("all", len(graph.node), _listed(operators))]
        ),
    ]


def _engine(path: Path) -> tuple[dict[str, Any], list[Any]]:
    from exporter.backends._trt_runner import TensorRtRunner
    from exporter.backends.trt import BACKEND
    from exporter.engines import checked_engine, engine_records
    from exporter.errors import EnvironmentMismatch, UsageError
    from exporter.workspace import Workspace

    folder = path.absolute().parent.parent
    record = next((r for r in engine_records(Workspace(folder)) if r.file == path.name), None)
    if record is None or record.backend != BACKEND.name:
        raise UsageError(f"{path} is no TensorRT engine that {folder}/engines/engines.json tells of.")
    if missing := BACKEND.missing_to_run():
        raise EnvironmentMismatch(f"{path.name} cannot be opened here. {missing}")
    with TensorRtRunner(checked_engine(folder, record), folder / "graphs" / f"{path.stem}.onnx") as runner:
        found, executed = runner.layers(), runner.in_words
    data = {"engine": path, "roles": record.roles, "opened": executed, "details": record.details, "layers": found}
    rows = [(layer.name, layer.kind, ", ".join(layer.scopes), layer.output, layer.tactic) for layer in found]
    head = f"{path}: {' and '.join(record.roles)}, {len(found)} layers, opened with {executed}\n"
    return data, [head, table("Layers", ("layer", "type", "of", "output", "tactic"), rows)]


def _listed(counted: Counter[str], most: int = 6) -> str:
    first = ", ".join(f"{count} {name}" for name, count in counted.most_common(most))
    return f"{first}, …" if len(counted) > most else first
