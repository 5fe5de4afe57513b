"""What every reduction method must do, walked over whatever lies in graphs/: a new file is picked up by itself.

A method is tried with the specs in its `EXAMPLES` (each must fit one of the sites below) and, if it has the knob, with a
plain `keep` at a small site without CLS. One of them is traced alone, without weights, and ONNX Runtime compared with the eager
module; the others, and further examples, are slow.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

import exporter.families
import graphs
from exporter.families._contract import ALIGNED, INSTRUCTION
from exporter.nn.specs import IN_CACHE_SIGNALS, IN_LLM_SIGNALS
from exporter.stages._trace import trace
from graphs import _spec
from graphs._blocks import TOPK_LIMIT, take
from graphs._compressor import Compressor
from graphs._contract import (
    INSTRUCTION_TOKENS,
    BeforeLLM,
    InCache,
    InLLM,
    InTower,
    Reduced,
    Reduction,
    ReductionError,
    Site,
    Skipping,
    Tier,
    take_per_head,
)
from tests.graphs.oracle import KINDS, attention, features

SPLIT = "method"
DIM, LLM_DIM, HEAD_DIM, TEXT = 8, 12, 6, 5

ALLOWED = frozenset(
    "Abs Add And ArgMax ArgMin Cast Ceil Clip Concat Constant Conv Div Equal Exp Expand Floor Gather GatherElements GatherND Gelu "
    "Greater GreaterOrEqual HardSigmoid HardSwish Identity LayerNormalization Less LessOrEqual Log MatMul Max Min Mul Neg Not Or Pow Reciprocal ReduceMax ReduceMean "
    "ReduceMin ReduceSum Relu Reshape Round Shape Sigmoid Slice Softmax Split Sqrt Squeeze Sub Tanh Tile TopK Transpose "
    "Unsqueeze Where".split()
)
"""Operators that TensorRT 10.3 and TensorRT-RTX both take, with static shapes. A method that needs another one should
find out first whether both parse it."""

PLAIN = ("hidden", "keys", "joint_keys", "column_attention")
WITH_CLS = (*PLAIN, "cls", "cls_keys", "cls_attention", "joint_cls_attention")
NO_CLS = frozenset({*PLAIN, *(f"{s}@{b}" for s in PLAIN for b in range(8)), "text", "text_mask", "warp"})
ALL = NO_CLS | {*WITH_CLS, *(f"{s}@{b}" for s in WITH_CLS for b in range(24)), *ALIGNED, *INSTRUCTION}
PATCHES = frozenset(f"patches@{b}" for b in range(4))
PATCHES_OF_TOWER = frozenset(f"patches@{b}" for b in range(24))
LOOKS = frozenset({"cls_attention@2", "cls_attention@3"})
IN_TOWER = frozenset({"hidden", "size", "keys", "attention", "column_attention", "value_norm"})

SITES = {
    "before_llm": (
        Site(576, 1, (24, 24), ALL, 23, dim=DIM, llm_dim=DIM),
        Site(20, 2, (4, 5), NO_CLS, 8, grid_positions=True, dim=DIM, llm_dim=DIM),
        Site(144, 8, (12, 12), ALL, 23, dim=DIM, llm_dim=DIM),
    ),
    "projector": (
        Site(576, 1, (24, 24), ALL | PATCHES_OF_TOWER, 23, dim=DIM, patch_dim=DIM, llm_dim=LLM_DIM),
        Site(24, 2, (4, 6), NO_CLS, 8, grid_positions=True, dim=DIM, llm_dim=LLM_DIM),
        Site(144, 8, (12, 12), ALL | PATCHES_OF_TOWER, 23, dim=DIM, patch_dim=DIM, llm_dim=LLM_DIM),
    ),
    "in_tower": (
        Site(576, 1, (24, 24), IN_TOWER | {"cls", "cls_attention"}, 2, dim=DIM),
        Site(21, 2, (3, 7), IN_TOWER, 2, dim=DIM),
        Site(64, 4, (8, 8), IN_TOWER | {"cls", "cls_attention"}, 6, dim=DIM),
    ),
    "in_llm": (
        Site(576, 1, (24, 24), IN_LLM_SIGNALS | PATCHES | LOOKS, 8, dim=DIM, patch_dim=DIM, llm_dim=DIM, heads=4),
        Site(20, 3, (4, 5), IN_LLM_SIGNALS | LOOKS, 5, dim=DIM, llm_dim=DIM, heads=4),
    ),
    "in_cache": (
        Site(576, 1, (24, 24), IN_CACHE_SIGNALS, 8, llm_dim=DIM, heads=4, kv_heads=2, head_dim=4, qkv_bias=True),
        Site(20, 3, (4, 5), IN_CACHE_SIGNALS, 5, llm_dim=DIM, heads=4, kv_heads=2, head_dim=4),
    ),
}


def candidates(name: str) -> Iterator[tuple[str, Reduction, Site]]:
    """(spec, fitted method, site), each at the first site it fits."""
    method = _spec.load(name)
    sites = SITES[method.place]
    for text in _spec.examples(name):
        yield from list(fits(text, sites))[:1]
    if "keep" in {f.name for f in dataclasses.fields(method)}:
        yield from list(fits(f"{name}:keep=7", [s for s in sites if s.tokens < 100]))[:1]


def fits(text: str, sites: Any) -> Iterator[tuple[str, Reduction, Site]]:
    for site in sites:
        try:
            yield text, _spec.parse(text).fit(site), site
        except ReductionError:
            continue


def cases(name: str) -> Iterator[Any]:
    """The first example and the small site always; the rest is slow, in sum."""
    found = list(candidates(name))
    for number, (spec, fitted, site) in enumerate(found):
        few = number in (0, len(found) - 1) or site.total < 100
        yield pytest.param(
            fitted, site, id=f"{spec}@{site.tokens}x{site.frames}", marks=() if few else pytest.mark.slow
        )


CASES = [case for name in _spec.names() for case in cases(name)]


def in_turn() -> Iterator[Any]:
    """Of each method's cases one is traced, in turn the first and the last; the others are slow, in sum. At the sites of real
    models each is traced in tests/stages/."""
    for number, name in enumerate(_spec.names()):
        found = list(cases(name))
        for case in found:
            few = case is found[-(number % 2)]
            yield case if few else pytest.param(*case.values, id=case.id, marks=pytest.mark.slow)


TRACED = list(in_turn())


class Once(torch.nn.Module):
    """One method as a module: a list of inputs to a list of outputs."""

    def __init__(self, method: Reduction, site: Site) -> None:
        super().__init__()
        self.method, self.site = method, site
        self.cls = int("cls" in site.signals)

    def forward(self, signals: list[torch.Tensor]) -> list[torch.Tensor]:
        if isinstance(self.method, InTower):
            return self.tower(*signals)
        if isinstance(self.method, Skipping):
            return self.routed(*signals)
        if isinstance(self.method, InLLM):
            return self.language_model(*signals)
        if isinstance(self.method, InCache):
            return self.cache(*signals)
        named = dict(zip((*self.method.needs, *self.method.trained(self.site)), signals, strict=True))
        if isinstance(self.method, Compressor):
            return [self.method.forward(named, self.site)]
        assert isinstance(self.method, BeforeLLM)
        return [x for x in self.method.forward(named) if x is not None]

    def tower(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """All blocks in a row; a block's signals are made of its tokens, snapped like scores, so that they are the same
        in every runtime."""
        assert isinstance(self.method, InTower)
        size, indices = torch.ones_like(hidden[..., 0], dtype=torch.float32), []
        for block in self.method.blocks:
            signals = {name: f(hidden) for name, f in MADE_OF_TOKENS.items() if name in self.method.needs}
            out: Reduced = self.method.forward(block, signals | {"hidden": hidden, "size": size}, self.cls)
            assert out.size is not None
            hidden, size = out.tokens, out.size
            indices.append(out.index)
        return [hidden, size, *indices]

    def language_model(
        self, hidden: torch.Tensor, text: torch.Tensor, mask: torch.Tensor, *more: torch.Tensor
    ) -> list[torch.Tensor]:
        """All layers in a row, as in the tower. more: what comes from the tower, then trained tensors, which are float32."""
        assert isinstance(self.method, InLLM)
        tower, trained = self.method.of_tower, self.method.trained(self.site)
        known = dict(zip((*tower, *trained), more, strict=True))
        known |= {name: known[name].float() for name in trained}
        size, indices = torch.ones_like(hidden[..., 0], dtype=torch.float32), []
        places = torch.arange(hidden.shape[1]).expand(hidden.shape[0], -1)
        for layer in self.method.layers:
            signals = {n: f(hidden, text, mask) for n, f in MADE_FOR_LLM.items() if n in self.method.needs}
            out = self.method.forward(layer, signals | known | {"hidden": hidden, "size": size, "places": places})
            places = take(places, out.index)
            size = take(size, out.index) if out.size is None else out.size
            hidden = out.tokens
            indices.append(out.index)
        return [hidden, size, *indices]

    def routed(self, hidden: torch.Tensor, *weights: torch.Tensor) -> list[torch.Tensor]:
        """Every layer given the same tokens: those that take part, all tokens' weights, the indices."""
        assert isinstance(self.method, Skipping)
        known = dict(zip(self.method.trained(self.site), (w.float() for w in weights), strict=True))
        signals = {"hidden": hidden, **known}
        found = [self.method.forward(layer, signals) for layer in self.method.layers]
        weight = [self.method.weight(layer, signals) for layer in self.method.layers]
        return [*(out.tokens for out in found), *weight, *(out.index for out in found)]

    def cache(
        self, hidden: torch.Tensor, text: torch.Tensor, mask: torch.Tensor, *trained: torch.Tensor
    ) -> list[torch.Tensor]:
        """Behind the first layer, and the last if it chooses too: keys, values and choices, which trained tensors are none of."""
        assert isinstance(self.method, InCache)
        signals = {n: f(hidden, text, mask) for n, f in MADE_FOR_CACHE.items() if n in self.method.needs}
        keys = MADE_FOR_CACHE["keys"](hidden, text, mask)
        found, indices = [], []
        for layer in cached_layers(self.method, self.site):
            index = self.method.choose(layer, signals)
            each = index if index.ndim == 3 else index[:, None].expand(-1, 2, -1)
            found += self.method.merge(keys, keys.flip(-1), each)
            indices.append(index)
        return [*found, *indices]


