"""What a graph became in ONNX Runtime and where its time goes, from the profile that a session writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from exporter._typed import parsed, typed
from exporter.backends._contract import Layer
from exporter.errors import ExportError

KERNEL = "_kernel_time"
"""What ONNX Runtime appends to a node's name in the event of its kernel."""


def layers(path: Path, rounds: int) -> list[Layer]:
    """The nodes that ran, in the order they first did, with milliseconds a round.

    Args:
        rounds: see `Runner.layers`.
    Raises:
        ExportError: another form.
    """
    try:
        events = typed(list[dict[str, Any]], parsed(path.read_bytes()))
        spent: dict[tuple[str, str], list[float]] = {}
        told: dict[tuple[str, str], dict[str, Any]] = {}
        for event in sorted((e for e in events if e.get("cat") == "Node"), key=lambda e: e["ts"]):
            if event["name"].endswith(KERNEL):
                key = event["name"].removesuffix(KERNEL), event["args"]["node_index"]
                spent.setdefault(key, []).append(event["dur"] / 1e3)
                told.setdefault(key, event["args"])
        return [_layer(key[0], args, _a_round(spent[key], rounds)) for key, args in told.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ExportError(
            f"ONNX Runtime's profile has a form that is not known ({type(e).__name__}: {e}). Try another version."
        ) from e


def _a_round(times: list[float], rounds: int) -> float:
    """Milliseconds of a round: of each of its calls the median over the rounds, so that what disturbed one call does not count."""
    found = np.array(times).reshape(rounds, -1)
    return float(np.median(found[1:] if rounds > 1 else found, axis=0).sum())


def _layer(name: str, args: dict[str, Any], ms: float) -> Layer:
    first: dict[str, Any] = next(iter(args.get("output_type_shape", [])), {})
    output = " ".join(f"{kind} {shape}" for kind, shape in first.items())
    scope = name.rpartition("/")[0]
    return Layer(name, args["op_name"], (scope,) if scope else (), output, args.get("provider", ""), ms)
