"""The ways a checkpoint can lie on disk: shards, older tensor names, other float types."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.families._contract import Request
from exporter.stages.export import load_reference
from tests.families import tiny

REQUEST = {"llava": Request(), "qwen2_5_vl": Request(1, (112, 112))}

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
    ("qwen2_5_vl", "2024"): {"text": "model.", "head": "lm_head.", "vision": "visual."},
    ("qwen2_5_vl", "2025"): {"text": "model.language_model.", "head": "lm_head.", "vision": "model.visual."},
}  # fmt: skip
"""(family, since when): prefix of our names → prefix in the file."""


def parameters(folder: Path, family: str) -> dict[str, torch.Tensor]:
    """Every parameter of the reference modules, by role and name."""
    modules = load_reference(tiny.plan(folder, (), REQUEST[family]))
    return {f"{file}.{n}": p for file, module in modules.stored().items() for n, p in module.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_tensor_names(family: str, layout: str, tmp_path: Path) -> None:
    """The same weights under every generation of names."""
    original, renamed = tmp_path / "original", tmp_path / "renamed"
    getattr(tiny, family)(original)
    checkpoint = tiny.plan(original, (), REQUEST[family]).checkpoint
    prefixes = LAYOUTS[family, layout]
    tensors = {}
    for key, tensor in load_file(original / "model.safetensors").items():
        role, _, rest = checkpoint._canonical(key).partition(".")
        tensors[prefixes[role] + rest] = tensor
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