def cached_layers(method: InCache, site: Site) -> list[int]:
    return [method.start] if method.shared else sorted({method.start, site.depth - 1})


def attention_of(hidden: torch.Tensor) -> torch.Tensor:
    part = torch.round(hidden[..., :HEAD_DIM].float() * 16) / 16
    return torch.softmax(part @ part.transpose(-1, -2), -1)


MADE_OF_TOKENS = {
    "keys": lambda x: x[..., :HEAD_DIM],
    "attention": attention_of,
    "cls_attention": lambda x: attention_of(x)[..., 0, :],
    "column_attention": lambda x: attention_of(x).mean(-2),
    "value_norm": lambda x: x.float().pow(2).sum(-1).sqrt(),
}


def inputs(method: Reduction, site: Site, kind: str, batch: int) -> list[torch.Tensor]:
    """Signals for a method, in the order of its needs."""
    if isinstance(method, InTower):
        tokens = site.tokens + ("cls" in site.signals)
        return [torch.from_numpy(features(kind, (batch, site.frames, tokens, DIM)))]
    if isinstance(method, Skipping):
        return [torch.from_numpy(features(kind, (batch, site.total, DIM))), *trained_tensors(method, site)]
    if isinstance(method, InLLM | InCache):
        mask = np.ones((batch, TEXT), np.float32)
        mask[0, :1] = 0
        hidden, text = features(kind, (batch, site.total, DIM)), features("random", (batch, TEXT, DIM), 1)
        made = [torch.from_numpy(x) for x in (hidden, text, mask)]
        tower = method.of_tower if isinstance(method, InLLM) else ()
        lead = (batch, site.frames, site.tokens)
        for seed, name in enumerate(tower, 2):
            looks = "attention" in name
            made.append(torch.from_numpy(attention(kind, lead, seed) if looks else features(kind, (*lead, DIM), seed)))
        return made + trained_tensors(method, site)
    made = []
    for seed, name in enumerate(method.needs):
        signal = name.partition("@")[0]
        lead = (batch, site.frames)
        if signal == "text_mask":
            value = np.ones((batch, TEXT), np.float32)
            value[0, 3:] = 0
        elif signal == "text":
            value = features(kind, (batch, TEXT, DIM), seed)
        elif signal == "warp":
            value = np.random.default_rng(seed).integers(-1, site.tokens, (*lead, site.tokens))
        elif signal == "instruction_ids":
            value = np.random.default_rng(seed).integers(0, 64, (batch, INSTRUCTION_TOKENS))
        elif signal == "instruction_mask":
            value = np.ones((batch, INSTRUCTION_TOKENS), np.int64)
            value[0, 3:] = 0
        elif signal == "aligned_text":
            value = features(kind, (batch, 1, HEAD_DIM), seed)[:, 0]
        elif signal.endswith("attention"):
            value = attention(kind, (*lead, site.tokens), seed)
        elif signal in ("cls", "cls_keys"):
            value = features(kind, (*lead, 1, DIM if signal == "cls" else HEAD_DIM), seed)[:, :, 0]
        else:
            value = features(kind, (*lead, site.tokens, DIM if signal in ("hidden", "patches") else HEAD_DIM), seed)
        made.append(torch.from_numpy(np.ascontiguousarray(value)))
    return made + trained_tensors(method, site)


