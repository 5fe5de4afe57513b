"""The ways a checkpoint can lie on disk: shards, older tensor names, other float types."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from exporter.checkpoint import Checkpoint
from exporter.errors import CheckpointError
from exporter.families._contract import Request, decoder_spec
from exporter.job import Job
from exporter.plan import Step, make_plan
from exporter.stages._modules import load_reference
from exporter.stages.validate import controls
from exporter.trained import trained_tensors
from tests.families import tiny

SIZED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
REQUEST = {"llava": Request(), "video_llava": Request(2), **{family: Request(1, (112, 112)) for family in SIZED}}

LAYOUTS = {
    ("llava", "2023"): {
        "text": "language_model.model.", "head": "language_model.lm_head.",
        "vision": "vision_tower.vision_model.", "projector": "multi_modal_projector.",
    },
    ("llava", "2025"): {
        "text": "model.language_model.", "head": "lm_head.",
        "vision": "model.vision_tower.vision_model.", "projector": "model.multi_modal_projector.",
    },
    ("llava", "without the inner name"): {
        "text": "model.language_model.", "head": "lm_head.",
        "vision": "model.vision_tower.", "projector": "model.multi_modal_projector.",
    },
    ("video_llava", "2024"): {
        "text": "language_model.model.", "head": "language_model.lm_head.", "vision": "image_tower.vision_model.",
        "vision.video": "video_tower.vision_model.", "projector": "multi_modal_projector.",
    },
    ("qwen2_5_vl", "2024"): {"text": "model.", "head": "lm_head.", "vision": "visual."},
    ("qwen2_vl", "2024"): {"text": "model.", "head": "lm_head.", "vision": "visual."},
    ("qwen3_vl", "2025"): {"text": "model.language_model.", "head": "lm_head.", "vision": "model.visual."},
    ("internvl", "2025"): {
        "text": "language_model.model.", "head": "language_model.lm_head.",
        "vision": "vision_tower.", "projector": "multi_modal_projector.",
    },
    **{
        (family, "2024"): {
            "text": "language_model.model.", "head": "language_model.lm_head.",
            "vision": "vision_tower.vision_model.", "projector": "multi_modal_projector.",
        }
        for family in ("gemma3", "paligemma", "llava_next", "llava_onevision")
    },
    ("qwen2_5_vl", "2025"): {"text": "model.language_model.", "head": "lm_head.", "vision": "model.visual."},
}  # fmt: skip
"""(family, since when): prefix of our names → prefix in the file."""


def parameters(folder: Path, family: str) -> dict[str, torch.Tensor]:
    """Every parameter of the reference modules, by role and name."""
    modules = load_reference(tiny.plan(folder, (), REQUEST.get(family)))
    return {f"{file}.{n}": p for file, module in modules.stored().items() for n, p in module.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_tensor_names(family: str, layout: str, tmp_path: Path) -> None:
    """The same weights under every generation of names."""
    original, renamed = tmp_path / "original", tmp_path / "renamed"
    getattr(tiny, family)(original)
    checkpoint = tiny.plan(original, (), REQUEST.get(family)).checkpoint
    prefixes = LAYOUTS[family, layout]
    tensors = {}
    for key, tensor in load_file(original / "model.safetensors").items():
        name = checkpoint._canonical(key)
        ours = max((prefix for prefix in prefixes if name.startswith(f"{prefix}.")), key=len)
        tensors[prefixes[ours] + name.removeprefix(f"{ours}.")] = tensor
    renamed.mkdir()
    shutil.copy(original / "config.json", renamed)
    save_file(tensors, renamed / "model.safetensors")
    assert same(parameters(renamed, family), parameters(original, family))


@pytest.mark.parametrize("family", REQUEST)
def test_shards(family: str, tmp_path: Path) -> None:
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    getattr(tiny, family)(whole).save_pretrained(sharded, max_shard_size="100KB")
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert same(parameters(sharded, family), parameters(whole, family))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_are_read_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs: Any = tiny.llava(tmp_path / "wide")
    theirs.to(dtype).save_pretrained(tmp_path / "narrow")
    wide, narrow = (parameters(tmp_path / name, "llava") for name in ("wide", "narrow"))
    assert all(p.dtype == torch.float32 for p in narrow.values())
    assert same(narrow, {name: p.to(dtype).float() for name, p in wide.items()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_a_norm_lacks_is_added_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs: Any = tiny.llava(tmp_path, decoder="gemma3_text")
    theirs.to(dtype).save_pretrained(tmp_path)
    stored = theirs.model.language_model.named_parameters()
    expected = {f"llm.{name}": 1 + p.float() for name, p in stored if "norm" in name}
    found = parameters(tmp_path, "llava")
    assert len(expected) == 4 * 6 + 1
    assert same({name: found[name] for name in expected}, expected)


def test_a_tower_from_its_own_checkpoint(tmp_path: Path) -> None:
    """MobileVLM's first version: config.json names the tower, --clip-model brings it."""
    theirs: Any = tiny.mobilevlm(tmp_path / "model", version=1, tower=False)
    with pytest.raises(CheckpointError, match=r"mm_vision_tower 'somebody/small-clip' is unknown.*--clip-model"):
        tiny.plan(tmp_path / "model")
    tower = tiny.clip(tmp_path / "clip").vision_model
    plan = tiny.plan(tmp_path / "model", (), Request(clip=Checkpoint(tmp_path / "clip")))
    assert make_plan(plan.checkpoint, [], plan.profile, plan.request).geometry == plan.geometry
    pixels = torch.randn(1, 1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = load_reference(plan).vision(pixels)[0]
        expected = tower(pixels[0], output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=0)
    assert torch.equal(plan.checkpoint.tensor("head.weight"), theirs.llama.lm_head.weight)


def test_a_tower_that_nobody_brings(tmp_path: Path) -> None:
    tiny.mobilevlm(tmp_path, tower=False)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vision_config": tiny.CLIP}))
    with pytest.raises(
        CheckpointError, match=r"does not hold its tower, somebody/small-clip. Name that checkpoint: --clip-model"
    ):
        load_reference(tiny.plan(tmp_path))


def test_two_layouts_are_called_llava(tmp_path: Path) -> None:
    """LLaVA's own code called its layout so before transformers did, and `llava_llama` afterwards."""
    tiny.llava_llama(tmp_path)
    newer, config = parameters(tmp_path, "llava_llama"), json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "vision_config"}))
    rename(tmp_path, model_type="llava", mm_vision_tower="openai/clip-vit-large-patch14")
    assert tiny.plan(tmp_path).family.model_type == "llava_llama"
    rename(tmp_path, **config)
    assert same(parameters(tmp_path, "llava_llama"), newer)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres'.*llava_next"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature 'cls_patch'"),
        ({"mm_vision_tower": None}, "names no `mm_vision_tower`.*VILA"),
        ({"mm_projector_type": "linear"}, "mm_projector_type 'linear' is not supported.*--reduce"),
    ],
)
def test_what_is_not_read_of_the_original_layout(said: dict[str, Any], words: str, tmp_path: Path) -> None:
    tiny.llava_llama(tmp_path)
    rename(tmp_path, **said)
    with pytest.raises(CheckpointError, match=words):
        load_reference(tiny.plan(tmp_path))


