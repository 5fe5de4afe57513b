"""Tables that are read strictly, and what they find in graphs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import defs, helper

from exporter.errors import ExportError
from exporter.lint import _check, _conditions, _table
from profiles import _schema
from profiles._schema import Stack
from tests.lint.graphs import BOOL, CASES, F32, I64, Graph, attend

TABLES = {name: _table.load(name) for name in _table.names()}


def found(model: onnx.ModelProto, table: str, folder: Path) -> list[_check.Finding]:
    onnx.save(model, folder / "graph.onnx")
    return _check.lint(folder / "graph.onnx", TABLES[table])


@pytest.mark.parametrize("name", TABLES)
def test_tables_name_operators_that_there_are(name: str) -> None:
    """Of ONNX's own; four are older than its schemas, or TensorRT's."""
    known = {schema.name for schema in defs.get_all_schemas_with_history() if schema.domain == ""}
    others = {"ImageScaler", "ParametricSoftplus", "ScaledTanh", "DistCollective"}
    own = {operator for domain, operator in TABLES[name].operators if domain == ""}
    assert {n for n in own - known if not n.startswith("TRT_")} <= others
    assert len(own) > 140


def test_what_came_when() -> None:
    """onnx-tensorrt's changelog, and TensorRT's release notes."""
    since = {
        "tensorrt-10.3": {"Gelu", "LayerNormalization", "GroupNormalization", "DeformConv"},
        "tensorrt-10.16": {"Attention", "RotaryEmbedding", "RMSNormalization", "TensorScatter", "STFT"},
        "tensorrt-11.4": {"Swish", "DFT", "TRT_Attention", "TRT_KVCacheUpdate"},
    }
    names = list(since)
    assert set(names) < set(TABLES)
    for i, name in enumerate(names):
        for operator in since[name]:
            assert [("", operator) in TABLES[n].operators for n in names] == [k >= i for k in range(len(names))], (
                operator
            )


@pytest.mark.parametrize(
    ("stack", "expected"),
    [
        (("tensorrt", "10.3"), "TensorRT 10.3"),
        (("tensorrt", "10.8"), "TensorRT 10.3"),
        (("tensorrt", "10.16"), "TensorRT 10.16"),
        (("tensorrt", "11.5"), "TensorRT 11.4"),
        (("tensorrt", "8.6"), "TensorRT 10.3"),
        (("tensorrt_rtx", "1.7"), "TensorRT-RTX 1.7"),
    ],
)
def test_the_table_of_a_stack(stack: tuple[Any, str], expected: str) -> None:
    table = _table.table_for(Stack("trt", *stack, compute_capabilities=(87,)))
    assert table is not None
    assert table.name == expected


def test_a_profiles_plugins_are_taken(tmp_path: Path) -> None:
    g = Graph()
    model = g.model(g.op("token_merge", g.input("x", [4, 8]), domain="edgetrim"), shape=[4, 8])
    onnx.save(model, tmp_path / "g.onnx")
    for plugins, count in (((), 1), (("token_merge",), 0)):
        table = _table.table_for(Stack("trt", "tensorrt", "10.3", compute_capabilities=(87,), plugins=plugins))
        assert table is not None
        assert len(_check.lint(tmp_path / "g.onnx", table)) == count


@pytest.mark.parametrize("name", _schema.names())
def test_every_profile_of_tensorrt_has_a_table(name: str) -> None:
    stack = _schema.load(name).stack
    assert (_table.table_for(stack) is None) == (stack.backend == "ort")


CASES_10_3 = {
    "layer_normalization_mean": "only the first output",
    "scatter_nd_none": "whatever it says",
    "group_normalization": "read as that of opset 18",
    "topk_3841": "`K` is above 3840",
    "argmax_1d": "at least 2 axes",
    "dequantize_uint4": "is UINT4; taken: FP8, INT4, INT8",
    "dequantize_int4_zero_point": "the zero point must be 0",
    "dequantize_int4_odd": "even last axis",
    "resize_antialias": "antialiasing",
    "reduce_computed_axes": "`axes` must be an initializer",
    "matmul_integers": "is INT64; taken: BF16, FP16, FP32",
    "cumsum_integers": "is INT64",
    "boolean_equal": "is BOOL",
    "grid_sample_3d": "only images of 2 dimensions",
    "einsum_ellipsis": "ellipses",
    "swish": "has no importer",
    "bitwise_and": "has no importer",
    "contrib_matmul_bits": "has no importer",
    "uint8_transposed": "is UINT8",
}


@pytest.mark.parametrize("case", CASES_10_3)
def test_tensorrt_10_3(case: str, tmp_path: Path) -> None:
    findings = found(CASES[case](), "tensorrt-10.3", tmp_path)
    assert any(finding.fatal and CASES_10_3[case] in finding.what for finding in findings), findings


@pytest.mark.parametrize(
    "case",
    "mask_from_positions merge_by_one_hot gather_nd topk_integers scatter_nd_plain dequantize_int4 squeeze_all".split(),
)
@pytest.mark.parametrize("table", TABLES)
def test_what_every_target_takes(table: str, case: str, tmp_path: Path) -> None:
    assert found(CASES[case](), table, tmp_path) == []


@pytest.mark.parametrize("table", ["tensorrt-10.16", "tensorrt-11.4", "tensorrt_rtx-1.7"])
def test_silently_wrong(table: str, tmp_path: Path) -> None:
    for case in ("attention_nonpad", "attention_window", "function_same_name", "function_forwards_attribute"):
        findings = found(CASES[case](), table, tmp_path)
        assert {finding.verdict for finding in findings} == {"miscompiled"}, case


def test_causal_decode_is_what_onnx_says(tmp_path: Path) -> None:
    """The mask begins at the upper left: a single query sees the first key only. So no table calls that miscompiled."""
    model = attend(24, seq=1, total=8, dtype=F32, is_causal=1)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    shapes = {"q": (1, 4, 1, 32), "k": (1, 2, 8, 32), "v": (1, 2, 8, 32)}
    given = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    (out,) = session.run(None, given)
    np.testing.assert_allclose(out, np.repeat(given["v"][:, :, :1], 2, 1), rtol=1e-5)
    assert found(attend(24, seq=1, is_causal=1), "tensorrt-11.4", tmp_path) == []


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("graphs")
    for name, made in CASES.items():
        onnx.save(made(), folder / f"{name}.onnx")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("name", TABLES)
def test_every_rule_has_a_graph(name: str, graphs: list[Path]) -> None:
    """None that no graph could meet: a condition of another input, an attribute that no operator has."""
    table = TABLES[name]
    said = {finding.what for path in graphs for finding in _check.lint(path, table)}
    rules = [*table.functions, *(rule for rules in table.rules.values() for rule in rules)]
    assert {rule.what for rule in rules} - said == set()


def test_slow_is_not_fatal(tmp_path: Path) -> None:
    findings = found(CASES["non_zero"](), "tensorrt-10.3", tmp_path)
    assert [(f.verdict, f.fatal) for f in findings] == [("slow", False)]


def test_every_entry_says_what_to_do_and_who_says_so() -> None:
    for table in TABLES.values():
        for rule in (*table.functions, *(r for rules in table.rules.values() for r in rules)):
            assert rule.fix[0].isupper() and rule.fix.endswith(".")
            assert re.search(r"measured with|onnx-tensorrt|NVIDIA|ONNX opset", rule.source)


# --- where nodes are found --------------------------------------------------------------------------------------------


def test_in_subgraphs_and_functions(tmp_path: Path) -> None:
    def body(name: str) -> onnx.GraphProto:
        node = helper.make_node("NonZero", ["x"], [f"{name}_y"], f"{name}_node")
        return helper.make_graph([node], name, [], [helper.make_tensor_value_info(f"{name}_y", I64, [2, None])])

    g = Graph()
    g.input("x", [4, 8])
    chosen = g.op("If", g.input("c", [], BOOL), then_branch=body("a"), else_branch=body("b"))
    g.function("d", "F", [helper.make_node("Unique", ["x"], ["y"], "inside")])
    g.nodes.append(helper.make_node("F", ["x"], ["z"], "call", domain="d"))
    g.domains["d"] = 1
    model = g.model(chosen)
    assert {f.node for f in found(model, "tensorrt_rtx-1.7", tmp_path)} == {"a_node", "b_node", "inside"}


def test_types_are_inferred_where_the_file_has_none(tmp_path: Path) -> None:
    g = Graph()
    hidden = g.op("Cast", g.input("x", [2, 8]), to=I64)
    model = g.model(g.op("MatMul", hidden, g.constant([[1]] * 8)))
    del model.graph.value_info[:]
    (finding,) = found(model, "tensorrt-10.3", tmp_path)
    assert "is INT64" in finding.what


def test_large_weights_are_not_read(tmp_path: Path) -> None:
    """An external file that is not there is not missed."""
    g = Graph()
    model = g.model(g.op("MatMul", g.input("x", [1, 1024]), g.weight(1024, 64)))
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    (tmp_path / "m.data").unlink()
    assert _check.lint(tmp_path / "m.onnx", TABLES["tensorrt-10.3"]) == []


@pytest.mark.parametrize("data", [b"", b"no graph", b"\x0a\x00"])
def test_what_is_no_graph(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(ExportError, match=r"m\.onnx cannot be read as ONNX"):
        _check.lint(tmp_path / "m.onnx", TABLES["tensorrt-10.3"])


def test_sizes_that_nobody_knows_are_no_finding() -> None:
    model = ir.from_proto(attend(seq="seq", total="total"))
    (node,) = model.graph
    assert _conditions.sizes_differ(node, 23, first=0, second=1, axis=-2), "two names"
    assert not _conditions.sizes_differ(node, 23, first=1, second=2, axis=-2)
    node.inputs[0].shape = ir.Shape([1, 4, None, 32])  # type: ignore[union-attr]
    assert not _conditions.sizes_differ(node, 23, first=0, second=1, axis=-2)


def test_in_words() -> None:
    first = _check.Finding("g.onnx", "a", "TopK", "rejected", "`K` is above 3840", "Rank otherwise.", "a page")
    nodes = [first, *(_check.Finding(*("g.onnx", n, *list(vars(first).values())[2:])) for n in "bcde")]
    assert _check.in_words(nodes) == [
        "g.onnx: TopK `a`, `b`, `c`, `d` and 1 more are rejected: `K` is above 3840. Rank otherwise.\n  Source: a page"
    ]


# --- how tables are read ----------------------------------------------------------------------------------------------

ENTRY = '[[operators]]\nnames = ["TopK"]\nsource = "s"\n'
RULE = 'verdict = "rejected"\nwhat = "w"\nfix = "f"\nsource = "s"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[operators]]\nnames = ["TopK"]\n', r"\[\[operators\]\] has no 'source'"),
        (ENTRY + "[[rules]]\n", "unknown key 'rules' in the file; Did you mean 'rule'"),
        (ENTRY + f'[[rule]]\noperators = ["TopK"]\n{RULE.replace("rejected", "refused")}', "verdict 'refused'"),
        (
            ENTRY + f'[[rule]]\noperators = ["TopK"]\nwhen.input_givn = {{ input = 1 }}\n{RULE}',
            "Did you mean 'input_given'",
        ),
        (ENTRY + f'[[rule]]\noperators = ["TopK"]\nwhen.input_given = {{ index = 1 }}\n{RULE}', r"takes \['input'\]"),
        (
            ENTRY + f'[[rule]]\noperators = ["TopK"]\nwhen.input_given = {{ input = "1" }}\n{RULE}',
            "'input' .* must be int",
        ),
        (ENTRY + f'[[rule]]\noperators = ["TopK"]\nwhen.name_elsewhere = {{}}\n{RULE}', "unknown condition"),
        (ENTRY + f'[[rule]]\noperators = ["Topk"]\n{RULE}', "Topk has types or rules, but no"),
        (ENTRY + f'[[rule]]\noperators = ["TopK"]\n{RULE.replace(chr(34) + "f" + chr(34), chr(34) * 2)}', "'fix' of"),
        (ENTRY + '[[types]]\noperators = ["TopK", "TopK2"]\ntypes = []\nsource = "s"\n', "'types' of"),
    ],
)
def test_mistakes_in_a_table(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tensorrt-9.9.toml"
    path.write_text(text)
    with pytest.raises(ExportError, match=rf"^tensorrt-9\.9\.toml: .*{message}"):
        _table.read(path)
