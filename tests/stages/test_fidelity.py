"""The exported graphs on ONNX Runtime against the PyTorch modules, FP32: the same tokens kept, the same logits, the same
answer; every place and kind of method, every family, whole batches and single samples, prefill in one go and step by step.
Every single method as far as the language model: test_methods.py."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import exporter
import exporter.families
from exporter import _discover
from exporter.errors import UsageError
from exporter.families._contract import Request
from exporter.runtime.generate import Generator
from exporter.runtime.sequence import split
from graphs import _spec
from tests.families import tiny
from tests.stages.conftest import SIZES, Engine, Export, Exported

TOLERANCE = 1e-4
NEW_TOKENS = 32
LONG_ANSWER = 64
CLIP = 4
"""Frames of a clip."""

FAMILIES = _discover.names(exporter.families)


def adapted(spec: str) -> str:
    """A method's example at the size of these models: half of the tokens stay, other counts are 2."""
    spec = re.sub(r"\bkeep=\d+", "keep_ratio=0.5", spec)
    return re.sub(r"=(\d+)\b(?!\.)", lambda m: m[0] if int(m[1]) < 4 else "=2", spec)


CHOSEN = ("uniform", "visionzip", "lftr", "tome", *(n for n in _spec.names() if _spec.load(n).place == "in_llm"))
"""One method of every kind that makes a difference behind the reduce graph, and all that act there."""
EXAMPLES = {name: adapted((_spec.examples(name) or (f"{name}:keep=2",))[0]) for name in CHOSEN}

REFUSED = {
    ("qwen2_5_vl", "tome"): "tower cannot be shortened",
    ("qwen2_5_vl", "lftr"): "it needs `cls`",
}
"""(family, method) whose example cannot be: a part of the sentence that says why."""

