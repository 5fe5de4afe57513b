"""Layers in groups, by hand."""

from __future__ import annotations

from exporter.backends._contract import Layer
from exporter.report import Layers, render
from exporter.report.layers import RUNTIMES_OWN, SHOWN, Group, by_kind, by_module, milliseconds
from tests.report.sample import sample

LAYERS = [
    Layer("a", "MatMul", ("layers/0/mlp/up_proj",), "", "", 1.0),
    Layer("b", "MatMul", ("layers/11/mlp/down_proj", "fastv"), "", "", 2.0),
    Layer("c", "Gelu", ("layers/3/mlp/Mul/QuickGeluFusion",), "", "", 0.5),
    Layer("d", "TopK", ("visionzip/MatMul/Fusion//Other",), "", "", 4.0),
    Layer("e", "Reshape", ("embeddings/_hook",), "", "", 0.25),
    Layer("f", "Reshape", (), "", "", 0.25),
    Layer("g", "", ("Add/Fusion",), "", "", 0.0),
]


def test_alike_modules_of_all_layers_are_one_group_the_longest_first() -> None:
    assert by_module(LAYERS) == [
        Group("visionzip", 1, 4.0),
        Group("layers/*/mlp/down_proj", 1, 2.0),
        Group("layers/*/mlp/up_proj", 1, 1.0),
        Group("layers/*/mlp", 1, 0.5),
        Group(RUNTIMES_OWN, 2, 0.25),
        Group("embeddings", 1, 0.25),
    ]


def test_operators() -> None:
    groups = {g.name: (g.layers, g.ms) for g in by_kind(LAYERS)}
    assert groups == {"MatMul": (2, 3.0), "TopK": (1, 4.0), "Gelu": (1, 0.5), "Reshape": (2, 0.5), "(not told)": (1, 0.0)}  # fmt: skip


def test_one_layer_without_a_time_is_a_sum_without_one() -> None:
    untimed = [*LAYERS, Layer("h", "TopK", (), "", "")]
    assert milliseconds(LAYERS) == 8.0 and milliseconds(untimed) is None
    assert next(g for g in by_kind(untimed) if g.name == "TopK") == Group("TopK", 2, None)
    page = render(sample(layers=Layers("tensorrt 10.3, Orin", 16, {"vision": [Layer("x", "kgen", (), "", "")], "decode": []})))  # fmt: skip
    assert "Milliseconds not measured: tensorrt 10.3, Orin does not tell those of its layers." in page
    assert "not measured: tensorrt 10.3, Orin does not tell its layers." in page


def test_a_page_lists_so_many_layers_and_says_so() -> None:
    many = [Layer(f"layer{i}", "Add", (), "", "", 0.0) for i in range(SHOWN + 1)]
    page = render(sample(layers=Layers("x", 2, {"vision": many})))
    assert f"layer{SHOWN - 1}<" in page and f"layer{SHOWN}<" not in page and "the first 1,000" in page
    assert "1,001 layers" in page
