"""The exported graphs on ONNX Runtime against the PyTorch modules, FP32: the same tokens kept, the same logits, the same
answer; every place and kind of method, every family, whole batches and single samples, prefill in one go and step by step.
Every single method as far as the language model: test_methods.py; inside it, against its paper: test_inside.py."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import exporter
import exporter.families
from exporter.errors import UsageError
from exporter.families._contract import Request
from exporter.runtime.sequence import split
from graphs import _spec
from tests.families import tiny
from tests.stages.conftest import SIZES, Engine, Export, Exported, objections

SPLIT = "case"
TOLERANCE = 1e-4
NEW_TOKENS = 64

CLIP = 4
"""Frames of a clip."""

FAMILIES = tuple(SIZES)
"""One token per patch, and a merger with t/h/w positions; all others: test_families.py."""


def adapted(spec: str) -> str:
    """A method's example at the size of these models: half of the tokens stay, other counts are 2."""
    spec = re.sub(r"\bkeep=\d+", "keep_ratio=0.5", spec)
    return re.sub(r"=(\d+)\b(?!\.)", lambda m: m[0] if int(m[1]) < 4 else "=2", spec)


CHOSEN = (
    "uniform",
    "visionzip",
    "lftr",
    "tome",
    *(
        n
        for n in _spec.names()
        if _spec.load(n).place in ("in_llm", "in_cache") and "weights=" not in str(_spec.examples(n))
    ),
)
"""One method of every kind that makes a difference behind the reduce graph, and all that act there and need no weights."""
EXAMPLES = {name: adapted((_spec.examples(name) or (f"{name}:keep=2",))[0]) for name in CHOSEN}

REFUSED = {
    ("qwen2_5_vl", "tome"): "tower cannot be shortened",
    ("qwen2_5_vl", "lftr"): "it needs `cls`",
    ("qwen2_5_vl", "mustdrop_l"): "a tower with CLS.* `key_ratio=0` does without key tokens",
}
"""(family, method) whose example cannot be: a part of the sentence that says why."""

MORE: list[tuple[str, tuple[str, ...], int]] = [
    ("llava", (), 1),
    ("llava", ("visionzip:keep_ratio=0.5,position=keep",), 1),
    ("llava", ("lftr:spatial=text,keep=6",), 1),
    ("llava", ("lftr:temporal=differential,keep_frames=2", "fastv:keep=12"), CLIP),
    ("llava", ("tome:keep_ratio=0.5", "fastv:keep=4"), 1),
    ("llava", ("mustdrop:keep=10,window=2", "mustdrop_l:layer_list=2+3,keep_list=6+4,key_ratio=0.2"), 1),
    ("llava", ("mustdrop_l:layer_list=3,keep=12",), CLIP),
    ("llava", ("restore:keep_ratio=0.5+uniform",), 1),
    ("llava", ("restore:keep_ratio=0.5+uniform", "fastv:keep=4"), 1),
    ("llava", ("testa:keep_ratio=0.5",), CLIP),
    ("llava", ("egoprune:keep_ratio=0.5",), CLIP),
    ("llava", ("trim:keep_ratio=0.5,text=clip",), CLIP),
    ("llava", ("cdpruner:keep_ratio=0.5,relevance=clip", "fastv:keep=4"), 1),
    ("llava", ("visionzip:keep_ratio=0.5", "sparsemm:capacity_list=1+7+4+4+2+6+8+8,kernel=3"), 1),
    ("llava", ("restore:keep_ratio=0.5+uniform", "lookm:keep=3"), 1),
    ("llava", ("restore:keep_ratio=0.5+uniform", "dycoke_kv:keep=3,layer=1"), 1),
    ("qwen2_5_vl", (), 1),
    ("qwen2_5_vl", ("restore:keep_ratio=0.5+uniform",), 1),
    ("qwen2_5_vl", ("uniform:keep=8,position=compact",), 1),
    ("qwen2_5_vl", ("lftr:temporal=differential,keep_frames=1,spatial=text,keep=9", "fastv:keep=4"), CLIP),
]
CASES = MORE + [
    (family, (spec,), CLIP if "keep_frames" in spec else 1)
    for family in FAMILIES
    for name, spec in EXAMPLES.items()
    if (family, name) not in REFUSED
]
SAMPLE = ("uniform", "fastv", "dyrate", "sparsemm")
"""On other families than the first, the rest is slow, in sum."""


def param(family: str, specs: tuple[str, ...], frames: int) -> Any:
    known = family == FAMILIES[0] or (family, specs, frames) in MORE or specs[0].partition(":")[0] in SAMPLE
    name = "-".join([family, *specs, f"{frames}f"])
    return pytest.param((family, specs, frames), id=name, marks=() if known else pytest.mark.slow)


@pytest.fixture(params=[param(*case) for case in CASES], scope="module")
def case(request: pytest.FixtureRequest, exported: Export) -> Exported:
    return exported(*request.param)


