"""Video-XL's summaries: the engine against PyTorch, and against Hugging Face's layers run window by window, as the official code does,
with a cache of keys that are not rotated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.llama.modeling_llama import rotate_half

from exporter.errors import UsageError
from exporter.families._contract import Request
from exporter.job import Job
from exporter.pipeline import run_build, run_export
from exporter.runtime.generate import Generator
from exporter.stages import _calibrate
from exporter.stages._modules import build_modules, load_reference
from exporter.stages._reference import reference
from exporter.stages.export import export
from exporter.workspace import Workspace
from graphs._contract import ReductionError, Site
from graphs.vst import Vst
from profiles._schema import with_kv
from tests.conftest import for_one_gpu, needs_rtx
from tests.families import tiny
from tests.stages.conftest import Engine, Exported, plain

ANSWER, FRAMES, RATIO, WINDOW = 48, 3, 4, 20
"""48 visual tokens in windows of 20, 20 and 8."""


@pytest.fixture(scope="module", params=["qwen2", pytest.param("llama", marks=pytest.mark.slow)])
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without biases, and Video-XL's kind, with."""
    folder = tmp_path_factory.mktemp("model")
    tiny.llava(folder, decoder=request.param)
    return folder


def spec_of(model: Path, frames: int = FRAMES, ratio: int = RATIO, window: int = WINDOW) -> str:
    spec = f"vst:weights={model / 'vst.safetensors'},ratio={ratio},window={window}"
    tiny.weights(tiny.unchecked(model, (spec,), Request(frames)).steps[0], model / "vst.safetensors")
    return spec


