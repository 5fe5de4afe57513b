"""Qwen3-VL: tower with full attention, learned and rotary positions, 2×2 mergers, of which those on the way give vectors to the
first decoder layers (DeepStack), interleaved M-RoPE; exported for one static grid.

A clip has a placeholder for every time step, and its time in seconds in front of it, for frames sampled twice a second.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from exporter.checkpoint import Checkpoint
from exporter.errors import CheckpointError
from exporter.families._contract import Geometry, Request, renamed
from exporter.families._qwen import FRAMES_PER_SECOND, Qwen, patch_grid
from exporter.nn.specs import DecoderSpec, QwenVitSpec

RENAMES = (
    (r"^vision\.deepstack_merger_list\.", "vision.planes."),
    (r"^(vision\.blocks\.\d+\.mlp)\.linear_fc", r"\1.fc"),
    (r"^(vision\.(?:merger|planes\.\d+))\.norm\.", r"\1.ln_q."),
    (r"^(vision\.(?:merger|planes\.\d+))\.linear_fc1\.", r"\1.mlp.0."),
    (r"^(vision\.(?:merger|planes\.\d+))\.linear_fc2\.", r"\1.mlp.2."),
)

START, CLIP, END = "<|vision_start|>", "<|video_pad|>", "<|vision_end|>"


class Qwen3VL(Qwen):
    model_type = "qwen3_vl"
    summary = "Qwen3-VL: learned and rotary positions, DeepStack, interleaved M-RoPE, static grid"
    side = 512
    normal = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    published: ClassVar = {
        "_name_or_path": "Qwen/Qwen3-VL-8B-Instruct", "model_type": "qwen3_vl",
        "image_token_id": 151655, "video_token_id": 151656,
        "vision_config": {
            "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 4096, "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [8, 16, 24], "hidden_act": "gelu_pytorch_tanh",
        },
        "text_config": {
            "model_type": "qwen3_vl_text", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
            "rope_theta": 5000000, "rope_scaling": {
                "mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default",
            },
        },
    }  # fmt: skip

    def canonical(self, key: str) -> str:
        return renamed(super().canonical(key), RENAMES)

    def geometry(self, checkpoint: Checkpoint, request: Request) -> Geometry:
        g = super().geometry(checkpoint, request)
        if request.frames == 1:
            return g
        # Every time step is a picture of its own, behind its time: the middle of those of its frames.
        merged, steps = request.frames // g.tower.frames, g.tower.frames
        ids = g.ids[: g.tower.tokens]
        seconds = [(step * merged + (merged - 1) / 2) / FRAMES_PER_SECOND for step in range(steps)]
        written = "".join(f"<{second:.1f} seconds>{START}{CLIP}{END}" for second in seconds)
        span = max(max(i) for i in ids) + 1
        return replace(g, placeholders=steps, ids=ids, span=span, mark=START + CLIP + END, written=written)

    def decoder(self, checkpoint: Checkpoint) -> DecoderSpec:
        planes = len(_planes(checkpoint.config["vision_config"]))
        spec = super().decoder(checkpoint)
        if planes >= spec.layers:
            raise CheckpointError(
                f"{planes} deepstack_visual_indexes for {spec.layers} decoder layers; expected fewer."
            )
        return replace(spec, planes=planes, mrope_interleaved=True)

    def tower(self, config: dict[str, Any], size: tuple[int, int]) -> QwenVitSpec:
        vision = config["vision_config"]
        patch, merge = int(vision.get("patch_size", 16)), int(vision.get("spatial_merge_size", 2))
        blocks = int(vision.get("depth", 27))
        return QwenVitSpec(
            hidden=int(vision.get("hidden_size", 1152)),
            intermediate=int(vision.get("intermediate_size", 4304)),
            blocks=blocks,
            heads=int(vision.get("num_heads", 16)),
            patch=patch,
            temporal_patch=int(vision.get("temporal_patch_size", 2)),
            merge=merge,
            window=0,
            full=tuple(range(blocks)),
            out=int(vision.get("out_hidden_size", 3584)),
            activation=str(vision.get("hidden_act", "gelu_pytorch_tanh")),
            patches=patch_grid(size, patch, merge),
            gated=False,
            layer_norm=True,
            patch_bias=True,
            table=int(vision.get("num_position_embeddings", 2304)),
            planes=_planes(vision),
        )


def _planes(vision: dict[str, Any]) -> tuple[int, ...]:
    """The tower's blocks whose output the first decoder layers get, ascending."""
    found = tuple(int(block) for block in vision.get("deepstack_visual_indexes", (8, 16, 24)))
    if list(found) != sorted(set(found)):
        raise CheckpointError(f"deepstack_visual_indexes {list(found)}: expected ascending block numbers.")
    return found


FAMILY = Qwen3VL()
