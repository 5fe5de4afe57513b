"""A `model_type` without a family: transformers' own tower and decoder, each traced whole.

What that takes: an image becomes one sequence of visual tokens from its pixels alone (`get_image_features(pixel_values)`), one image
token in the prompt stands for it, tokens look back only, and positions count. An image is resized to one size; what the model's
processor writes around image tokens, or makes of tiles, is not known here. Reductions between tower and language model that need
nothing but `hidden` fit; none inside tower, language model or cache. The checkpoint is read whole.
"""

from __future__ import annotations

import json
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from exporter.checkpoint import Checkpoint
from exporter.errors import CheckpointError, UsageError
from exporter.families._contract import PROMPT, Family, Geometry, Request, eos_tokens, image_spec, normalization
from exporter.nn.specs import DecoderShape
from graphs._contract import InTower, Site

if TYPE_CHECKING:
    from torch import Tensor, nn

    from exporter.kv import Inside
    from exporter.nn.traced import LanguageModel, Loaded, Seen


def known(kind: str) -> bool:
    """Whether transformers, where it is installed, has an image-text-to-text model of this type."""
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as names
    except ImportError:
        return False
    return kind in names


class Traced(Family):
    summary = "transformers' own modules, traced whole: one image size, only reductions before the language model"
    published: ClassVar[dict[str, Any]] = {}

    def __init__(self, kind: str) -> None:
        self.model_type = f"{kind} (traced)"
        self.caution = (
            f"there is no family '{kind}': transformers' own modules are traced. Images have one size, prompts have to hold what the "
            "model's processor writes around image tokens, and reductions fit only between tower and language model"
        )

    def canonical(self, key: str) -> str:
        return key

    def reads(self, checkpoint: Checkpoint, request: Request) -> Checkpoint:
        return LoadedCheckpoint.of(checkpoint)

    def geometry(self, checkpoint: Checkpoint, request: Request) -> Geometry:
        seen = _seen(checkpoint)
        height, width = request.image_size or _size(checkpoint.config)
        found = normalization(checkpoint)
        if "image_mean" not in found or "image_std" not in found:
            raise CheckpointError(
                f"{checkpoint.folder} does not say how images are normalised (image_mean and image_std in preprocessor_config.json)."
            )
        tokens, decoder = seen.tokens(request.frames, height, width), seen.decoder
        signals = PROMPT | {"hidden"}
        tower = Site(tokens, request.frames, signals=signals, dim=decoder.hidden, llm_dim=decoder.hidden)
        whole = "{} is transformers' own, traced whole, so nothing can be dropped inside it"
        return Geometry(
            image=image_spec(checkpoint, (), (), height=height, width=width, resize="exact"),
            frames=request.frames,
            placeholders=request.frames,
            grid=None,
            tower=tower,
            in_tower=whole.format("its tower"),
            in_llm=whole.format("its language model"),
            ids=tuple((i,) for i in range(tokens)),
            span=tokens,
            position_axes=1,
            hidden=decoder.hidden,
            layers=decoder.layers,
            kv_heads=decoder.kv_heads,
            head_dim=decoder.head_dim,
            vocab=decoder.vocab,
            image_token=seen.image_token,
            eos=eos_tokens(checkpoint),
        )

    def vision(
        self, checkpoint: Checkpoint, geometry: Geometry, taps: tuple[str, ...], in_tower: tuple[str, InTower] | None
    ) -> nn.Module:
        from exporter.nn.traced import Vision

        assert isinstance(checkpoint, LoadedCheckpoint) and taps == ("hidden",)
        return Vision(checkpoint.loaded.hollow())

    def projector(self, checkpoint: Checkpoint, geometry: Geometry) -> None:
        return None

    def decoder(self, checkpoint: Checkpoint) -> DecoderShape:
        return _seen(checkpoint).decoder

    def language_model(self, checkpoint: Checkpoint, inside: Inside, prunes: bool = False) -> LanguageModel:
        from exporter.nn.traced import TracedDecoder

        assert isinstance(checkpoint, LoadedCheckpoint) and not prunes
        return TracedDecoder(checkpoint.loaded.hollow(), self.decoder(checkpoint), inside.visual)


class LoadedCheckpoint(Checkpoint):
    """One whose tensors are the parameters of the module that transformers makes of it, as `Vision` and `TracedDecoder` call them."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> LoadedCheckpoint:
        found = cls(checkpoint.folder)
        found.config = checkpoint.config
        return found

    @cached_property
    def loaded(self) -> Loaded:
        from exporter.nn.traced import Loaded

        assert self.shards, "refused in words where the weights are not there"
        return Loaded(self.folder)

    def __contains__(self, name: str) -> bool:
        return name == "text.embed_tokens.weight" or _plain(name) in self.loaded.parameters

    def tensor(self, name: str) -> Tensor:
        return self.loaded.embeddings if name == "text.embed_tokens.weight" else self.loaded.parameters[_plain(name)]

    def tensor_bytes(self, name: str) -> int:
        return self.tensor(name).nbytes


def _plain(name: str) -> str:
    """transformers' name of a tensor."""
    whole = name.removeprefix("text.step.hf.")
    return whole if whole != name else "model." + name.removeprefix("vision.features.hf.")


def _seen(checkpoint: Checkpoint) -> Seen:
    from exporter.nn.traced import look

    return look(json.dumps(checkpoint.config))


def _size(config: dict[str, Any]) -> tuple[int, int]:
    """Height and width that config.json gives for the tower."""
    size = (config.get("vision_config") or {}).get("image_size")
    if size is None:
        raise UsageError(
            "config.json gives no image_size for the tower. Pass --image-size, as the model's processor makes it."
        )
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)