def relative(found: Any, expected: Any) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_onnx_runtime_equals_pytorch(case: Exported, engine: Engine) -> None:
    theirs, ours = case.theirs(), engine(case)
    asked = [tiny.question(case.graphs, 0), tiny.question(case.graphs, 1, (20, 21, 22, 23, 24))]
    pixels, prompts = np.concatenate([q.pixels for q in asked]), [q.prompt for q in asked]
    text, side = split(prompts, case.graphs), tiny.sides(asked)

    true, found = (g.reduce(g.vision(pixels), text, side) for g in (theirs, ours))
    assert (found.index == true.index).all()
    assert true.index.shape == (2, case.plan.kept)
    assert relative(found.embeds, true.embeds) <= TOLERANCE
    expected = theirs.generate(pixels, prompts, NEW_TOKENS, side=side)
    prefilled, start = ours.prefill(found, prompts), theirs.prefill(true, prompts)
    assert relative(prefilled.logits, start.logits) <= TOLERANCE
    assert prefilled.kept.keys() == start.kept.keys()
    for name, kept in start.kept.items():
        assert (prefilled.kept[name] == kept).all()
    for step in range(6):
        token = np.array([row[step] for row in expected.tokens])
        logits = ours.step(prefilled.cache, token)
        assert relative(logits, theirs.step(start.cache, token)) <= TOLERANCE
    if not case.plan.separate_prefill:  # there a longer prompt has another last row of attention
        longer = [prompt + row[:6] for prompt, row in zip(prompts, expected.tokens, strict=True)]
        assert relative(ours.prefill(found, longer).logits, logits) <= TOLERANCE

    assert ours.generate(pixels, prompts, NEW_TOKENS, side=side).tokens == expected.tokens
    for row, one in enumerate(asked):
        alone = ours.generate(one.pixels, [one.prompt], NEW_TOKENS, side=one.side)
        assert alone.tokens == expected.tokens[row : row + 1]
    assert all(len(set(row)) > 4 for row in expected.tokens), "a model that repeats itself shows nothing"


FORBIDDEN = frozenset(
    "NonZero Unique Compress NonMaxSuppression Loop If Scan RandomNormal RandomUniform ScatterND ScatterElements "
    "Attention RotaryEmbedding RMSNormalization".split()
)
"""Shapes that depend on data, control flow, and operators newer than opset 21."""


def test_graphs_are_plain(case: Exported) -> None:
    for role, file in case.graphs.files.items():
        model = onnx.load(case.folder / file, load_external_data=False)
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 21)]
        assert model.ir_version == 10
        assert not model.functions
        assert not {n.op_type for n in model.graph.node} & FORBIDDEN
        assert all(n.domain == "" for n in model.graph.node)
        names = [n.name for n in model.graph.node]
        assert len(set(names)) == len(names)
        for place, where in (
            ("in_tower", "vision"),
            ("before_llm", "reduce"),
            ("in_llm", "prefill"),
            ("in_cache", "prefill"),
        ):
            for step in case.plan.at(place) if where == role else ():
                scope = re.compile(rf"(.*/)?{re.escape(step.name)}(_\d+)?/")
                assert any(scope.match(name) for name in names), f"{step.name} cannot be found in {file}"
        locations = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
        expected = {
            "vision": {"vision.data"},
            "question": {"question.data"},
            "reduce": {"reduce.data"} if case.plan.family.model_type == "llava" else set(),
        }
        assert locations == expected.get(role, set() if role.startswith("shorten_") else {"llm.data"})
        onnx.checker.check_model(case.folder / file, full_check=True)
        assert objections(case.folder / file) == []


def test_nothing_of_this_machine_is_written(case: Exported) -> None:
    secrets = [case.folder, case.plan.checkpoint.folder, exporter.__path__[0], torch.__path__[0]]
    for path in sorted(case.folder.glob("*.onnx")):
        data = path.read_bytes()
        assert not [s for s in secrets if str(s).encode() in data]
        assert b".py" not in data
        model = onnx.load(path, load_external_data=False)
        assert not model.metadata_props
        assert not model.doc_string
        assert not model.graph.metadata_props
        assert not [n.name for n in model.graph.node if n.doc_string or n.metadata_props]


def test_prefill_is_decode_unless_the_language_model_prunes(case: Exported) -> None:
    pruned = bool(case.plan.in_llm or case.plan.in_cache)
    assert (case.graphs.files["prefill"] != case.graphs.files["decode"]) == pruned
    assert (case.folder / "prefill.onnx").exists() == pruned
    groups = 1 + sum(bool(m.since) if m.everywhere else len(m.layers) for _, m in case.plan.in_llm)
    for _, method in case.plan.in_cache:
        groups += 1 if method.shared else case.graphs.text.layers - method.start
        groups -= method.start == 0
    assert len(case.graphs.text.kept) == groups
    assert {p.name for p in case.folder.glob("*.data")} <= {"vision.data", "reduce.data", "llm.data", "question.data"}


@pytest.mark.parametrize(("family", "name"), REFUSED)
def test_what_does_not_fit_is_refused_in_words(family: str, name: str, checkpoints: Any) -> None:
    frames = CLIP if "keep_frames" in EXAMPLES[name] else 1
    with pytest.raises(UsageError, match=f"does not fit {family}.*{REFUSED[family, name]}"):
        tiny.plan(checkpoints[family], (EXAMPLES[name],), Request(frames, SIZES[family]))


@pytest.mark.parametrize(
    "pair",
    [
        ("fastv:keep=4", "lookm:keep=2"),
        ("dycoke_kv:keep=4", "lookm:keep=4"),
        ("fastv:layer=1,keep=9", "prunevid_l:layer=2,keep=4"),
        ("mustdrop_l:keep=9", "fastv:layer=3,keep=4"),
    ],
)
def test_only_one_reduction_decides_over_the_cache(pair: tuple[str, str], checkpoints: Any) -> None:
    with pytest.raises(UsageError, match="Give one of the two"):
        tiny.plan(checkpoints["llava"], pair)
