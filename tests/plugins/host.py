"""The kernels of plugins/, compiled for the CPU, and graphs run with them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.backends._contract import Array
from plugins._contract import DOMAIN, Case
from plugins._library import FOLDER, Library, Memory

COMPILER = os.environ.get("CXX") or "g++"


def build(folders: pytest.TempPathFactory) -> Library:
    """The kernels, compiled once in a run."""
    return _build(folders.getbasetemp() / "kernels")


@cache
def _build(folder: Path) -> Library:
    """Compile all kernels with the C++ compiler."""
    folder.mkdir()
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no C++ compiler ({COMPILER}) to compile the kernels for the CPU")
    probe = folder / "probe.cpp"
    probe.write_text("#include <ucontext.h>\n_Float16 half;\n")
    if subprocess.run([COMPILER, "-fsyntax-only", str(probe)], capture_output=True).returncode:
        pytest.skip(f"{COMPILER} has no _Float16 here, or no ucontext.h")
    sources = [*sorted(FOLDER.glob("[a-z]*.cu")), FOLDER / "_library.cpp"]

    def compiled(source: Path) -> Path:
        out = folder / f"{source.name}.o"
        command = [
            COMPILER,
            "-std=c++17",
            "-O1",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-Wno-unknown-pragmas",
            "-fPIC",
            "-x",
            "c++",
        ]
        run([*command, "-c", source, "-o", out])
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    run([COMPILER, "-shared", *objects, "-o", folder / "libhost.so"])
    return Library(folder / "libhost.so")


def run(command: Sequence[object]) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def memory(array: Array) -> Memory:
    assert array.flags.c_contiguous
    return Memory(array.ctypes.data, array.shape, str(array.dtype))


def call(library: Library, name: str, inputs: Sequence[Array], attributes: Mapping[str, int]) -> list[Array]:
    """Run a plugin on host memory. What it does not write is not a number, or -1."""
    given = [memory(np.ascontiguousarray(x)) for x in inputs]
    outputs = [
        np.full(shape, -1 if dtype == "int64" else np.nan, dtype)
        for shape, dtype in library.outputs(name, given, attributes)
    ]
    scratch = np.full(library.workspace(name, given, attributes) + 16, 0xAB, np.uint8)
    library.run(name, given, [memory(x) for x in outputs], attributes, scratch.ctypes.data + -scratch.ctypes.data % 16)
    return outputs


def values(case: Case, draw: np.random.Generator, dtype: str) -> list[Array]:
    """Inputs of a case. Scores tie often; among equals there are both zeros."""
    found: list[Array] = []
    for name, shape in case.inputs:
        if name == "score":
            score = np.round(draw.normal(size=shape) * 8).astype(np.float32)
            found.append(np.where((score == 0) & (draw.random(shape) < 0.5), np.float32(-0.0), score))
        elif name == "index":
            found.append(ascending(shape, case.attributes["tokens"], draw))
        elif name == "size":
            found.append(draw.integers(1, 5, shape).astype(np.float32))
        elif name == "metric":  # cosines are multiples of 1 / depth, so many are equal
            found.append(draw.choice([-1, 1], shape).astype(dtype))
        else:
            found.append(draw.normal(size=shape).astype(dtype))
    return found


def ascending(shape: tuple[int, ...], below: int, draw: np.random.Generator) -> Array:
    """int64, ascending along the last axis."""
    rows = int(np.prod(shape[:-1]))
    if shape[-1] > below:  # not an index, but values
        return draw.integers(0, 2**40, shape)
    return (
        np.stack([np.sort(draw.permutation(below)[: shape[-1]]) for _ in range(rows)]).reshape(shape).astype(np.int64)
    )


def evaluate(library: Library, model: Path, feeds: Mapping[str, Array]) -> list[Array]:
    """Run a graph with plugin nodes: those by the kernels, all others by ONNX's reference evaluator."""
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    def operator(name: str) -> type[OpRun]:
        def _run(self: Any, *inputs: Array, **attributes: Any) -> tuple[Array, ...]:
            given = {a: int(getattr(self, a)) for a in library.attributes(name)}
            return tuple(call(library, name, inputs, given))

        return type(name, (OpRun,), {"op_domain": DOMAIN, "_run": _run})

    evaluator = ReferenceEvaluator(str(model), new_ops=[operator(n) for n in library.names])
    found: list[Array] = evaluator.run(None, dict(feeds))
    return found