def with_projector_of(spec: str, folder: Path) -> Step:
    """A whole model with this compressor, its tensors under the names of its authors."""
    tiny.llava_llama(folder)
    (step,) = tiny.unchecked(folder, (spec,)).steps
    tensors = {k: x for k, x in load_file(folder / "model.safetensors").items() if "mm_projector" not in k}
    own = load_file(tiny.weights(step, folder / "own.safetensors"))
    save_file(tensors | {f"{step.method.prefixes[1]}{k}": x for k, x in own.items()}, folder / "model.safetensors")
    return step


@pytest.mark.parametrize("spec", ["tokenpacker", "mqt:keep=6", "hires", "llava_stf:blocks=1"])
def test_a_compressor_is_known_by_its_tensors(spec: str, tmp_path: Path) -> None:
    """And they are found: `check_weights` asks for every one."""
    step = with_projector_of(spec, tmp_path)
    plan = tiny.plan(tmp_path, (spec,))
    assert plan.geometry.compressor == spec.partition(":")[0]
    (found,) = plan.steps
    assert (found.method, found.weights) == (step.method, "")
    assert len(trained_tensors(plan, found)) == len(load_file(tmp_path / "own.safetensors"))


def test_a_projector_of_the_model_is_no_reduction(tmp_path: Path) -> None:
    """With all that it was trained to give it is what a reduced model is compared with; what else shortens is left out."""

    def reduced(*specs: str) -> tuple[bool, tuple[str, ...]]:
        job = Job("any", specs, "cpu_fp32")
        return job.reduces, job.unreduced().reductions

    assert reduced() == (False, ())
    assert reduced("mqt:heads=2") == (False, ("mqt:heads=2",))
    assert reduced("mqt:keep=6,heads=2", "fastv:layer=1,keep=3") == (True, ("mqt:heads=2",))
    assert reduced("mqt:keep=6,weights=file") == (True, ())
    with_projector_of("tokenpacker", tmp_path)
    plan = tiny.plan(tmp_path, ("fastv:layer=1,keep=2",))
    assert [step.name for step in plan.unreduced().steps] == ["tokenpacker"]
    named = [(c.kept, [s.name for s in c.steps]) for _, c in controls(plan)]
    assert named == [(2, ["tokenpacker", "random"]), (2, ["tokenpacker", "uniform"])]


