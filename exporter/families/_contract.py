"""What a family is: where the visual tokens live in one kind of model, and which signals it can give a reduction."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from exporter.checkpoint import Checkpoint
from exporter.errors import CheckpointError, UsageError
from exporter.graphset import ImageSpec
from exporter.nn.specs import DecoderShape, DecoderSpec, FastVitSpec, PixtralSpec, VitSpec
from graphs._contract import InTower, Site

if TYPE_CHECKING:
    from torch import nn

    from exporter.kv import Inside
    from exporter.nn.traced import LanguageModel


PROMPT = frozenset({"text", "text_mask", "warp"})
"""Signals every family has, as they do not come from its tower."""


INSTRUCTION = frozenset({"instruction_ids", "instruction_mask"})
"""Signals of a checkpoint that has a second tokenizer for them, in `exporter.checkpoint.INSTRUCTION_FOLDER`."""

ALIGNED = frozenset({"aligned", "aligned_text"})
"""Signals that need a CLIP checkpoint beside the model's (`Request.clip`); only a CLIP tower has them."""


@dataclass(frozen=True)
class Request:
    """What the user fixes about the input: images or clip frames per sample, the image size (height, width) for families
    without a size of their own or, as a multiple of a tile's, the grid of tiles, and the CLIP checkpoint that the model's
    tower came from, see `exporter.clip`."""

    frames: int = 1
    image_size: tuple[int, int] | None = None
    clip: Checkpoint | None = None


@dataclass(frozen=True)
class Geometry:
    """Everything static about one model and one request. No torch needed to compute it.

    ids: [tokens per placeholder, axes] position ids relative to the placeholder's start; span: what one placeholder
    advances the positions. `in_tower` is a sentence instead of a Site where the tower cannot be shortened; `in_llm` is one where
    nothing can be dropped inside the language model or its cache. grid: of a frame's tokens, None where that is not known.
    frames: what `pixel_values` holds: images or clip frames, or, where an image is cut into tiles, those.
    shared: width of `aligned` and `aligned_text`; 0 where the request names no CLIP checkpoint, or there is no CLIP tower.
    mark, written: where the family's processor rewrites what its chat template says: every `mark`, one per image or clip,
    becomes `written`, with an image token per placeholder. template: the chat template of a family whose checkpoints have
    none. spliced, sees: see `VisualLayout`. media: what a chat message calls it.
    fixed: tokens per placeholder that no reduction before the language model sees, see `exporter.nn.specs.Fixed`; `ids` has them
    behind the others. planes: how many more vectors the tower gives for each token, by the signal `deepstack` [batch, frames, tokens, planes * hidden].
    compressor: spec of the one that is this model's projector. numbered: whose tokens `ids` and an index count, where that is
    not `tower`; a compressor sets it.
    """

    image: ImageSpec
    frames: int
    placeholders: int
    grid: tuple[int, int] | None
    tower: Site
    in_tower: Site | str
    ids: tuple[tuple[int, ...], ...]
    span: int
    position_axes: int
    hidden: int
    layers: int
    kv_heads: int
    head_dim: int
    vocab: int
    image_token: int
    eos: tuple[int, ...]
    in_llm: str = ""
    shared: int = 0
    mark: str = ""
    written: str = ""
    media: Literal["image", "video"] = "image"
    planes: int = 0
    fixed: int = 0
    template: str = ""
    spliced: str = ""
    sees: Literal["before", "image", "prompt"] = "before"
    compressor: str = ""
    numbered: Site | None = None


class Family(ABC):
    """One model family. Importing its module imports no torch."""

    model_type: str
    summary: str
    caution: str = ""
    """What a user has to be told, wherever it is used."""
    published: ClassVar[dict[str, Any]]
    """The config of the model that people deploy most, as far as it matters here; its id is `_name_or_path`."""

    @abstractmethod
    def canonical(self, key: str) -> str:
        """A tensor's name in any of the layouts its checkpoints come in → `vision.…`, `projector.…`, `text.…`, `head.…`."""

    @abstractmethod
    def geometry(self, checkpoint: Checkpoint, request: Request) -> Geometry:
        """Shapes and positions. Raises UsageError for a request, CheckpointError for a config that does not fit."""

    @abstractmethod
    def vision(
        self, checkpoint: Checkpoint, geometry: Geometry, taps: tuple[str, ...], in_tower: tuple[str, InTower] | None
    ) -> nn.Module:
        """pixel_values [batch, frames, 3, h, w] → list of the taps. Parameter names start as in `vision.`"""

    @abstractmethod
    def projector(self, checkpoint: Checkpoint, geometry: Geometry) -> nn.Module | None:
        """Tower width → LLM width, token by token, or None where the tower ends at LLM width."""

    @abstractmethod
    def decoder(self, checkpoint: Checkpoint) -> DecoderShape: ...

    def of(self, config: dict[str, Any]) -> Family:
        """Who reads a checkpoint with this config: another family where two layouts share one `model_type`."""
        return self

    def reads(self, checkpoint: Checkpoint, request: Request) -> Checkpoint:
        """The checkpoint as the modules' parameters are called."""
        return checkpoint.named(self.canonical)

    def language_model(self, checkpoint: Checkpoint, inside: Inside, prunes: bool = False) -> LanguageModel:
        """The decoder of prefill, where that drops tokens (`prunes`), or of everything else."""
        from exporter.nn.decoder import Decoder

        spec = self.decoder(checkpoint)
        assert isinstance(spec, DecoderSpec)
        return Decoder(spec, inside, prunes)


