"""The plugins through TensorRT's Python interface, on the base classes of TensorRT-RTX, which has them, and the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from ctypes.util import find_library
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from exporter.backends import _plugins
from exporter.errors import EnvironmentMismatch
from plugins import _ipluginv3
from plugins._apply import load
from plugins._contract import DOMAIN, VERSION
from plugins._library import FOLDER, Library
from tests.conftest import needs_rtx
from tests.plugins import host

ALIVE: list[Any] = []
"""Fields, which collections point to."""
CASES = [(name, i) for name in ("kv_compact", "token_merge", "token_select") for i in range(len(load(name).cases))]
pytestmark = needs_rtx


@pytest.fixture
def trt() -> Any:
    """TensorRT-RTX, but with sizes that can be had without building."""
    import tensorrt_rtx

    own = {name: getattr(tensorrt_rtx, name) for name in dir(tensorrt_rtx)}
    return SimpleNamespace(**(own | {"DimsExprs": lambda count: [0] * count}))


class Builder:
    """Sizes are numbers."""

    def constant(self, value: int) -> int:
        return value

    def operation(self, kind: Any, first: int, second: int) -> int:
        assert kind.name == "SUM"
        return first + second


def described(trt: Any, array: Any) -> Any:
    found = trt.PluginTensorDesc()
    kinds = {"float32": trt.DataType.FLOAT, "float16": trt.DataType.HALF, "int64": trt.DataType.INT64}
    found.type, found.format, found.dims = kinds[str(array.dtype)], trt.TensorFormat.LINEAR, trt.Dims(array.shape)
    return found


def dynamic(trt: Any, array: Any) -> Any:
    found = trt.DynamicPluginTensorDesc()
    found.desc = described(trt, array)
    found.min = found.opt = found.max = trt.Dims(array.shape)
    return found


def fields(trt: Any, values: dict[str, int]) -> Any:
    kind = trt.PluginFieldType.INT64
    ALIVE.extend(trt.PluginField(k, np.array([v], np.int64), kind) for k, v in values.items())
    return trt.PluginFieldCollection(ALIVE[len(ALIVE) - len(values) :])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("name", "number"), CASES)
def test_a_plugin_lives_through_build_and_run(trt: Any, library: Library, name: str, number: int, dtype: str) -> None:
    """Asked in TensorRT's order; what it computes is what the kernels do."""
    case = load(name).cases[number]
    inputs = host.values(case, np.random.default_rng(number), dtype)
    wanted = host.call(library, name, inputs, case.attributes)
    made = _ipluginv3.creator(trt, library, name)
    assert [f.name for f in made.field_names] == list(case.attributes)
    first = made.create_plugin("node", fields(trt, dict(case.attributes)), trt.TensorRTPhase.BUILD)
    assert first.get_output_data_types([described(trt, x).type for x in inputs]) == [
        described(trt, x).type for x in wanted
    ]

    shapes = first.get_output_shapes([list(x.shape) for x in inputs], [], Builder())
    assert [tuple(dims) for dims in shapes] == [x.shape for x in wanted]

    everything = [dynamic(trt, x) for x in [*inputs, *wanted]]
    assert all(first.supports_format_combination(i, everything, len(inputs)) for i in range(len(everything)))
    first.configure_plugin(everything[: len(inputs)], everything[len(inputs) :])
    stored = first.get_fields_to_serialize()
    again = made.create_plugin("node", stored, trt.TensorRTPhase.RUNTIME).attach_to_context(None)
    assert (again.num_outputs, again.plugin_name, again.plugin_namespace) == (len(wanted), name, DOMAIN)
    size = again.get_workspace_size([dynamic(trt, x) for x in inputs], [])
    scratch = np.full(size + 16, 0xAB, np.uint8)
    outputs = [np.zeros_like(x) for x in wanted]
    again.on_shape_change([], [])
    again.enqueue(
        [described(trt, x) for x in inputs], [described(trt, x) for x in outputs],
        [x.ctypes.data for x in inputs], [x.ctypes.data for x in outputs], scratch.ctypes.data + -scratch.ctypes.data % 16, 0,
    )  # fmt: skip
    for ours, kernels in zip(outputs, wanted, strict=True):
        np.testing.assert_array_equal(ours, kernels)


