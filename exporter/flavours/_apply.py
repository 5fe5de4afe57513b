"""Writes flavoured graphs beside the plain ones, which stay the graphs of record. Weights are shared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import onnx_ir as ir

import exporter.flavours
from exporter import _discover
from exporter.errors import UsageError
from exporter.flavours._contract import Flavour, Refused

LANGUAGE_MODEL = ("prefill", "decode")


def apply(
    name: str, backend: str, folder: Path, files: Mapping[str, str], log: Callable[[str], None], places_shared: bool = False
) -> dict[str, str]:  # fmt: skip
    """Role → file of the language model's graphs in a flavour: new files, or the plain ones if it refuses one of them.

    Args:
        backend: what will run them. files: role → file of the plain graphs, in `folder`. places_shared: whether two tokens of a row
            may have the same `order`.
    Raises:
        UsageError: no such flavour, or it is for another backend.
    """
    flavour: Flavour = _discover.load(exporter.flavours, "flavour", name).FLAVOUR
    if flavour.backend != backend:
        raise UsageError(
            f'Flavour "{name}" is for backend "{flavour.backend}"; the profile has "{backend}". Leave `flavour` out of [stack].'
        )
    plain = {role: files[role] for role in LANGUAGE_MODEL}
    models = {file: ir.load(folder / file) for file in plain.values()}
    try:
        if places_shared and not flavour.places_shared:
            raise Refused("CLS is kept at the place of the first patch, and attention would be by place alone")
        for model in models.values():
            flavour.rewrite(model)
    except Refused as e:
        log(f"flavour {name} does not take these graphs, they stay plain: {e}")
        return plain
    for file, model in models.items():
        ir.save(model, folder / _name(file, name))
    return {role: _name(file, name) for role, file in plain.items()}


def plain_name(file: str) -> str:
    """The graph of record of a flavoured one, or of itself: "decode.ort.onnx" → "decode.onnx" """
    return f"{file.partition('.')[0]}.onnx"


def _name(file: str, flavour: str) -> str:
    """ "decode.onnx" → "decode.ort.onnx" """
    return f"{Path(file).stem}.{flavour}.onnx"
