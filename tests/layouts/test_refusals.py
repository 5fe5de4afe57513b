"""What other runtimes have no place for is refused in words, and nothing is changed then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import exporter.layouts
from exporter import _discover
from exporter.errors import UsageError
from exporter.graphset import GraphSet
from exporter.layouts._contract import Layout
from exporter.layouts._write import made
from profiles import _schema
from tests.conftest import Said
from tests.test_graphset import example


def changed(visual: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **more: Any) -> GraphSet:
    graphs = example()
    return replace(
        graphs, visual=replace(graphs.visual, **visual or {}), text=replace(graphs.text, **text or {}), **more
    )


INSIDE = {"place": "in_llm", "spec": "fastv:layer=1,keep=2", "before": 4, "after": 2}
REFUSED = {
    "fastv acts inside the language model": changed(reductions=[{"name": "fastv", **INSIDE}]),
    "a reduction acts inside the language model or its cache": changed(visual={"readers": [7]}),
    "its reduction also reads text, text_mask": changed(side={"text": ["text", 8], "text_mask": ["text"]}),
    "its reduction also reads warp": changed(side={"warp": [1, 4]}),
    "merged tokens count as many times as they have parts": changed(sized=True),
    "how many tokens each of its 2 images keeps": changed(visual={"placeholders": 2, "kept": 2}),
    "some layers look back 16 tokens": changed(visual={"kept": 2}, text={"window": 16}),
    "its positions are learned ones": changed(visual={"kept": 2}, text={"longest": 32}),
}


@pytest.mark.parametrize("why", REFUSED)
def test_genai_says_what_it_has_no_place_for(why: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="onnxruntime-genai cannot run this model: ") as e:
        made("genai", REFUSED[why], tmp_path, _schema.load("cpu_fp32"))
    assert why in str(e.value)


def test_genai_runs_no_engines_of_tensorrt(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"profile `orin_nano_8gb_int4` is for trt engines.*export for a profile of that"
    ):
        made("genai", example(), tmp_path, _schema.load("orin_nano_8gb_int4"))


@pytest.mark.parametrize(("kept", "why"), [(2, "make room for 4 and get 2"), (4, "a wrong prompt")])
def test_edgellm_is_refused(kept: int, why: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"own attention plugin and paged cache.*{why}.*--visualPrune"):
        made("edgellm", changed(visual={"kept": kept}), tmp_path, _schema.load("orin_nano_8gb_int4"))


def test_layouts_keep_their_contract() -> None:
    names = _discover.names(exporter.layouts)
    assert {"edgellm", "genai"} <= set(names)
    for name in names:
        assert isinstance(_discover.load(exporter.layouts, "layout", name).LAYOUT, Layout)


def test_a_refused_layout_changes_nothing(tmp_path: Path, edgetrim: Callable[..., Said]) -> None:
    out = tmp_path / "out"
    assert edgetrim("export", "embedded", "-r", "fastv:layer=2,keep=16", "-p", "cpu_fp32", "-o", out).code == 0
    assert edgetrim("pack", out).code == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for layout, why in (
        ("genai", "fastv acts inside the language model"),
        ("edgellm", "TensorRT Edge-LLM cannot run this model"),
        ("gennai", "Unknown layout 'gennai'. Did you mean 'genai'?"),
    ):
        said = edgetrim("pack", out, "--layout", layout)
        assert said.code == 2
        assert why in " ".join(said.err.split())
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
