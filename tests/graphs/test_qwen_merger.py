from __future__ import annotations

import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger

from graphs._contract import ReductionError, Site
from graphs.qwen_merger import QwenMerger
from tests.graphs.compressing import close, normal, weights_of

SITE = Site(24, 2, (4, 6), frozenset({"hidden"}), dim=8, llm_dim=12)


def test_tensors_are_those_of_the_published_checkpoints() -> None:
    """Qwen2.5-VL-7B and Qwen2-VL-7B: towers 1280 wide, language models 3584 wide."""
    published = {
        "visual.merger.ln_q.weight": (1280,),
        "visual.merger.mlp.0.weight": (5120, 5120),
        "visual.merger.mlp.0.bias": (5120,),
        "visual.merger.mlp.2.weight": (3584, 5120),
        "visual.merger.mlp.2.bias": (3584,),
    }
    site = Site(1024, 1, (32, 32), SITE.signals, dim=1280, llm_dim=3584)
    for method, more in ((QwenMerger(), {}), (QwenMerger("layer"), {"visual.merger.ln_q.bias": (1280,)})):
        names = {QwenMerger.prefixes[1] + name: shape for name, shape in method.fit(site).trained(site).items()}
        assert names == published | more
        assert method.after(site).tokens == 256


@pytest.mark.parametrize("norm", ["rms", "layer"])
@torch.no_grad()
def test_against_hugging_face(norm: str) -> None:
    """Its modules take the four patches of a token one after another."""
    method = (QwenMerger() if norm == "rms" else QwenMerger("layer")).fit(SITE)
    weights, x = weights_of(method, SITE), normal(2, 2, 24, 8)
    theirs = (Qwen2_5_VLPatchMerger if norm == "rms" else PatchMerger)(dim=12, context_dim=8)
    theirs.load_state_dict(weights)
    apart = x.unflatten(2, (2, 2, 3, 2)).transpose(3, 4).reshape(-1, 8)
    close(method.forward({"hidden": x, **weights}, SITE), theirs(apart).reshape(2, 2, 6, 12))


@pytest.mark.parametrize(("grid", "words"), [((4, 5), "both sides must be even; found 4 × 5"), (None, "whole raster")])
def test_what_does_not_fit(grid: tuple[int, int] | None, words: str) -> None:
    with pytest.raises(ReductionError, match=words):
        QwenMerger().fit(Site(20, 1, grid, SITE.signals, dim=8, llm_dim=12))
