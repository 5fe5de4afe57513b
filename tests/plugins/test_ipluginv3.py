"""The IPluginV3 wrapper, compiled against TensorRT's headers and driven as TensorRT would, on the CPU.

The headers are in JetPack, in TensorRT's full package, and for every version in its open-source repository (include/): name the
folder above them in TENSORRT_ROOT.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plugins._apply import load
from plugins._library import FOLDER, Library, _tensors
from tests.plugins import host

CASES = [(name, i) for name in ("kv_compact", "token_merge", "token_select") for i in range(len(load(name).cases))]


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory, library: Library) -> Any:
    root = Path(os.environ.get("TENSORRT_ROOT", "/usr"))
    if not (root / "include/NvInferRuntime.h").is_file():
        pytest.skip("no TensorRT headers: name the folder with include/NvInferRuntime.h in TENSORRT_ROOT")
    cuda = Path(
        os.environ.get("CUDA_HOME") or Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc").resolve().parents[1]
    )
    if not (cuda / "include/cuda_runtime_api.h").is_file():
        cuda = Path("/usr/local/cuda")
    if not (cuda / "include/cuda_runtime_api.h").is_file():
        pytest.skip("no CUDA headers: name the toolkit's folder in CUDA_HOME")
    folder = tmp_path_factory.mktemp("ipluginv3")
    sources = [FOLDER / "_ipluginv3.cpp", Path(__file__).with_name("drive.cpp")]
    objects = sorted(Path(library.file).parent.glob("*.o"))
    includes = ["-I", FOLDER, "-isystem", root / "include", "-isystem", cuda / "include"]
    host.run(
        [host.COMPILER, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", *includes, *sources, "-x", "none", *objects,
         "-o", folder / "libdriven.so"]
    )  # fmt: skip
    found = ctypes.CDLL(str(folder / "libdriven.so"))
    found.drive.restype = ctypes.c_char_p
    return found


def drive(
    driven: Any, library: Library, name: str, inputs: list[Any], attributes: dict[str, int]
) -> tuple[str | None, list[Any]]:
    given = [host.memory(x) for x in inputs]
    outputs = [np.zeros(shape, dtype) for shape, dtype in library.outputs(name, given, attributes)]
    keys = [a.encode() for a in attributes]
    wrong = driven.drive(
        name.encode(), _tensors(given), len(inputs), _tensors([host.memory(x) for x in outputs]), len(outputs),
        (ctypes.c_char_p * len(keys))(*keys), (ctypes.c_int32 * len(keys))(*attributes.values()), len(keys),
    )  # fmt: skip
    return wrong and wrong.decode(), outputs


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("name", "number"), CASES)
def test_a_plugin_lives_through_build_and_run(
    driven: Any, library: Library, name: str, number: int, dtype: str
) -> None:
    case = load(name).cases[number]
    inputs = host.values(case, np.random.default_rng(number), dtype)
    wrong, found = drive(driven, library, name, inputs, dict(case.attributes))
    assert wrong is None
    for ours, kernels in zip(found, host.call(library, name, inputs, case.attributes), strict=True):
        np.testing.assert_array_equal(ours, kernels)


def test_what_a_kernel_refuses_is_logged(driven: Any, library: Library) -> None:
    attributes = dict(tokens=5000, keep=2, tensors=0)
    wrong, _ = drive(driven, library, "token_select", [np.zeros((1, 5000), np.float32)], attributes)
    assert wrong == "not run: token_select: more than 4096 scores in a row"


def test_a_missing_attribute_is_logged(driven: Any, library: Library) -> None:
    inputs = [np.zeros((1, 5), np.float32)]
    given = [host.memory(x) for x in inputs]
    keys = (ctypes.c_char_p * 3)(b"tokens", b"kept", b"tensors")
    wrong = driven.drive(b"token_select", _tensors(given), 1, _tensors([]), 0, keys, (ctypes.c_int32 * 3)(5, 2, 0), 3)
    assert wrong == b"not created: token_select: the node has no integer `keep`"