def test_other_types_and_layouts_are_refused(trt: Any, library: Library) -> None:
    made = _ipluginv3.creator(trt, library, "token_merge")
    node = made.create_plugin("node", fields(trt, {"r": 1, "protected": 0}), trt.TensorRTPhase.BUILD)
    metric = dynamic(trt, np.zeros((1, 4, 2), np.float32))
    assert node.supports_format_combination(0, [metric], 1)
    for change in ({"type": trt.DataType.INT64}, {"type": trt.DataType.INT8}, {"format": trt.TensorFormat.CHW32}):
        other = dynamic(trt, np.zeros((1, 4, 2), np.float32))
        desc = other.desc
        for key, value in change.items():
            setattr(desc, key, value)
        other.desc = desc
        assert not node.supports_format_combination(0, [other], 1)


def test_what_is_wrong_is_told(trt: Any, library: Library) -> None:
    made = _ipluginv3.creator(trt, library, "token_select")
    with pytest.raises(ValueError, match="token_select: the node lost has no integer `keep`"):
        made.create_plugin("lost", fields(trt, {"tokens": 5, "tensors": 0}), trt.TensorRTPhase.BUILD)
    score = np.zeros((1, 5000), np.float32)
    node = made.create_plugin("n", fields(trt, {"tokens": 5000, "keep": 2, "tensors": 0}), trt.TensorRTPhase.RUNTIME)
    index = np.zeros((1, 2), np.int64)
    with pytest.raises(ValueError, match="token_select: more than 4096 scores in a row"):
        node.enqueue([described(trt, score)], [described(trt, index)], [score.ctypes.data], [index.ctypes.data], 0, 0)


def test_overrides_are_what_tensorrt_calls(trt: Any, library: Library) -> None:
    """Names of methods, against TensorRT-RTX's own classes: one that is misspelt would never be called."""
    made = _ipluginv3.creator(trt, library, "token_merge")
    node = made.create_plugin("node", fields(trt, {"r": 1, "protected": 0}), trt.TensorRTPhase.BUILD)
    for thing in (made, node):
        bases = {name for base in type(thing).__bases__ for name in dir(base)}
        assert {name for name in vars(type(thing)) if not name.startswith("_")} <= bases


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What a test registers is taken back."""
    import tensorrt_rtx

    before = len(_ipluginv3._known)
    yield
    for made in _ipluginv3._known[before:]:
        tensorrt_rtx.get_plugin_registry().deregister_creator(made)
    del _ipluginv3._known[before:]


@pytest.mark.usefixtures("forgotten")
def test_a_library_without_the_wrapper_is_registered_by_python(library: Library) -> None:
    import tensorrt_rtx

    registry = tensorrt_rtx.get_plugin_registry()
    assert not library.wrapped
    assert registry.get_creator("kv_compact", VERSION, DOMAIN) is None
    for _ in range(2):  # as for two engines
        _plugins.load(tensorrt_rtx, str(library.file))
    assert {n for n in library.names if registry.get_creator(n, VERSION, DOMAIN) is not None} == set(library.names)
    assert len([c for c in _ipluginv3._known if c.name == "kv_compact"]) == 1


def test_something_else_is_refused(trt: Any, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentMismatch, match=r"none\.so is no library of these plugins(.|\n)*cmake -S"):
        _plugins.load(trt, str(tmp_path / "none.so"))
    with pytest.raises(EnvironmentMismatch, match="is no library of these plugins"):
        _plugins.load(trt, find_library("m") or "libm.so.6")


def test_the_header_and_its_mirror_agree() -> None:
    """`Axis` of _plugin.h, field by field."""
    text = (FOLDER / "_plugin.h").read_text().partition("struct Axis {")[2].partition("};")[0]
    assert [line.split() for line in text.strip().splitlines()] == [
        ["int32_t", "input;"],
        ["int32_t", "axis;"],
        ["int64_t", "plus;"],
    ]
