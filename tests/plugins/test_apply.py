"""Plugins in exported graphs: found where they are, and the results are those of the plain graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from exporter.backends._contract import Array
from exporter.families._contract import Request
from exporter.graphset import GraphSet
from exporter.stages.export import export
from plugins._contract import DOMAIN
from plugins._library import Library
from tests.families import tiny
from tests.plugins import host

ALL = ("kv_compact", "token_merge", "token_select")

Exported = Callable[[str], tuple[Path, GraphSet, list[str]]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """exported(reduction): folder, graphs and log, for full TensorRT with all plugins but in FP32."""
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    tiny.llava(checkpoint)

    @cache
    def run(reduction: str) -> tuple[Path, GraphSet, list[str]]:
        folder, log = tmp_path_factory.mktemp("graphs"), list[str]()
        plan = tiny.plan(checkpoint, (reduction,), Request(1, None))
        stack = replace(plan.profile.stack, backend="trt", module="tensorrt", flavour=None, plugins=ALL)
        plan = replace(plan, profile=replace(plan.profile, stack=stack))
        return folder, export(plan, folder, log.append), log

    return run


@pytest.mark.parametrize(
    ("reduction", "file", "nodes"),
    [
        ("fastv:layer=1,keep=3", "prefill", ["layers/token_select"]),
        pytest.param("tome:keep_ratio=0.5", "vision", ["token_merge"] * 2, marks=pytest.mark.slow),
        ("dyrate:layer=1,keep=5,step_list=3+20,keep_list=3+2", "shorten_1", ["token_select", "kv_compact"]),
    ],
    ids=["fastv", "tome", "dyrate"],
)
def test_results_are_those_of_the_plain_graph(
    exported: Exported, library: Library, reduction: str, file: str, nodes: list[str]
) -> None:
    folder, graphs, log = exported(reduction)
    plain, plugged = folder / f"{file}.onnx", folder / graphs.plugged[f"{file}.onnx"]
    model = ir.load(plugged)
    found = sorted(node.op_type for node in model.graph if node.domain == DOMAIN)
    assert found == sorted(n.rpartition("/")[2] for n in nodes)
    for kind in set(found):
        assert any(line.startswith(f"plugin {kind}: ") for line in log)
    feeds = random_feeds(ir.load(plain))
    session = ort.InferenceSession(plain, providers=["CPUExecutionProvider"])
    wanted = dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))
    ours = dict(zip([v.name for v in model.graph.outputs], host.evaluate(library, plugged, feeds), strict=True))
    assert list(ours) == list(wanted)
    for name, theirs in wanted.items():
        np.testing.assert_allclose(ours[name], theirs, rtol=1e-4, atol=1e-5, err_msg=name)


def random_feeds(model: ir.Model) -> dict[str, Array]:
    """A sample of batch 2: indices and orders ascend."""
    draw, sizes = np.random.default_rng(0), {"batch": 2, "seq": 20, "past": 21, "row": 26}
    feeds: dict[str, Array] = {}
    for value in model.graph.inputs:
        assert value.shape is not None and value.name is not None
        shape = [d if isinstance(d, int) else sizes[str(d)] for d in value.shape]
        if value.dtype == ir.DataType.INT64:
            feeds[value.name] = np.broadcast_to(np.arange(shape[-1]), shape).copy()
        else:
            feeds[value.name] = draw.normal(size=shape).astype(np.float32)
    return feeds


def test_the_plain_graphs_stay_those_of_all_roles(exported: Exported) -> None:
    folder, graphs, log = exported("fastv:layer=1,keep=3")
    assert graphs.files["prefill"] == "prefill.onnx"
    assert graphs.plugged == {"prefill.onnx": "prefill.plugins.onnx"}
    assert GraphSet.load(folder) == graphs
    assert "warning: plugin token_merge has nothing to replace in these graphs" in log
    attributes = {
        a.name: a.value
        for n in ir.load(folder / "prefill.plugins.onnx").graph
        if n.domain == DOMAIN
        for a in n.attributes.values()
    }
    assert attributes == {
        "tokens": 16, "keep": 3, "tensors": 3, "plugin_version": "1", "plugin_namespace": "edgetrim",
    }  # fmt: skip
