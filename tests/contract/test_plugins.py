"""Every plugin: a pair of files, whose node computes what the subgraph does that it replaces."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

import plugins
from exporter import _discover
from exporter.backends._contract import Array
from exporter.stages._trace import trace
from plugins._apply import load, replace
from plugins._contract import Case, Plugin
from plugins._library import FOLDER, Library
from tests.plugins import host

NAMES = _discover.names(plugins)
CASES = [(name, i) for name in NAMES for i in range(len(load(name).cases))]
TARGETS = ("87", "90", "100", "120")
"""Orin, Hopper, Blackwell for the datacenter and for workstations."""

by_case = pytest.mark.parametrize(("name", "number"), CASES, ids=lambda v: str(v))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return host.build(tmp_path_factory)


def given(name: str, number: int, dtype: str) -> tuple[Plugin, Case, list[Array]]:
    plugin = load(name)
    case = plugin.cases[number]
    return plugin, case, host.values(case, np.random.default_rng(number), dtype)


def same(found: list[Array], wanted: list[torch.Tensor], dtype: str) -> None:
    """Integers exactly; what only gathers is exact all the more."""
    for ours, theirs in zip(found, wanted, strict=True):
        assert str(ours.dtype) == str(theirs.dtype).removeprefix("torch.")
        exact = not theirs.is_floating_point()
        tolerance = dict(rtol=0, atol=0) if exact else dict(rtol=2e-3 if dtype == "float16" else 2e-6, atol=1e-6)
        np.testing.assert_allclose(ours, theirs.numpy(), **tolerance)


def test_there_are_plugins() -> None:
    assert {"kv_compact", "token_merge", "token_select"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_is_a_pair_of_files(name: str) -> None:
    assert (FOLDER / f"{name}.cu").is_file()
    assert load(name).summary


def test_no_kernel_is_alone() -> None:
    assert {p.stem for p in FOLDER.glob("[a-z]*.cu")} == set(NAMES)


def test_kernels_and_python_say_the_same(library: Library) -> None:
    assert library.names == NAMES
    for name in NAMES:
        assert library.attributes(name) == list(load(name).attributes)


def test_importing_them_is_light() -> None:
    code = f"import sys; from plugins._apply import load; [load(n) for n in {NAMES}]; print([m for m in ('torch', 'onnx', 'onnx_ir') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=FOLDER.parent)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@by_case
def test_kernels_equal_the_subgraph(library: Library, name: str, number: int, dtype: str) -> None:
    plugin, case, inputs = given(name, number, dtype)
    found = host.call(library, name, inputs, case.attributes)
    wanted = plugin.eager([torch.from_numpy(x.copy()) for x in inputs], case.attributes)
    same(found, wanted, dtype)


class Subgraph(torch.nn.Module):
    def __init__(self, plugin: Plugin, case: Case) -> None:
        super().__init__()
        self.plugin, self.case = plugin, case

    def forward(self, values: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(self.plugin.eager(values, self.case.attributes))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_the_traced_subgraph_is_found_and_replaced(library: Library, tmp_path: Path, name: str, dtype: str) -> None:
    """The graph with the plugin's node, run by the kernels, equals the plain graph in ONNX Runtime."""
    plugin, case, inputs = given(name, 0, dtype)
    feeds = {f"x{i}": x for i, x in enumerate(inputs)}
    model = trace(
        Subgraph(plugin, case),
        {"values": [torch.from_numpy(x) for x in inputs]},
        {"values": [{}] * len(inputs)},
        names=list(feeds),
    )
    ir.save(model, tmp_path / "plain.onnx")
    assert replace(model, name, plugin) == 1
    assert [n.op_type for n in model.graph] == [name]
    ir.save(model, tmp_path / "plugged.onnx")
    plain = ort.InferenceSession(tmp_path / "plain.onnx", providers=["CPUExecutionProvider"]).run(None, feeds)
    for ours, theirs in zip(host.evaluate(library, tmp_path / "plugged.onnx", feeds), plain, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-3 if dtype == "float16" else 2e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", [TARGETS[0], *(pytest.param(t, marks=pytest.mark.slow) for t in TARGETS[1:])])
def test_compiles_for(target: str, name: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    host.run(
        [
            nvcc,
            "-std=c++17",
            "-O3",
            "-cubin",
            f"-arch=sm_{target}",
            "-Werror",
            "all-warnings",
            FOLDER / f"{name}.cu",
            "-o",
            tmp_path / "out",
        ]
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@by_case
def test_on_a_gpu(cuda_library: Library, name: str, number: int, dtype: str) -> None:
    from tests.plugins.device import call

    plugin, case, inputs = given(name, number, dtype)
    found = call(cuda_library, name, inputs, case.attributes)
    wanted = plugin.eager([torch.from_numpy(x.copy()) for x in inputs], case.attributes)
    same(found, wanted, dtype)


@pytest.fixture(scope="module")
def cuda_library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Built by CMake, as docs/plugins.md says, for the GPU in this machine."""
    if shutil.which("nvcc") is None or shutil.which("cmake") is None:
        pytest.skip("no nvcc, or no cmake")
    folder = tmp_path_factory.mktemp("build")
    host.run(["cmake", "-S", FOLDER, "-B", folder])
    host.run(["cmake", "--build", folder])
    return Library(folder / "libedgetrim_plugins.so")
