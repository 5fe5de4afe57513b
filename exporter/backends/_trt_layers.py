"""What an engine became, from TensorRT's inspector: a row per layer."""

from __future__ import annotations

import json
import re
from typing import Any

from exporter.backends._contract import Layer
from exporter.errors import ExportError


def layers(text: str) -> list[Layer]:
    """The layers in the inspector's JSON; an engine that was built without detail has names only.

    Raises:
        ExportError: another form.
    """
    try:
        return [_layer(entry) for entry in json.loads(text)["Layers"]]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ExportError(
            f"TensorRT's inspector answered in a form that is not known ({type(e).__name__}: {e}). Try another version."
        ) from e


def _layer(entry: Any) -> Layer:
    if isinstance(entry, str):
        return Layer(entry, "", (), "", "")
    nodes = re.findall(r"\[ONNX Layer: ([^\]]*)\]", str(entry.get("Metadata", "")))
    scopes = dict.fromkeys(node.rpartition("/")[0] for node in nodes if "/" in node)
    first: dict[str, Any] = next(iter(entry.get("Outputs", [])), {})
    told = first.get("Format/Datatype") or first.get("Format") or ""
    output = f"{told} {list(first['Dimensions'])}".strip() if first else ""
    return Layer(entry["Name"], entry.get("LayerType", ""), tuple(scopes), output, str(entry.get("TacticName", "")))
