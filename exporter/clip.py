"""The CLIP checkpoint that `--clip-model` names: what a model with a CLIP tower lacks to compare patches with a question.

Such a model took CLIP's image tower, and neither the way from there into the space that CLIP shares with text (the tower's
last norm, the projection) nor the text tower. No torch at import.
"""

from __future__ import annotations

import re
from typing import Any

from exporter.checkpoint import Checkpoint
from exporter.errors import CheckpointError, UsageError
from exporter.nn.specs import ClipTextSpec

RENAMES = (
    (r"^vision_model\.post_layernorm\.", "aligned.post_layernorm."),
    (r"^visual_projection\.", "aligned.visual_projection."),
    (r"^text_model\.", "question."),
    (r"^text_projection\.", "question.text_projection."),
)

DEFAULTS: dict[str, dict[str, Any]] = {
    "vision": {"hidden_size": 768, "num_hidden_layers": 12},
    "text": {
        "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
        "max_position_embeddings": 77, "vocab_size": 49408, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
        "eos_token_id": 49407,
    },
}  # fmt: skip
"""What transformers takes a key for that config.json does not have."""


def canonical(key: str) -> str:
    """A tensor's name in a CLIP checkpoint → `aligned.…` and `question.…` for what is used of it; the rest stays."""
    for pattern, name in RENAMES:
        if re.match(pattern, key):
            return re.sub(pattern, name, key)
    return key


def shared_width(clip: Checkpoint, hidden: int, blocks: int) -> int:
    """The width of the space that images and text share.

    Args:
        clip: a CLIP checkpoint.
        hidden: width of the model's tower. blocks: its blocks up to the features.
    Raises:
        UsageError: this is no CLIP model, or not the one that the tower came from.
        CheckpointError: a config that cannot be read.
    """
    kind = clip.config["model_type"]
    if kind != "clip":
        raise UsageError(
            f"--clip-model {clip.folder}: config.json says model_type '{kind}', expected 'clip': image and text tower with "
            "their projections. Name the CLIP checkpoint that the model's tower came from."
        )
    try:
        vision = part(clip, "vision")
        found, layers = int(vision["hidden_size"]), int(vision["num_hidden_layers"])
        shared = int(clip.config.get("projection_dim", 512))
    except (TypeError, ValueError) as e:
        raise _unreadable(clip, e) from e
    if found != hidden or layers < blocks:
        raise UsageError(
            f"--clip-model {clip.folder} is not the CLIP that this model's tower came from: its image tower has {layers} "
            f"blocks of width {found}; expected width {hidden} and at least the {blocks} blocks up to the model's features."
        )
    return shared


def text_tokens(clip: Checkpoint) -> int:
    """Tokens of a question: the text tower's positions. Raises CheckpointError for a config that cannot be read."""
    try:
        return int(part(clip, "text")["max_position_embeddings"])
    except (TypeError, ValueError) as e:
        raise _unreadable(clip, e) from e


def text_spec(clip: Checkpoint) -> ClipTextSpec:
    """The text tower's shape. Raises CheckpointError for a config that cannot be read."""
    from exporter.nn.layers import ACTIVATIONS

    try:
        text = part(clip, "text")
        spec = ClipTextSpec(
            hidden=int(text["hidden_size"]),
            intermediate=int(text["intermediate_size"]),
            heads=int(text["num_attention_heads"]),
            eps=float(text["layer_norm_eps"]),
            activation=str(text["hidden_act"]),
            layers=int(text["num_hidden_layers"]),
            vocab=int(text["vocab_size"]),
            tokens=text_tokens(clip),
            shared=int(clip.config.get("projection_dim", 512)),
            eos=int(text["eos_token_id"]),
        )
    except (TypeError, ValueError) as e:
        raise _unreadable(clip, e) from e
    if spec.activation not in ACTIVATIONS:
        raise CheckpointError(
            f"{clip.folder}: activation '{spec.activation}' is not supported. Supported: {', '.join(ACTIVATIONS)}."
        )
    return spec


def part(clip: Checkpoint, kind: str) -> dict[str, Any]:
    """The config of one tower, as transformers reads it: `…_config_dict`, of early checkpoints, comes first."""
    early = clip.config.get(f"{kind}_config_dict")
    given = dict(clip.config.get(f"{kind}_config") or {}) if early is None else dict(early)
    return DEFAULTS[kind] | given


def _unreadable(clip: Checkpoint, e: Exception) -> CheckpointError:
    return CheckpointError(f"{clip.folder}/config.json is not that of a CLIP model ({type(e).__name__}: {e}).")
