"""The towers' taps, windows and merging. Parity of their features with Hugging Face: tests/families."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporter.errors import UsageError
from exporter.families._contract import Request
from exporter.families._towers import llava_tower
from exporter.nn.qwen_vit import Tap
from exporter.nn.reduce import Reduce
from exporter.nn.specs import BlockSpec, QwenVitSpec, VitSpec
from exporter.nn.vit import IN_TOWER, SelfAttention, Vit
from exporter.stages._modules import load_reference
from exporter.weights import load
from graphs._contract import Site
from graphs.random import Random
from graphs.uniform import Uniform
from tests.families import tiny

SPEC = QwenVitSpec(
    hidden=16, intermediate=16, blocks=2, heads=2, patch=14, temporal_patch=2, merge=2, window=56, full=(1,), out=16,
    activation="silu", patches=(8, 8),
)  # fmt: skip


@pytest.mark.parametrize("tower", tiny.TOWERS)
def test_signals_are_hugging_faces_attention_and_keys(tower: str, tmp_path: Path) -> None:
    """Of two frames, at the block of the features."""
    theirs: Any = tiny.llava(tmp_path, tower)
    theirs.set_attn_implementation("eager")
    plan = tiny.plan(tmp_path, (), Request(2))
    spec, cls = plan.geometry.tower, int(tower.startswith("clip"))
    names = ("hidden", "column_attention", "keys", *(("cls", "cls_attention") if cls else ()))
    vision = plan.family.vision(plan.checkpoint, plan.geometry, names, None)
    load(vision, "vision", plan.checkpoint)
    asked = tiny.question(load_graphs(plan))
    found = dict(zip(names, vision(torch.from_numpy(asked.pixels)), strict=True))

    tower_ = theirs.model.vision_tower
    encoder = getattr(tower_, "vision_model", tower_).encoder
    kept: dict[str, Any] = {}
    attention = encoder.layers[1].self_attn
    attention.k_proj.register_forward_hook(lambda module, args, out: kept.update(keys=out))
    attention.register_forward_hook(lambda module, args, out: kept.update(attention=out[1]))
    with torch.no_grad():
        hidden = theirs.model.vision_tower(torch.from_numpy(asked.pixels[0]), output_hidden_states=True).hidden_states[
            2
        ]
    weights = kept["attention"].mean(1)
    expected = {
        "hidden": hidden[:, cls:],
        "column_attention": weights.mean(1)[:, cls:],
        "keys": kept["keys"].unflatten(-1, (4, -1)).mean(2)[:, cls:],
        "cls": hidden[:, 0],
        "cls_attention": weights[:, 0, 1:],
    }
    assert spec.tokens == 16
    for name, value in found.items():
        torch.testing.assert_close(value[0], expected[name], atol=1e-5, rtol=1e-4)


def load_graphs(plan: Any) -> Any:
    from exporter.stages._describe import describe

    return describe(plan, {}, {})


@pytest.mark.parametrize("patches", [(8, 8), (10, 8), (4, 4), (2, 2), (6, 14)])
def test_windows_hold_every_token_once(patches: tuple[int, int]) -> None:
    spec = QwenVitSpec(**{**vars_of(SPEC), "patches": patches})
    rows, cols = spec.grid
    tokens = spec.windows[spec.windows >= 0]
    assert sorted(tokens.tolist()) == list(range(rows * cols))
    assert (spec.windows.reshape(-1)[spec.raster] == np.arange(rows * cols)).all()
    for window in spec.windows:
        inside = window[window >= 0]
        assert len({(t // cols // 2, t % cols // 2) for t in inside.tolist()}) == 1, (
            "a window is 2 × 2 tokens of one tile"
        )
    assert spec.padded == bool((spec.windows < 0).any())


def vars_of(spec: QwenVitSpec) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in spec.__dataclass_fields__}


def test_attention_columns_leave_padding_out() -> None:
    """With windows cut by the border, the same as over the real patches alone."""
    spec = QwenVitSpec(**{**vars_of(SPEC), "patches": (10, 8)})
    assert spec.padded
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(3, 2, len(spec.slots), 8, generator=generator) for _ in "qk")
    found = Tap(spec, "column_attention", 3)(q, k)
    real = torch.from_numpy(np.flatnonzero(spec.slots >= 0))
    rows = (q[:, :, real] @ k[:, :, real].transpose(2, 3) / 8**0.5).softmax(-1).mean((1, 2))
    expected = torch.zeros(3, spec.grid[0] * spec.grid[1])
    for value, slot in zip(rows.unbind(1), real.tolist(), strict=True):
        expected[:, spec.slots[slot] // 4] += value / 4
    torch.testing.assert_close(found[0], expected)


def test_a_merged_token_counts_as_often_as_it_stands_for() -> None:
    """Proportional attention: two equal tokens, or one of size 2, are the same to everybody else."""
    spec = BlockSpec(hidden=16, intermediate=16, heads=2, eps=1e-5, activation="gelu")
    attention, generator = SelfAttention(spec), torch.Generator().manual_seed(0)
    for parameter in attention.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    x = torch.randn(2, 5, 16, generator=generator)
    twice = torch.cat([x, x[:, -1:]], 1)
    size = torch.tensor([1.0, 1, 1, 1, 2]).log()[None, None, None]
    torch.testing.assert_close(attention(x, size)[0], attention(twice, None)[0][:, :5])


def test_tome_in_the_tower(tmp_path: Path) -> None:
    """Anchors are distinct patches; nothing merged is the plain tower."""
    tiny.llava(tmp_path)
    pixels = torch.randn(2, 1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    merged = load_reference(tiny.plan(tmp_path, ("tome:keep=8",)))
    hidden, anchor = merged.vision(pixels)
    assert hidden.shape == (2, 1, 8, 48)
    assert all(len(set(row)) == 8 and set(row) <= set(range(16)) for row in anchor[:, 0].tolist())
    nothing, plain = (load_reference(tiny.plan(tmp_path, specs)).vision(pixels) for specs in (("tome:schedule=0",), ()))
    assert len(nothing) == len(plain) == 1
    assert torch.equal(nothing[0], plain[0])


@pytest.mark.parametrize("name", ["keys@2", "cls_attention@2", "hidden@2", "cls@0", "column_attention@0", "patches@0"])
def test_signals_of_any_block_leave_the_features_alone(name: str, tmp_path: Path) -> None:
    """Block 2 is behind the features; what it gives is that of a tower whose features it produces."""
    tiny.llava(tmp_path)
    pixels = torch.randn(2, 2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    plan = tiny.plan(tmp_path, request=Request(2))
    spec = llava_tower(plan.checkpoint.config, -2, "default")
    kind, _, at = name.partition("@")
    usual = Vit(spec, ("hidden", name), 2)
    other = Vit(replace(spec, blocks=int(at) + 1), (kind,), 2)
    for tower in (usual, other):
        load(tower, "vision", plan.checkpoint)
    hidden, found = usual(pixels)
    torch.testing.assert_close(found, other(pixels)[0])
    torch.testing.assert_close(hidden, load_reference(plan).vision(pixels)[0])


def test_the_tower_has_the_in_tower_signals_it_promises() -> None:
    spec = VitSpec(
        hidden=16, intermediate=16, blocks=1, layers=1, heads=2, patch=14, image=28, eps=1e-5, activation="gelu", cls=True,
        pre_norm=True, patch_bias=False,
    )  # fmt: skip
    assert spec.in_tower_signals == {"hidden", "size", "cls", *IN_TOWER}
    assert replace(spec, cls=False).in_tower_signals == {"hidden", "size", *IN_TOWER} - {"cls_attention"}


def test_indices_compose_over_reductions() -> None:
    """Behind two reductions, `index` still counts among the tokens that came first."""
    first = Site(16, 2, (4, 4), frozenset({"hidden"}))
    uniform = Uniform(keep=8).fit(first)
    second = uniform.after(first)
    random = Random(keep=3, seed=1).fit(second)
    module = Reduce([("uniform", uniform, first), ("random", random, second)], None, ("hidden",))
    hidden = torch.randn(2, 2, 16, 6, generator=torch.Generator().manual_seed(0))
    tokens, index = module(hidden)
    assert index.shape == (2, 6)
    flat = hidden.flatten(1, 2)
    assert all(torch.equal(tokens[b], flat[b, index[b]]) for b in range(2))
    assert (index[:, :3] < 16).all()
    assert (index[:, 3:] >= 16).all()


def test_attention_behind_a_reduction_in_the_tower(tmp_path: Path) -> None:
    """What Hugging Face's own last block would attend to, given the merged tokens, in their order."""
    theirs: Any = tiny.llava(tmp_path)
    theirs.set_attn_implementation("eager")
    plan = tiny.plan(tmp_path, ("mustdrop:keep=10,window=2", "mustdrop_l:keep=4"))
    assert plan.taps == ("hidden", "anchor", "cls_attention@2")
    vision: Any = load_reference(plan).vision
    entered: list[torch.Tensor] = []
    vision.encoder["layers"][2].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    with torch.no_grad():
        hidden, _, attention = vision(torch.from_numpy(tiny.question(load_graphs(plan)).pixels))
        block = theirs.model.vision_tower.encoder.layers[2]
        _, weights = block.self_attn(block.layer_norm1(entered[0]))
    assert torch.equal(hidden[:, 0], entered[0][:, 1:])
    torch.testing.assert_close(attention[:, 0], weights.mean(1)[:, 0, 1:])
    assert attention.shape == (1, 1, 10)


def test_attention_that_counts_sizes_is_not_offered(tmp_path: Path) -> None:
    tiny.llava(tmp_path)
    for spec in ("tome:keep_ratio=0.5", "uniform:keep=8"):
        with pytest.raises(UsageError, match="`key_ratio=0` does without key tokens"):
            tiny.plan(tmp_path, (spec, "mustdrop_l:keep=4"))
        assert not tiny.plan(tmp_path, (spec, "mustdrop_l:keep=4,key_ratio=0")).for_prefill
