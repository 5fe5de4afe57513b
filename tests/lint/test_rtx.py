"""The table of TensorRT-RTX 1.7 and its parser and builder agree, graph by graph and operator by operator."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import defs

from exporter.lint import _check, _table
from tests.conftest import needs_rtx
from tests.lint.graphs import CASES, TWINS

pytestmark = needs_rtx
TABLE = _table.load("tensorrt_rtx-1.7")
WORKER = Path(__file__).with_name("_rtx_worker.py")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    for name, made in CASES.items():
        onnx.save(made(), folder / f"{name}.onnx")
    for name, made in TWINS.items():
        onnx.save(made(), folder / f"{name}.twin.onnx")
    return folder


@pytest.fixture(scope="module")
def taken(graphs: Path) -> dict[str, dict[str, Any]]:
    """What became of each graph. {} if it ended the process."""
    files = sorted(graphs.glob("*.onnx"))
    while left := [path for path in files if not path.with_suffix(".json").exists()]:
        subprocess.run([sys.executable, str(WORKER), str(graphs)], capture_output=True, timeout=100, check=False)
        assert left[0].with_suffix(".json").exists(), "the worker does not start"
    return {path.stem: json.loads(path.with_suffix(".json").read_text() or "{}") for path in files}


@pytest.mark.parametrize("name", CASES)
def test_the_table_says_what_happens(graphs: Path, taken: dict[str, dict[str, Any]], name: str) -> None:
    """A graph is taken wrongly if one that means something else becomes the same network."""
    found = {finding.verdict for finding in _check.lint(graphs / f"{name}.onnx", TABLE)}
    result = taken[name]
    if not result:
        assert found in ({"rejected"}, {"miscompiled"}), "it ends the process"
    elif not result["built"]:
        assert found == {"rejected"}, result["errors"]
    elif name in TWINS and result["layers"] == taken[f"{name}.twin"]["layers"]:
        assert found == {"miscompiled"}, result["layers"]
    else:
        assert found == set(), result["layers"]


def test_importers_are_those_of_the_parser() -> None:
    script = """
import json, sys, tensorrt_rtx as trt
logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
builder = trt.Builder(logger)
parser = trt.OnnxParser(builder.create_network(0), logger)
print(trt.__version__)
print(json.dumps([name for name in json.loads(sys.argv[1]) if parser.supports_operator(name)]))
"""
    names = sorted({schema.name for schema in defs.get_all_schemas_with_history() if schema.domain == ""})
    done = subprocess.run([sys.executable, "-c", script, json.dumps(names)], capture_output=True, text=True, check=True)
    version, supported = done.stdout.splitlines()[-2:]
    assert version.startswith(TABLE.version + ".")
    assert {name for domain, name in TABLE.operators if domain == ""} == set(json.loads(supported))