def rename(folder: Path, **said: Any) -> None:
    """Other facts in config.json; None takes one away."""
    config = json.loads((folder / "config.json").read_text()) | said
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_weights_that_are_pickles(tmp_path: Path) -> None:
    tiny.llava(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no model.safetensors.*save them as safetensors first"):
        load_reference(tiny.plan(tmp_path))


PUBLISHED: list[dict[str, Any]] = [
    {
        "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "rope_theta": 1000000,
        "max_window_layers": 36, "sliding_window": None, "use_sliding_window": False, "rope_scaling": None,
    },
    {
        "model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18,
        "num_attention_heads": 8, "num_key_value_heads": 1, "vocab_size": 257216,
    },
    {
        "model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18,
        "num_attention_heads": 8, "num_key_value_heads": 1, "vocab_size": 256000, "hidden_act": "gelu",
    },
    {
        "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_key_value_heads": 4, "vocab_size": 257216,
    },
    {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    {
        "model_type": "gemma3_text", "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48,
        "num_attention_heads": 16, "num_key_value_heads": 8, "sliding_window_pattern": 6, "sliding_window": 1024,
        "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
    },
]  # fmt: skip
"""Configs that say little, in the words of their time."""


@pytest.mark.parametrize("text", PUBLISHED, ids=lambda text: f"{text['model_type']}-{len(text)}")
def test_what_a_config_leaves_out(text: dict[str, Any]) -> None:
    """A short config is the same decoder as the long one that Hugging Face makes of it."""
    long = AutoConfig.for_model(**json.loads(json.dumps(text))).to_dict()
    assert len(long) > len(text)
    assert decoder_spec({"text_config": text}) == decoder_spec({"text_config": long})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"do_layer_norm_before": False}, "'opt' with do_layer_norm_before False is not supported, only with True"),
        ({"word_embed_proj_dim": 512}, r"narrower \(word_embed_proj_dim\)"),
    ],
)
def test_no_opt_of_another_order(text: dict[str, Any], message: str) -> None:
    """That of 350M parameters, which differs in both."""
    with pytest.raises(CheckpointError, match=message):
        decoder_spec({"text_config": {"model_type": "opt", "hidden_size": 1024, "num_attention_heads": 16, **text}})


def test_blip_2_that_is_refused(tmp_path: Path) -> None:
    tiny.blip_2(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": {"model_type": "t5"}}))
    with pytest.raises(CheckpointError, match="half of an encoder and a decoder"):
        tiny.plan(tmp_path)
    del config["image_token_index"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no image_token_index"):
        tiny.plan(tmp_path)


def test_no_decoder_that_looks_ahead() -> None:
    with pytest.raises(CheckpointError, match="use_bidirectional_attention"):
        decoder_spec({"text_config": PUBLISHED[-1] | {"use_bidirectional_attention": True}})


def test_a_config_with_flat_text_settings_and_old_rope_names(tmp_path: Path) -> None:
    """Qwen2.5-VL as first published: no text_config, `rope_scaling` of type mrope."""
    tiny.qwen2_5_vl(tmp_path)
    new = tiny.plan(tmp_path, (), REQUEST["qwen2_5_vl"])
    config = json.loads((tmp_path / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    (tmp_path / "config.json").write_text(json.dumps(text | config))
    old = tiny.plan(tmp_path, (), REQUEST["qwen2_5_vl"])
    assert old.family.decoder(old.checkpoint) == new.family.decoder(new.checkpoint)
    assert old.geometry == new.geometry