MORE: list[tuple[str, tuple[str, ...], int]] = [
    ("llava", (), 1),
    ("llava", ("visionzip:keep_ratio=0.5,position=keep",), 1),
    ("llava", ("lftr:spatial=text,keep=6",), 1),
    ("llava", ("lftr:temporal=differential,keep_frames=2", "fastv:keep=12"), CLIP),
    ("llava", ("tome:keep_ratio=0.5", "fastv:keep=4"), 1),
    ("llava", ("restore:keep_ratio=0.5+uniform",), 1),
    ("llava", ("restore:keep_ratio=0.5+uniform", "fastv:keep=4"), 1),
    ("llava", ("testa:keep_ratio=0.5",), CLIP),
    ("llava", ("egoprune:keep_ratio=0.5",), CLIP),
    ("llava", ("trim:keep_ratio=0.5,text=clip",), CLIP),
    ("llava", ("cdpruner:keep_ratio=0.5,relevance=clip", "fastv:keep=4"), 1),
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
IDS = ["-".join([family, *specs, f"{frames}f"]) for family, specs, frames in CASES]


@pytest.fixture(params=CASES, ids=IDS, scope="module")
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
    if not case.plan.in_llm:  # there a longer prompt has another last row of attention
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
        for place, where in (("in_tower", "vision"), ("before_llm", "reduce"), ("in_llm", "prefill")):
            for step in case.plan.at(place) if where == role else ():
                scope = re.compile(rf"(.*/)?{re.escape(step.name)}(_\d+)?/")
                assert any(scope.match(name) for name in names), f"{step.name} cannot be found in {file}"
        locations = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
        expected = {
            "vision": {"vision.data"},
            "question": {"question.data"},
            "reduce": {"reduce.data"} if case.plan.family.model_type == "llava" else set(),
        }
        assert locations == expected.get(role, {"llm.data"})
        onnx.checker.check_model(case.folder / file, full_check=True)


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
    pruned = bool(case.plan.in_llm)
    assert (case.graphs.files["prefill"] != case.graphs.files["decode"]) == pruned
    assert (case.folder / "prefill.onnx").exists() == pruned
    assert len(case.graphs.text.kept) == 1 + sum(len(method.layers) for _, method in case.plan.in_llm)
    assert {p.name for p in case.folder.glob("*.data")} <= {"vision.data", "reduce.data", "llm.data", "question.data"}


@pytest.mark.parametrize(("family", "name"), REFUSED)
def test_what_does_not_fit_is_refused_in_words(family: str, name: str, checkpoints: Any) -> None:
    frames = CLIP if "keep_frames" in EXAMPLES[name] else 1
    with pytest.raises(UsageError, match=f"does not fit {family}.*{REFUSED[family, name]}"):
        tiny.plan(checkpoints[family], (EXAMPLES[name],), Request(frames, SIZES[family]))


@pytest.mark.parametrize("family", FAMILIES)
def test_fastv_against_a_loop_without_cache(family: str, exported: Export, engine: Engine) -> None:
    """Hugging Face's layers one by one, everything anew for every token, the choice made once."""
    spec = next(s for f, s, _ in CASES if f == family and len(s) == 1 and s[0].startswith("fastv"))
    case = exported(family, spec)
    ((_, method),) = case.plan.in_llm
    asked = tiny.question(case.graphs)
    theirs = type_of(family).from_pretrained(case.plan.checkpoint.folder, attn_implementation="eager").eval()
    expected, kept = pruned_loop(theirs, asked, engine(case), *method.layers, method.kept(*method.layers))
    result = engine(case).generate(asked.pixels, [asked.prompt], NEW_TOKENS)
    assert result.tokens == [expected]
    (found,) = result.kept.values()
    assert found[0].tolist() == kept


PRUNING = [n for n in CHOSEN if _spec.load(n).place == "in_llm" and not _spec.parse(EXAMPLES[n]).merges]


@pytest.mark.parametrize("name", PRUNING)
@pytest.mark.parametrize("position", ["keep", "compact"])
def test_pruned_caches_against_a_loop_without_cache(name: str, position: str, exported: Export, engine: Engine) -> None:
    """Whatever a method keeps: Hugging Face's layers one by one, everything anew for every token, give the same answer."""
    spec = EXAMPLES[name] + ("," if ":" in EXAMPLES[name] else ":") + f"position={position}"
    case = exported("llava", (spec,))
    ((_, method),) = case.plan.in_llm
    asked = tiny.question(case.graphs)
    theirs = type_of("llava").from_pretrained(case.plan.checkpoint.folder, attn_implementation="eager").eval()
    ours = engine(case)
    result = ours.generate(asked.pixels, [asked.prompt], LONG_ANSWER)
    kept = {layer: result.kept[f"kept_{layer}"][0].tolist() for layer in method.layers}
    assert result.tokens == [given_loop(theirs, asked, ours, kept, position == "compact")]


@torch.no_grad()
def given_loop(
    model: Any, asked: tiny.Question, ours: Generator, kept: dict[int, list[int]], compact: bool
) -> list[int]:
    """Greedy tokens, the visual tokens to keep before each layer given, as places among those still present."""
    text = model.model.language_model
    ids = asked.for_transformers(ours.graphs)["input_ids"][0].tolist()
    visual = [p for p, token in enumerate(ids) if token == ours.graphs.text.image_token]
    embeds = text.embed_tokens(torch.tensor([ids]))
    embeds[:, visual] = torch.from_numpy(ours.reduce(ours.vision(asked.pixels)).embeds)
    tokens: list[int] = []
    while len(tokens) < LONG_ANSWER:
        x, places, present = embeds, list(range(embeds.shape[1])), visual
        ordinal = places
        for i, block in enumerate(text.layers):
            if i in kept:
                present_now = [present[j] for j in kept[i]]
                stays = [n for n, p in enumerate(ordinal) if p not in present or p in present_now]
                x, ordinal = x[:, stays], [ordinal[n] for n in stays]
                places = list(range(len(stays))) if compact else [places[n] for n in stays]
                present = present_now
            mask = torch.full((x.shape[1], x.shape[1]), -1e30).triu(1)[None, None]
            rotary = text.rotary_emb(x, torch.tensor([places]))
            out, _ = block.self_attn(block.input_layernorm(x), position_embeddings=rotary, attention_mask=mask)
            x = x + out
            x = x + block.mlp(block.post_attention_layernorm(x))
        tokens.append(int(model.lm_head(text.norm(x)[:, -1]).argmax()))
        embeds = torch.cat([embeds, text.embed_tokens(torch.tensor([tokens[-1:]]))], 1)
    return tokens


def type_of(family: str) -> Any:
    import transformers

    return {
        "llava": transformers.LlavaForConditionalGeneration,
        "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
    }[family]


@torch.no_grad()
def pruned_loop(
    model: Any, asked: tiny.Question, ours: Generator, layer: int, keep: int
) -> tuple[list[int], list[int]]:
    """32 greedy tokens and the kept visual tokens, in the order of the prompt."""
    text, arguments = model.model.language_model, asked.for_transformers(ours.graphs)
    ids = arguments["input_ids"][0].tolist()
    is_visual = torch.tensor([i == ours.graphs.text.image_token for i in ids])
    embeds = text.embed_tokens(torch.tensor([ids]))
    features = ours.reduce(ours.vision(asked.pixels)).embeds
    embeds[:, is_visual] = torch.from_numpy(features)
    if "mm_token_type_ids" in arguments:
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        positions = model.model.get_rope_index(**{n: arguments[n] for n in names})[0]
    else:
        positions = torch.arange(len(ids))[None]
    chosen: list[int] = []
    tokens: list[int] = []
    while len(tokens) < NEW_TOKENS:
        x, place, weights = embeds, positions, None
        for i, block in enumerate(text.layers):
            if i == layer:
                assert weights is not None
                if not tokens:
                    chosen = weights[0].mean(0)[-1, is_visual].topk(keep).indices.sort().values.tolist()
                    gone = {p for n, p in enumerate(is_visual.nonzero()[:, 0].tolist()) if n not in chosen}
                stays = [p for p in range(x.shape[1]) if p not in gone]
                x, place = x[:, stays], place[..., stays]
            mask = torch.full((x.shape[1], x.shape[1]), -1e30).triu(1)[None, None]
            rotary = text.rotary_emb(x, place)
            out, weights = block.self_attn(
                block.input_layernorm(x), position_embeddings=rotary, attention_mask=mask, position_ids=place
            )
            x = x + out
            x = x + block.mlp(block.post_attention_layernorm(x))
        tokens.append(int(model.lm_head(text.norm(x)[:, -1]).argmax()))
        embeds = torch.cat([embeds, text.embed_tokens(torch.tensor([tokens[-1:]]))], 1)
        positions = torch.cat([positions, positions.amax() + 1 + torch.zeros_like(positions[..., :1])], -1)
    return tokens, chosen