@pytest.fixture(scope="module")
def case(decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    plan = plain(tiny.plan(decoder, (spec_of(decoder),), Request(FRAMES)))
    folder = tmp_path_factory.mktemp("graphs")
    return Exported(plan, folder, export(plan, folder))


def test_onnx_runtime_equals_pytorch(case: Exported, engine: Engine) -> None:
    assert (case.graphs.text.kept, case.graphs.visual.kept, case.graphs.visual.policy) == ([12], 48, "compact")
    assert not case.graphs.guided, "the summaries know nothing of the question, so a conversation reuses them"
    asked = [tiny.question(case.graphs, 0), tiny.question(case.graphs, 1, (20, 21, 22, 23, 24))]
    pixels, prompts = np.concatenate([q.pixels for q in asked]), [q.prompt for q in asked]
    theirs, ours = case.theirs().generate(pixels, prompts, ANSWER), engine(case).generate(pixels, prompts, ANSWER)
    assert ours.tokens == theirs.tokens
    assert all(len(set(row)) > 4 for row in ours.tokens), "a model that repeats itself shows nothing"
    anchors = [3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47]
    assert ours.kept["cached_0"].tolist() == [anchors, anchors]
    for row, one in enumerate(asked):
        assert engine(case).generate(one.pixels, [one.prompt], ANSWER).tokens == ours.tokens[row : row + 1]


def test_against_windows_one_after_another(case: Exported, engine: Engine) -> None:
    ours, folder = engine(case), case.plan.checkpoint.folder
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    for seed, text in enumerate([(11, 12, 13), (20, 21, 22, 23, 24)]):
        asked = tiny.question(case.graphs, seed, text)
        image = torch.from_numpy(ours.reduce(ours.vision(asked.pixels)).embeds)
        found = ours.generate(asked.pixels, [asked.prompt], ANSWER)
        memory = Memory(model, load_file(folder / "vst.safetensors"))
        front = asked.prompt.index(case.graphs.text.image_token)
        assert found.tokens == [memory.answer(asked.prompt[:front], image, list(text))]
        assert found.cache.past["past_key_0"].shape()[2] == 12 + front + len(text) + ANSWER - 1


class Memory:
    """The official order of operations: keys before the rotation are remembered; every step rotates all there are, from 0 on."""

    def __init__(self, model: Any, own: dict[str, Tensor]) -> None:
        self.text, self.head, self.own = model.model.language_model, model.lm_head, own
        self.keys: list[Tensor] = [torch.zeros(1, 2, 0, 16) for _ in self.text.layers]
        self.values = list(self.keys)

    @torch.no_grad()
    def answer(self, front: list[int], image: Tensor, behind: list[int]) -> list[int]:
        embed = self.text.embed_tokens
        self.step(embed(torch.tensor([front])), [0] * len(front), lambda summary: True)
        for start in range(0, image.shape[1], WINDOW):
            parts, summaries = [], []
            for n, token in enumerate(image[:, start : start + WINDOW].unbind(1), 1):
                parts.append(token)
                summaries.append(0)
                if n % RATIO == 0:
                    parts.append(self.own["beacon_embed_tokens.weight"])
                    summaries.append(1)
            self.step(torch.stack(parts, 1), summaries, lambda summary: summary)
        tokens, x = [], embed(torch.tensor([behind]))
        while len(tokens) < ANSWER:
            out = self.step(x, [0] * x.shape[1], lambda summary: True)
            tokens.append(int(self.head(self.text.norm(out)[:, -1]).argmax()))
            x = embed(torch.tensor([tokens[-1:]]))
        return tokens

    def step(self, x: Tensor, summaries: list[int], stays: Any) -> Tensor:
        keep = torch.tensor([bool(stays(s)) for s in summaries])
        for i, layer in enumerate(self.text.layers):
            q, k, v = self.project(i, layer.self_attn, layer.input_layernorm(x), summaries)
            keys, values = torch.cat([self.keys[i], k], 2), torch.cat([self.values[i], v], 2)
            total, new = keys.shape[2], q.shape[2]
            cos, sin = (t[:, None] for t in self.text.rotary_emb(x, torch.arange(total)[None]))
            turned = keys * cos + rotate_half(keys) * sin
            asked = q * cos[:, :, -new:] + rotate_half(q) * sin[:, :, -new:]
            mask = torch.ones(new, total, dtype=torch.bool).tril(total - new)
            found = torch.nn.functional.scaled_dot_product_attention(
                asked, turned.repeat_interleave(2, 1), values.repeat_interleave(2, 1), mask
            )
            x = x + layer.self_attn.o_proj(found.transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            self.keys[i] = torch.cat([self.keys[i], k[:, :, keep]], 2)
            self.values[i] = torch.cat([self.values[i], v[:, :, keep]], 2)
        return x

    def project(self, i: int, attention: Any, x: Tensor, summaries: list[int]) -> list[Tensor]:
        """Token by token."""
        found = []
        for part in "qkv":
            name, rows = f"layers.{i}.self_attn.beacon_{part}_proj", []
            for token, summary in zip(x.unbind(1), summaries, strict=True):
                if summary:
                    rows.append(
                        torch.nn.functional.linear(token, self.own[f"{name}.weight"], self.own.get(f"{name}.bias"))
                    )
                else:
                    rows.append(getattr(attention, f"{part}_proj")(token))
            found.append(torch.stack(rows, 1).unflatten(-1, (-1, 16)).transpose(1, 2))
        return found


def test_summaries_may_be_int8(decoder: Path, tmp_path: Path, engine: Engine) -> None:
    plan = plain(tiny.plan(decoder, (spec_of(decoder),), Request(FRAMES)))
    plan = replace(plan, profile=with_kv(plan.profile, "int8"))
    case = Exported(plan, tmp_path, export(plan, tmp_path))
    runners, graphs, table = reference(plan, load_reference(plan))
    asked = tiny.question(case.graphs, 0)
    theirs = Generator(runners, tiny.endless(graphs), table).generate(asked.pixels, [asked.prompt], ANSWER)
    ours = engine(case).generate(asked.pixels, [asked.prompt], ANSWER)
    assert ours.tokens == theirs.tokens
    assert {v.split("_")[1] for v in ours.cache.past} == {"key", "value", "scale", "order"}


def test_tensors_are_those_of_the_published_checkpoint() -> None:
    """Video-XL-7B: Qwen2 with 28 layers, width 3584, 28 heads and 4 KV heads of 128, biases."""
    published: dict[str, tuple[int, ...]] = {"model.beacon_embed_tokens.weight": (1, 3584)}
    for layer in range(28):
        for part, width in (("q", 3584), ("k", 512), ("v", 512)):
            name = f"model.layers.{layer}.self_attn.beacon_{part}_proj"
            published |= {f"{name}.weight": (width, 3584), f"{name}.bias": (width,)}
    site = Site(
        144, 128, signals=frozenset({"keys"}), depth=28, llm_dim=3584, heads=28, kv_heads=4, head_dim=128, qkv_bias=True
    )  # fmt: skip
    method = Vst("w").fit(site)
    assert {Vst.prefixes[1] + name: shape for name, shape in method.trained(site).items()} == published
    assert method.windows == (1440,) * 12 + (1152,)
    assert method.after(site).tokens == 144 * 128 // 8
    assert method.strange({"layers.0.self_attn.beacon_q_proj.weight"}) is None
    assert "(beacon_o_proj)" in str(method.strange({"layers.0.self_attn.beacon_o_proj.weight"}))


@pytest.mark.parametrize(("total", "windows", "kept"), [(48, (20, 20, 8), 12), (49, (20, 20, 9), 12), (18, (18,), 4)])
def test_the_last_window_may_be_shorter(total: int, windows: tuple[int, ...], kept: int) -> None:
    method = Vst("w", RATIO, WINDOW).fit(Site(total, signals=frozenset({"keys"}), depth=2))
    assert (method.windows, method.kept(0)) == (windows, kept)
    assert method.anchors[-1] == total - 1 - total % RATIO


def test_what_does_not_fit(tmp_path: Path) -> None:
    site = Site(43, signals=frozenset({"keys"}), depth=2)
    with pytest.raises(ReductionError, match="the last window would hold 3, too few for a summary of 4"):
        Vst("w", RATIO, WINDOW).fit(site)
    with pytest.raises(ReductionError, match="divide `window`; found ratio 8 and window 20"):
        Vst("w", 8, WINDOW).fit(site)
    for name, make in (
        ("llava", tiny.llava),
        ("qwen2_5_vl", tiny.qwen2_5_vl),
        ("gemma3", tiny.gemma3),
        ("llava_next", tiny.llava_next),
    ):
        make(tmp_path / name)
    for family, size in (("qwen2_5_vl", (140, 112)), ("gemma3", None), ("llava_next", (112, 56))):
        with pytest.raises(UsageError, match="one rotary position per token that looks back as far as the prompt"):
            tiny.unchecked(tmp_path / family, ("vst:weights=w,ratio=2,window=4",), Request(1, size))
    for other in ("fastv:layer=1,keep=4", "lookm:keep=4"):
        with pytest.raises(UsageError, match="Give one of the two"):
            tiny.unchecked(tmp_path / "llava", ("vst:weights=w", other))
    with pytest.raises(UsageError, match="how many tokens each one stands for"):
        tiny.unchecked(tmp_path / "llava", ("restore:keep=8,attention=on+divprune", "vst:weights=w"))


def test_layers_cannot_be_watched(tmp_path: Path) -> None:
    tiny.llava(tmp_path)
    plan = Job(str(tmp_path), (spec_of(tmp_path, 1, 2, 6),), "cpu_int4", quantizer="awq").plan()
    with pytest.raises(UsageError, match=r"vst runs them with projections of its own\. Choose --quantizer rtn"):
        _calibrate.check(plan, build_modules(plan))


@needs_rtx
def test_tensorrt_rtx_builds_it(tmp_path: Path) -> None:
    tiny.llava(tmp_path / "model")
    spec = spec_of(tmp_path / "model", 1, 2, 6)
    work = Workspace(tmp_path)
    run_export(Job(str(tmp_path / "model"), (spec,), for_one_gpu("rtx_int4", tmp_path)), work)
    assert {Path(r.file).stem for r in run_build(work)} == {"vision", "reduce", "prefill", "decode"}
