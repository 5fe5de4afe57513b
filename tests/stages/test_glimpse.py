"""A probe behind the prompt: the engine against PyTorch, and against Hugging Face's layers with the publication's token appended and
their cache cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.vision_utils import get_vision_window_index

from exporter.checkpoint import Checkpoint
from exporter.errors import UsageError
from exporter.families._contract import Request
from exporter.job import Job
from exporter.journal import Journal
from exporter.pipeline import run_build, run_export
from exporter.quantize._contract import Form
from exporter.stages._store import WeightFile
from exporter.weights import FileSource, Source
from exporter.workspace import Workspace
from profiles._schema import Precision
from tests.conftest import for_one_gpu, needs_rtx
from tests.families import hugging_face, tiny
from tests.graphs.oracle_glimpse import New
from tests.stages import uncached
from tests.stages.conftest import SIZES, Engine, Export

ANSWER, KEEP, LAYER = 64, 6, 2
BLOCKS = {"llava": (1, 0), "qwen2_5_vl": (3, 2, 1, 0)}
SCORES = {"llava": "log_softmax", "qwen2_5_vl": "logits"}
"""As the publication does with either."""

Spec = Callable[[str], str]


@pytest.fixture(scope="module")
def new() -> dict[str, New]:
    return {family: New(64, 4, 4, 48, len(blocks)).randomized() for family, blocks in BLOCKS.items()}


@pytest.fixture(scope="module")
def spec(new: dict[str, New], tmp_path_factory: pytest.TempPathFactory) -> Spec:
    folder = tmp_path_factory.mktemp("glimpse")
    files = {family: modules.save(folder / f"{family}.safetensors") for family, modules in new.items()}
    return lambda family: f"glimpse:weights={files[family]},keep={KEEP},layer={LAYER},scores={SCORES[family]}"


@pytest.mark.parametrize("family", BLOCKS)
def test_onnx_runtime_equals_pytorch(family: str, spec: Spec, exported: Export, engine: Engine) -> None:
    case = exported(family, (spec(family),))
    assert (case.graphs.text.groups, case.graphs.text.kept) == ([0, 0, 0, 0], [KEEP])
    assert case.graphs.for_prefill == [f"patches@{block}" for block in BLOCKS[family]]
    assert case.graphs.guided
    asked = [tiny.question(case.graphs, 0), tiny.question(case.graphs, 1, (20, 21, 22, 23, 24))]
    pixels, prompts = np.concatenate([q.pixels for q in asked]), [q.prompt for q in asked]
    theirs, ours = case.theirs().generate(pixels, prompts, ANSWER), engine(case).generate(pixels, prompts, ANSWER)
    assert ours.tokens == theirs.tokens
    assert all(len(set(row)) > 4 for row in ours.tokens), "a model that repeats itself shows nothing"
    assert list(ours.kept) == ["kept_3"]
    assert (ours.kept["kept_3"] == theirs.kept["kept_3"]).all()
    assert (ours.kept["kept_3"][0] != ours.kept["kept_3"][1]).any()
    for row, one in enumerate(asked):
        assert engine(case).generate(one.pixels, [one.prompt], ANSWER).tokens == ours.tokens[row : row + 1]


@pytest.mark.parametrize("family", BLOCKS)
def test_against_a_loop_with_the_token_appended(
    family: str, new: dict[str, New], spec: Spec, exported: Export, engine: Engine
) -> None:
    case = exported(family, (spec(family),))
    ours, model = engine(case), uncached.load(family, case.plan.checkpoint.folder)
    whole = engine(exported(family))
    for seed, text in enumerate([(11, 12, 13), (20, 21, 22, 23, 24)]):
        asked = tiny.question(case.graphs, seed, text)
        tokens, kept = loop(model, asked, case.graphs, new[family], family)
        found = ours.generate(asked.pixels, [asked.prompt], ANSWER)
        assert found.kept["kept_3"].tolist() == [kept]
        assert found.tokens == [tokens]
        assert tokens != whole.generate(asked.pixels, [asked.prompt], ANSWER).tokens[0]


@torch.no_grad()
def loop(model: Any, asked: tiny.Question, graphs: Any, new: New, family: str) -> tuple[list[int], list[int]]:
    """Greedy tokens, and the visual tokens that stay: everything Hugging Face's, from the pixels on."""
    text, arguments = model.model.language_model, hugging_face.arguments(asked, graphs)
    ids = arguments["input_ids"][0]
    visual = ids == graphs.text.image_token
    features, states = tower(model, arguments, BLOCKS[family])
    x = text.embed_tokens(ids[None])
    x[:, visual] = features
    places = uncached._positions(model, arguments)
    after = places[..., -1:] + 1
    x, places = torch.cat([x, new.embedding(0)[None]], 1), torch.cat([places, after], -1)
    cache, n = DynamicCache(config=text.config), len(ids)

    def run(i: int, x: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        out = text.layers[i](
            x, position_embeddings=text.rotary_emb(x, places), attention_mask=mask, past_key_values=cache
        )
        return out if isinstance(out, Tensor) else out[0]

    causal = torch.full((n + 1, n + 1), -1e30).triu(1)[None, None]
    for i in range(LAYER + 1):
        if i:
            x[:, -1] += new.embedding(i)
        entered, x = x, run(i, x, places, causal)
    attention = text.layers[LAYER].self_attn
    query = attention.q_proj(text.layers[LAYER].input_layernorm(entered)).unflatten(-1, (4, 16)).transpose(1, 2)
    query, _ = apply_rotary_pos_emb(query, query, *text.rotary_emb(entered, places))
    scores = (query[:, :, -1:] @ cache.layers[LAYER].keys.repeat_interleave(2, 1).transpose(2, 3) / 4)[:, :, 0]
    scores = scores.log_softmax(-1) if SCORES[family] == "log_softmax" else scores
    logits = new.attn_fuser(scores[:, :, :-1][:, :, visual].transpose(1, 2), graphs.visual.grid, states)[0]
    kept = sorted(logits.topk(KEEP).indices.tolist())

    stays = ~visual
    stays[visual.nonzero()[kept, 0]] = True
    for layer in cache.layers[: LAYER + 1]:
        layer.keys, layer.values = (t[:, :, :-1][:, :, stays] for t in (layer.keys, layer.values))
    x, places = x[:, :-1][:, stays], places[..., :-1][..., stays]
    for i in range(LAYER + 1, len(text.layers)):
        x = run(i, x, places, causal[..., : x.shape[1], : x.shape[1]])
    tokens = [int(model.lm_head(text.norm(x)[:, -1]).argmax())]
    while len(tokens) < ANSWER:
        x = text.embed_tokens(torch.tensor([tokens[-1:]]))
        for i in range(len(text.layers)):
            x = run(i, x, after, torch.zeros(1, 1, 1, 1))
        after = after + 1
        tokens.append(int(model.lm_head(text.norm(x)[:, -1]).argmax()))
    assert {layer.keys.shape[2] for layer in cache.layers} == {int(stays.sum()) + ANSWER - 1}
    return tokens, kept


def tower(model: Any, arguments: dict[str, Any], blocks: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
    """Image features [tokens, hidden], and what the publication takes of the tower, each [1, tokens, width]."""
    pixels = arguments["pixel_values"]
    if "image_grid_thw" not in arguments:
        found = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        features = model.model.multi_modal_projector(found[-2][:, 1:])[0]
        return features, [found[block + 1][:, 1:] for block in blocks]
    visual, grid, seen = model.model.visual, arguments["image_grid_thw"], []
    hooks = [block.register_forward_hook(lambda _, given, out: seen.append(out)) for block in visual.blocks]
    features = visual(pixels, grid_thw=grid).pooler_output
    for hook in hooks:
        hook.remove()
    back = torch.argsort(get_vision_window_index(grid, visual.spatial_merge_size, visual.window_size, 14)[0])
    return features, [seen[block].unflatten(0, (-1, 4)).mean(1)[back][None] for block in blocks]


@needs_rtx
def test_tensorrt_rtx_builds_it(spec: Spec, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    work = Workspace(tmp_path)
    run_export(Job(str(checkpoints["llava"]), (spec("llava"),), for_one_gpu("rtx_int4", tmp_path)), work)
    assert {Path(r.file).stem for r in run_build(work)} == {"vision", "reduce", "prefill", "decode"}


def test_a_methods_own_tensors_are_not_quantised(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Though they stand in MatMul as those of the layers do."""
    value = ir.Value(name="weight", shape=ir.Shape([64, 64]))
    journal, checkpoint = Journal(tmp_path, {}), Checkpoint(checkpoints["llava"])
    how = Precision("fp32", "int4", (32,))
    file = WeightFile(tmp_path / "llm.data", journal, checkpoint, {}, torch.float32, how)
    assert file._chosen(value, Source("weight", (64, 64), False)) == Form(4, 32)
    assert file._chosen(value, FileSource("weight", (64, 64), False, tmp_path)) is None


@pytest.mark.parametrize("other", ["fastv:layer=1,keep=4", "lookm:keep=4", "dyrate:layer=3,keep=4"])
def test_nothing_else_acts_inside(other: str, spec: Spec, checkpoints: dict[str, Path]) -> None:
    for specs in ((spec("llava"), other), (other, spec("llava"))):
        with pytest.raises(UsageError, match="Give one of the two"):
            tiny.plan(checkpoints["llava"], specs)


@pytest.mark.parametrize("before", ["uniform:keep=8", "avgpool:keep=4", "tome:keep=8"])
def test_nothing_acts_before(before: str, spec: Spec, checkpoints: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="does not fit llava: it needs the whole grid of one image"):
        tiny.plan(checkpoints["llava"], (before, spec("llava")))


def test_what_does_not_fit(spec: Spec, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"one frame at a time; found 16 tokens in 4 frame\(s\)"):
        tiny.plan(checkpoints["llava"], (spec("llava"),), Request(4))
    other = New(64, 4, 2, 40, 2).randomized().save(tmp_path / "other.safetensors")
    message = (
        r"does not fit this model. Expected `attn_fuser.attn_in_proj.weight` \[4, 256\] \(found \[2, 256\]\), "
        r"`attn_fuser.cond_in_projs.0.weight` \[48, 512\] \(found \[40, 512\]\)"
    )
    with pytest.raises(UsageError, match=message):
        tiny.plan(checkpoints["llava"], (f"glimpse:weights={other},keep=4",))
    fewer = spec("qwen2_5_vl") + ",block_list=1+0"
    with pytest.raises(UsageError, match=r"Expected `attn_fuser.attn_out_projs.1.weight` \[256, 1\] \(found none\)"):
        tiny.plan(checkpoints["qwen2_5_vl"], (fewer,), Request(1, SIZES["qwen2_5_vl"]))