def trained_tensors(method: Reduction, site: Site) -> list[torch.Tensor]:
    """What comes out of a matrix is as large as what goes in."""
    shapes = enumerate(method.trained(site).values())
    made = [torch.from_numpy(features("random", (1, *shape), seed)[0]) for seed, shape in shapes]
    inputs = 1 if isinstance(method, Compressor) else 0  # a published matrix is [out, in]
    made = [x * x.shape[inputs] ** -0.5 if x.ndim == 2 else x for x in made]
    return [x * x[0].numel() ** -0.5 if x.ndim > 2 else x for x in made]


def attention_from(text: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    a, b = (torch.round(x[..., :HEAD_DIM].float() * 16) / 16 for x in (text, hidden))
    return torch.softmax(a @ b.transpose(-1, -2), -1)


MADE_FOR_LLM = {
    "previous": lambda x, t, m: x.flip(-1),
    "embeds": lambda x, t, m: x.flip(-1),
    "all_embeds": lambda x, t, m: torch.cat([x, x[:, :2]], 1),
    "text_hidden": lambda x, t, m: t,
    "text_embeds": lambda x, t, m: t.flip(-1),
    "text_mask": lambda x, t, m: m,
    "instruction_mask": lambda x, t, m: torch.cat([torch.zeros_like(m[:, :2]), m[:, 2:]], 1),
    "attention_row": lambda x, t, m: attention_from(t[:, -1:], x)[:, 0],
    "plain_row": lambda x, t, m: attention_from(t[:, -1:], x)[:, 0],
    "next_row": lambda x, t, m: attention_from(t[:, -1:], x)[:, 0],
    "next_plain_row": lambda x, t, m: attention_from(t[:, -1:], x)[:, 0],
    "last_scores": lambda x, t, m: x[..., :4].transpose(1, 2).float(),
    "last_log_attention": lambda x, t, m: torch.log(torch.softmax(x[..., :4].transpose(1, 2).float(), -1)),
    "text_attention": lambda x, t, m: attention_from(t, x),
    "plain_text_attention": lambda x, t, m: attention_from(t, x),
    **dict.fromkeys(
        ("head_attention", "plain_head_attention"),
        lambda x, t, m: torch.stack([attention_from(t.roll(i, -1), x.roll(i, -1)) for i in range(4)], 1),
    ),
    "rope_response": lambda x, t, m: 1 - torch.round(attention_from(t, x) * 8) / 8,
    "visual_attention": lambda x, t, m: attention_of(x),
    "plain_visual_attention": lambda x, t, m: attention_of(x),
    "keys": lambda x, t, m: torch.stack([x[..., :4], x[..., 4:]], 1),
    "next_keys": lambda x, t, m: torch.stack([x[..., :4], x[..., 4:]], 1),
    "next_plain_keys": lambda x, t, m: torch.stack([x[..., :4], x[..., 4:]], 1),
    "next_plain_queries": lambda x, t, m: torch.stack([x[..., :4], x[..., 4:], x[..., 2:6], x[..., ::2]], 1),
}
MADE_FOR_CACHE = {
    **{n: MADE_FOR_LLM[n] for n in ("keys", "text_attention", "attention_row", "text_mask", "instruction_mask")},
    "received": lambda x, t, m: torch.stack([attention_of(x).sum(1), attention_of(x.flip(-1)).sum(1)], 1),
    "head_attention": lambda x, t, m: torch.stack([attention_from(t, x), attention_from(t.flip(-1), x.flip(-1))], 1),
    "behind": lambda x, t, m: torch.where(m > 0, torch.arange(TEXT - 1, -1, -1), -1),
}


@functools.cache
def traced(method: Reduction, site: Site) -> tuple[ir.Model, ort.InferenceSession]:
    module, example = Once(method, site), inputs(method, site, "random", 3)
    names = [f"out_{i}" for i in range(len(module(example)))]
    signals = len(example) - len(method.trained(site))
    axes = [{0: "batch"} if i < signals else {} for i in range(len(example))]
    model = trace(module, {"signals": example}, {"signals": axes}, names)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    data = ir.to_proto(model).SerializeToString()
    return model, ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", _spec.names())
def test_is_documented_and_fits_somewhere(name: str) -> None:
    found, method = _spec.describe(name), _spec.load(name)
    assert found.summary.endswith(".")
    assert len(found.summary) < 120
    assert found.paper
    assert found.tier in get_args(Tier)
    assert (found.tier == "control") == found.paper.startswith("control")
    assert "Source:" in found.doc
    assert "Position:" in found.doc
    assert method.place in SITES
    for text in found.examples:
        assert any(fits(text, SITES[method.place])), f"{text} fits none of the sites: change it, or add a site"
    assert any(candidates(name)), f"give {name} EXAMPLES = ('{name}:…',): it needs more than `keep`"


def test_no_family_is_named() -> None:
    families = [m.name for m in pkgutil.iter_modules(exporter.families.__path__) if not m.name.startswith("_")]
    for path in Path(graphs.__path__[0]).glob("*.py"):
        code = without_docstrings(path.read_text()).lower()
        assert not [f for f in families if re.search(rf"\b{f}\b", code)], path


def without_docstrings(source: str) -> str:
    """The code alone: papers and models may be named beside it."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [n for n in body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
    return ast.unparse(tree)


@pytest.mark.parametrize(("method", "site"), CASES)
def test_fitting_resolves_every_count(method: Reduction, site: Site) -> None:
    assert method.fit(site) == method
    assert set(method.needs) <= site.signals
    after = method.after(site)
    fewest = 0 if isinstance(method, InLLM) else 1  # in its later layers a language model can do without
    assert fewest <= after.tokens <= site.total + 1
    assert after.signals <= site.signals
    assert _spec.parse(_spec.format(method)).fit(site) == method


@pytest.mark.parametrize(("method", "site"), CASES)
def test_wrong_kinds_of_values_are_refused_in_words(method: Reduction, site: Site) -> None:
    hints = get_type_hints(type(method))
    for knob in method.knobs():
        with pytest.raises(ReductionError, match=rf"`{knob}` takes .*; found <object"):
            dataclasses.replace(method, **{knob: object()}).fit(site)
        if get_origin(hints[knob]) is not None and str in map(type, get_args(hints[knob])):
            with pytest.raises(ReductionError, match=rf"`{knob}` takes .*; found 'nonsense'"):
                dataclasses.replace(method, **{knob: "nonsense"}).fit(site)


@pytest.mark.parametrize(("method", "site"), CASES)
def test_missing_signals_are_refused(method: Reduction, site: Site) -> None:
    with pytest.raises(ReductionError, match="needs"):
        method.fit(dataclasses.replace(site, signals=frozenset({"nothing"})))


@pytest.mark.parametrize(("method", "site"), TRACED)
def test_graph_is_plain_and_static(method: Reduction, site: Site) -> None:
    model, _ = traced(method, site)
    assert {n.op_type for n in model.graph} <= ALLOWED
    assert all(n.domain == "" for n in model.graph)
    for node in model.graph:
        if node.op_type == "TopK":
            k = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] is not None else None
            assert k is not None, "TensorRT needs a constant K"
            assert k.numpy().item() <= TOPK_LIMIT
            assert node.inputs[0] is not None
            assert node.inputs[0].shape is not None
            assert node.inputs[0].shape.rank() >= 2, "TensorRT refuses a TopK over one axis"
    for value in model.graph.outputs:
        assert value.shape is not None
        assert all(isinstance(d, int) for d in list(value.shape)[1:]), f"{value.name} {value.shape} is not static"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "site"), TRACED)
def test_runtime_equals_eager(method: Reduction, site: Site, kind: str) -> None:
    _, session = traced(method, site)
    module = Once(method, site)
    feed_names = [i.name for i in session.get_inputs()]
    both = None
    for batch in (2, 1):
        given = inputs(method, site, kind, 2)
        signals = len(given) - len(method.trained(site))
        given = [x[:batch] if i < signals else x for i, x in enumerate(given)]
        eager = module(given)
        found = session.run(None, {n: given[int(n.rpartition("_")[2])].numpy() for n in feed_names})
        both = both or eager
        for e, f, b in zip(eager, found, both, strict=True):
            assert e.shape == f.shape
            if e.dtype == torch.int64:
                assert (e.numpy() == f).all()
                assert torch.equal(e, b[:batch]), "a sample depends on its neighbours"
            else:
                within = 1e-5 * float(e.abs().max().clamp(min=1)) if e.numel() else 0.0
                np.testing.assert_allclose(f, e.numpy(), atol=within, rtol=0)
                np.testing.assert_allclose(b[:batch].numpy(), e.numpy(), atol=within, rtol=0)


@pytest.mark.parametrize(("method", "site"), CASES)
def test_counts_and_indices(method: Reduction, site: Site) -> None:
    after = method.after(site)
    for kind in KINDS:
        out = Once(method, site)(inputs(method, site, kind, 2))
        if isinstance(method, Compressor):
            assert [x.shape for x in out] == [(2, after.frames, after.tokens, LLM_DIM)]
        elif isinstance(method, Skipping):
            layers = len(method.layers)
            for tokens, weight, index in zip(out[:layers], out[layers:], out[2 * layers :], strict=False):
                assert tokens.shape == (2, index.shape[1], DIM)
                assert weight.shape == (2, site.total)
                assert (index.diff(dim=1) > 0).all()
            assert [x.shape[1] for x in out[2 * layers :]] == [method.kept(layer) for layer in method.layers]
        elif isinstance(method, InLLM):
            tokens, size, *indices = out
            assert [x.shape[1] for x in indices] == [method.kept(layer) for layer in method.layers]
            assert all((x.diff(dim=1) > 0).all() for x in indices)
            assert tokens.shape == (2, site.total if isinstance(method, Skipping) else after.total, DIM)
            assert (size.sum(1) <= site.total + 1e-2).all(), "no token may count twice"
            assert (size > 0).all()
        elif isinstance(method, InCache):
            given = inputs(method, site, kind, 2)
            keys, layers = MADE_FOR_CACHE["keys"](*given[:3]), cached_layers(method, site)
            for layer, key, value, index in zip(layers, out[::2], out[1::2], out[2 * len(layers) :], strict=False):
                kept = method.kept(layer)
                assert index.shape == ((2, 2, kept) if method.per_head else (2, kept))
                assert key.shape == value.shape == (2, 2, kept, keys.shape[-1])
                each = index if method.per_head else index[:, None].expand(-1, 2, -1)
                rows = each.flatten(0, 1).tolist()
                assert max(sum(i >= 0 for i in row) for row in rows) == kept
                for row in rows:
                    stay = [i for i in row if i >= 0]
                    assert stay == sorted(set(stay)), "ascending, each once"
                    assert row == stay + [-1] * (kept - len(stay)), "empty slots come last"
                    assert all(i < site.total for i in stay)
                if not method.merges:
                    assert torch.equal(key, take_per_head(keys, each))
                    assert torch.equal(value, take_per_head(keys.flip(-1), each))
        elif isinstance(method, InTower):
            cls = int("cls" in site.signals)
            assert out[0].shape == (2, after.frames, after.tokens + cls, DIM)
            if method.merges:
                total = out[1].sum((1, 2))  # less where a method prunes as well; exact sums: its own test
                assert (total <= site.frames * (site.tokens + cls) + 1e-2).all(), "no token may count twice"
                assert (out[1] > 0).all()
            else:
                assert (out[1] == 1).all()
            assert not cls or (out[-1][:, 0, 0] == 0).all(), "CLS stays in front"
        else:
            tokens, index = out[:2]
            assert tokens.shape == (2, after.total, DIM)
            assert index.shape == (2, after.total)
            assert (index >= -1).all()
            assert (index < site.total).all()
            for row in index.tolist():
                patches = [i for i in row if i >= 0]
                assert len(set(patches)) == len(patches), "a token may anchor one kept token only"
        assert all(torch.isfinite(x).all() for x in out)


@pytest.mark.parametrize(("method", "site"), CASES)
def test_half_precision_chooses_by_float32_scores(method: Reduction, site: Site) -> None:
    half = [x.half() if x.is_floating_point() else x for x in inputs(method, site, "random", 2)]
    wide_in = [x.float() if x.is_floating_point() else x for x in half]
    narrow, wide = Once(method, site)(half), Once(method, site)(wide_in)
    if isinstance(method, BeforeLLM):  # elsewhere a block's rounding reaches the next block's scores
        assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True) if a.dtype == torch.int64)
    assert narrow[0].dtype == torch.float16
    if isinstance(method, BeforeLLM):
        torch.testing.assert_close(narrow[0].float(), wide[0], atol=5e-3, rtol=5e-3)