def site_of(spec: VitSpec | PixtralSpec | FastVitSpec, decoder: DecoderSpec, pictures: int) -> Site:
    """Where a tower's tokens are: of so many pictures, the decoder behind it."""
    rows, cols = spec.grid
    return Site(
        rows * cols, pictures, spec.grid, spec.signals | PROMPT, spec.blocks, dim=spec.dim, llm_dim=decoder.hidden
    )


def only_size(request: Request, side: int) -> None:
    """Raises UsageError if the request asks for another image size than the tower's own."""
    if request.image_size not in (None, (side, side)):
        raise UsageError(f"This tower takes {side}×{side} images only (learned positions); leave --image-size out.")


def image_token(config: dict[str, Any], default: int) -> int:
    """Id of the token that stands for an image, under either of its names; `default` as transformers takes it."""
    return int(config.get("image_token_index", config.get("image_token_id", default)))


def counted(
    checkpoint: Checkpoint,
    decoder: DecoderSpec,
    image: ImageSpec,
    tower: Site,
    in_tower: Site | str,
    token: int,
    *,
    placeholders: int = 0,
    shared: int = 0,
    mark: str = "",
    written: str = "",
    fixed: int = 0,
    ids: Sequence[int] | None = None,
    template: str = "",
    sees: Literal["before", "image", "prompt"] = "before",
) -> Geometry:
    """The geometry of a family whose positions just count tokens, and whose `grid` is a frame's.

    Args:
        token: the image token. placeholders: image tokens in a prompt; as a rule one per frame. ids: places of a
            placeholder's tokens, where the prompt has them in another order than the tower.
    """
    placeholders = placeholders or tower.frames
    each = tower.total // placeholders + fixed
    assert tower.grid is not None
    return Geometry(
        image=image,
        frames=tower.frames,
        placeholders=placeholders,
        grid=tower.grid,
        tower=tower,
        in_tower=in_tower,
        ids=tuple((i,) for i in (range(each) if ids is None else ids)),
        span=each,
        position_axes=1,
        hidden=decoder.hidden,
        layers=decoder.layers,
        kv_heads=decoder.kv_heads,
        head_dim=decoder.head_dim,
        vocab=decoder.vocab,
        image_token=token,
        eos=eos_tokens(checkpoint),
        shared=shared,
        mark=mark,
        written=written,
        fixed=fixed,
        template=template,
        sees=sees,
    )


OPT_NAMES = (
    (r"^text\.decoder\.", "text."),
    (r"^text\.final_layer_norm\.", "text.norm."),
    (r"^(text\.layers\.\d+\.)self_attn_layer_norm\.", r"\1input_layernorm."),
    (r"^(text\.layers\.\d+\.)final_layer_norm\.", r"\1post_attention_layernorm."),
    (r"^(text\.layers\.\d+\.self_attn\.)out_proj\.", r"\1o_proj."),
    (r"^(text\.layers\.\d+\.)(fc\d)\.", r"\1mlp.\2."),
)
"""For `renamed`: OPT's names behind `text.` → a Llama-type decoder's."""


def renamed(key: str, renames: Sequence[tuple[str, str]]) -> str:
    """`key` with every pattern at its start replaced, one after another; what none fits stays as it is."""
    for pattern, name in renames:
        key = re.sub(pattern, name, key)
    return key


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's config: nested in new checkpoints, flat in old ones."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def rope(text: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters, wherever this generation of config keeps them."""
    given = text.get("rope_parameters") or text.get("rope_scaling") or {}
    found = dict(given.get("full_attention") or given)
    found.setdefault("rope_theta", text.get("rope_theta", 10000.0))
    found.setdefault("rope_type", found.get("type", "default"))
    if found["rope_type"] == "mrope":
        found["rope_type"] = "default"
    return found


