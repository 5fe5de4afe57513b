"""SmolVLM and SmolVLM2: SigLIP tower, pixel shuffle, SmolLM2 (Llama) decoder; one tile, or a grid of tiles with the whole image.

A clip (`--frames` above 1) is so many tiles, each behind its time, for frames sampled once a second as SmolVLM2's processor does it. With
the `--image-size` of a single tile it is so many images instead.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import ClassVar

from exporter.checkpoint import Checkpoint
from exporter.errors import UsageError
from exporter.families._contract import Geometry, Request
from exporter.families._idefics import Idefics, written

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


class SmolVlm(Idefics):
    model_type = "smolvlm"
    summary = "SmolVLM and SmolVLM2: SigLIP tower, pixel shuffle, Llama decoder; one tile or a static grid of tiles"
    published: ClassVar = {
        "_name_or_path": "HuggingFaceTB/SmolVLM2-2.2B-Instruct", "model_type": "smolvlm", "image_token_id": 49190,
        "scale_factor": 3,
        "vision_config": {
            "model_type": "smolvlm_vision", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
            "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
        },
        "text_config": {
            "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
            "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 64, "vocab_size": 49280,
            "rms_norm_eps": 1e-5, "rope_theta": 130000.0, "max_position_embeddings": 8192,
        },
    }  # fmt: skip

    def geometry(self, checkpoint: Checkpoint, request: Request) -> Geometry:
        found = super().geometry(checkpoint, request)
        clip = request.frames > 1 and request.image_size is None
        return replace(found, written=timed(request.frames)) if clip else found


def timed(frames: int) -> str:
    """What the processor writes for a clip of so many frames, and the space that its template for clips has in front."""
    if frames > 99:
        raise UsageError(f"A clip of {frames} frames: SmolVLM2 was taught at most 64. Ask for fewer: --frames.")
    count = (
        ONES[frames] if frames < 20 else "-".join([TENS[frames // 10 - 2], *([ONES[frames % 10]] * (frames % 10 > 0))])
    )
    intro = f" You are provided the following series of {count} frames from a {timedelta(seconds=frames)} [H:MM:SS] video.\n"
    shown = (f"\nFrame from {second // 60:02}:{second % 60:02}:{written(1, 1)}" for second in range(frames))
    return f"{intro}{''.join(shown)}\n\n"


FAMILY = SmolVlm()