def inverse_frequencies(text: dict[str, Any], head_dim: int) -> tuple[tuple[float, ...], float]:
    """head_dim / 2 rotary frequencies and the factor on cos and sin. Types: default, linear, llama3, and dynamic, which is
    the default up to max_position_embeddings (what is longer, it would turn anew with every token)."""
    found = rope(text)
    kind, theta = found["rope_type"], float(found["rope_theta"])
    base = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    if kind in ("default", "dynamic"):
        return tuple(base), 1.0
    if kind == "linear":
        return tuple(f / float(found["factor"]) for f in base), 1.0
    if kind == "llama3":
        factor, low, high = (float(found[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
        trained = float(found["original_max_position_embeddings"])
        out = []
        for f in base:
            smooth = min(1.0, max(0.0, (trained * f / (2 * math.pi) - low) / (high - low)))
            out.append((1 - smooth) * f / factor + smooth * f)
        return tuple(out), 1.0
    raise CheckpointError(f"Rotary type '{kind}' is not supported. Supported: default, dynamic, linear, llama3.")


def local_frequencies(text: dict[str, Any], head_dim: int) -> tuple[float, ...]:
    """Rotary frequencies of layers with a sliding window, where they have their own; else empty."""
    found = (text.get("rope_parameters") or {}).get("sliding_attention")
    theta = text.get("rope_local_base_freq")
    if found is None and theta is None:
        return ()
    return inverse_frequencies({"rope_parameters": found, "rope_theta": theta}, head_dim)[0]


QWEN2 = {"qkv_bias": True, "output_bias": False}
GEMMA = {"norm_offset": 1.0, "scaled_embeddings": True}
OPT = {
    "qkv_bias": True, "output_bias": True, "layer_norms": True, "eps": 1e-5, "gated": False, "inv_freq": (),
    "first_position": 2,
}  # fmt: skip

DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"output_bias": False},
    "qwen2": QWEN2,
    "qwen2_vl_text": QWEN2,
    "qwen2_vl": QWEN2,
    "qwen2_5_vl_text": QWEN2,
    "qwen2_5_vl": QWEN2,
    "qwen3": {"qk_norm": True},
    "qwen3_vl_text": {"qk_norm": True},
    "gemma": GEMMA,
    "gemma2": {**GEMMA, "post_norms": True},
    "gemma3_text": {**GEMMA, "post_norms": True, "qk_norm": True, "attention_cap": None},
    "opt": OPT,
}
"""Decoder model types we have, and the facts of `DecoderSpec` that are in their code, not in their config."""

SYNONYMS = {"ffn_dim": "intermediate_size", "activation_function": "hidden_act"}
"""What OPT's config calls otherwise."""

ONLY: dict[str, dict[str, Any]] = {
    "gemma3_text": {"use_bidirectional_attention": False},
    "opt": {
        "do_layer_norm_before": True, "enable_bias": True, "layer_norm_elementwise_affine": True,
        "_remove_final_layer_norm": False,
    },
}  # fmt: skip
"""What a config may say in one way only, which is also the one that it means where it says nothing."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "opt": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "vocab_size": 50272, "hidden_act": "relu", "max_position_embeddings": 2048,
    },
    "llama": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "mistral": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32000, "sliding_window": 4096,
    },
    "qwen3": {"head_dim": 128, "max_window_layers": 28},
    "gemma": {"head_dim": 256, "hidden_act": "gelu_pytorch_tanh"},
    "gemma2": {
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000,
        "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "sliding_window_pattern": 2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208,
        "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "sliding_window_pattern": 6, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
    },
}  # fmt: skip
"""What published configs of these types leave out, as their code takes it."""


def decoder_spec(config: dict[str, Any], mrope_section: tuple[int, ...] | None = None) -> DecoderSpec:
    """The decoder's shape from a Hugging Face config. Raises CheckpointError for a decoder we do not have."""

    text = text_config(config)
    kind = text.get("model_type", "llama")
    if kind not in DECODERS:
        raise CheckpointError(f"Decoder '{kind}' is not supported. Supported: {', '.join(sorted(DECODERS))}.")
    text = DEFAULTS.get(kind, {}) | text | {ours: text[theirs] for theirs, ours in SYNONYMS.items() if theirs in text}
    for name, wanted in ONLY.get(kind, {}).items():
        if text.get(name, wanted) not in (wanted, None):
            raise CheckpointError(
                f"Decoder '{kind}' with {name} {text[name]!r} is not supported, only with {wanted!r}."
            )
    layers, heads = int(text["num_hidden_layers"]), int(text["num_attention_heads"])
    hidden = int(text["hidden_size"])
    head_dim = int(text.get("head_dim") or hidden // heads)
    inv_freq, scale = inverse_frequencies(text, head_dim)
    attention_bias = bool(text.get("attention_bias", False))
    activation = str(text.get("hidden_activation") or text.get("hidden_act", "silu"))
    if kind == "gemma" and activation == "gelu":
        activation = "gelu_pytorch_tanh"  # what its first configs meant
    if text.get("word_embed_proj_dim") not in (None, hidden):
        raise CheckpointError(f"Decoder '{kind}' whose embeddings are narrower (word_embed_proj_dim) is not supported.")
    facts: dict[str, Any] = {
        "eps": float(text.get("rms_norm_eps", 1e-6)),
        "inv_freq": inv_freq,
        "qkv_bias": attention_bias,
        "output_bias": attention_bias,
        "attention_cap": text.get("attn_logit_softcapping"),
        **DECODERS[kind],
    }
    first = facts.get("first_position", 0)
    return DecoderSpec(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=int(text.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        intermediate=int(text["intermediate_size"]),
        vocab=int(text["vocab_size"]),
        activation=activation,
        rope_scale=scale,
        mrope_section=mrope_section,
        windows=sliding_windows(text, kind, layers),
        attention_scale=float(text.get("query_pre_attn_scalar") or head_dim) ** -0.5,
        local_inv_freq=local_frequencies(text, head_dim),
        logit_cap=text.get("final_logit_softcapping"),
        positions=int(text["max_position_embeddings"]) + first if first else 0,
        **facts,
    )


def sliding_windows(text: dict[str, Any], kind: str, layers: int) -> tuple[int | None, ...]:
    """Sliding attention window per layer, in tokens."""
    window = text.get("sliding_window")
    if kind == "mistral":
        local = [True] * layers
    elif kind.startswith("qwen") and text.get("use_sliding_window", False):
        first = int(text.get("max_window_layers", layers))
        local = _windowed(text) or [i >= first for i in range(layers)]
    elif "sliding_window_pattern" in text:
        every = int(text["sliding_window_pattern"])
        local = _windowed(text) or [(i + 1) % every > 0 for i in range(layers)]
    else:
        local = [False] * layers
    return tuple(int(window) if here and window is not None else None for here in local)


def _windowed(text: dict[str, Any]) -> list[bool]:
    """Per layer, if config.json says it so."""
    return [kind == "sliding_attention" for kind in text.get("layer_types") or ()]


def eos_tokens(checkpoint: Checkpoint) -> tuple[int, ...]:
    """End-of-sequence ids from generation_config.json, else config.json."""
    config = checkpoint.config
    for found in (
        checkpoint.optional_json("generation_config.json").get("eos_token_id"),
        config.get("eos_token_id"),
        text_config(config).get("eos_token_id"),
    ):
        if found is not None:
            return tuple(found) if isinstance(found, list) else (int(found),)
    return ()


def normalization(checkpoint: Checkpoint) -> dict[str, Any]:
    """Image processor settings, wherever this generation of processor keeps them."""
    processor = checkpoint.optional_json("processor_config.json")
    for found in (checkpoint.optional_json("preprocessor_config.json"), processor.get("image_processor")):
        if found:
            return dict(found)
    return {}


def image_spec(checkpoint: Checkpoint, mean: Sequence[float], std: Sequence[float], **shape: Any) -> ImageSpec:
    """Of a family's images; mean, std and `resample` are those of the checkpoint's processor, where it says them. What is resized
    is what is seen, unless `resize_height` and `resize_width` say otherwise."""
    found = normalization(checkpoint)
    shape = {"resize_height": shape["height"], "resize_width": shape["width"]} | shape
    resample = int(found.get("resample", shape.pop("resample", 3)))
    red, green, blue = zip(found.get("image_mean", mean), found.get("image_std", std), strict=True)
    channels = list(zip(red, green, blue, strict=True))
    return ImageSpec(resample=resample, mean=channels[0], std=channels[1], **shape)


def tile_grid(size: tuple[int, int] | None, tile: int) -> tuple[int, int]:
    """Rows and columns of tiles that an image of this size is cut into; one tile by default.

    Raises:
        UsageError: the size is no multiple of a tile's.
    """
    if size is None:
        return 1, 1
    check_multiple(size, tile)
    return size[0] // tile, size[1] // tile


def check_multiple(size: tuple[int, int], unit: int) -> None:
    if any(s % unit or s < unit for s in size):
        near = tuple(max(unit, round(s / unit) * unit) for s in size)
        raise UsageError(
            f"Image size {size[0]}×{size[1]} does not fit: height and width must be multiples of {unit}. "
            f"The nearest that fits is {near[0]}×{near[1]}."
        )
