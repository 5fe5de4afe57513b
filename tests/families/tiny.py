"""Tiny random checkpoints, saved to disk by Hugging Face's own classes and read back through the real loading code.

Every family has a builder of its own name here: `name(folder)` saves a checkpoint of some thousand weights and returns the
Hugging Face model it was. Beside them: what the tests ask these models, for us and for Hugging Face.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import tokenizers
import torch
from safetensors.torch import save_file
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    Blip2Config,
    Blip2ForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GotOcr2Config,
    GotOcr2ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    TimmWrapperConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

from exporter.checkpoint import INSTRUCTION_FOLDER, Checkpoint
from exporter.families._contract import Request
from exporter.graphset import GraphSet
from exporter.plan import Plan, Step, make_plan
from exporter.trained import check_weights
from profiles import _schema
from tests.families import original_like, timm_like

TOWERS = ("clip_vision_model", "siglip_vision_model")
IMAGE, VIDEO, START, END, EOS = 5, 6, 7, 8, 2
VOCAB, PATCH = 96, 14
QUESTION_TOKENS = 12
"""Length of a question for `clip`, start and end included."""
WINDOW = 12
"""A sliding window shorter than every prompt below."""
PINPOINTS = [[56, 112], [112, 56], [112, 112], [112, 168], [168, 168]]
"""Image sizes of which `llava_next` and `llava_onevision` make tiles of 56 pixels."""
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": dict(sliding_window=WINDOW),
    "qwen2": {},
    "qwen3": dict(head_dim=24),
    "gemma": dict(head_dim=24),
    "gemma2": dict(
        head_dim=24, sliding_window=WINDOW, query_pre_attn_scalar=40, attn_logit_softcapping=2.0,
        final_logit_softcapping=4.0,
    ),
    "opt": dict(ffn_dim=96, num_key_value_heads=4),
    "gemma3_text": dict(
        head_dim=24, sliding_window=WINDOW, sliding_window_pattern=2, query_pre_attn_scalar=40,
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1000.0),
            sliding_attention=dict(rope_type="default", rope_theta=100.0),
        ),
    ),
}  # fmt: skip
"""Decoder type → what makes it another than Llama, at this size."""


def randomize(model: Any, seed: int = 0) -> Any:
    """Weights large enough that every part matters, norms and biases too, and that answers do not repeat themselves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = 2 if re.search(r"(language_model|llama)\..*layers\.", name) else 1
            scale = 0.3 if parameter.ndim < 2 else gain * parameter.shape[-1] ** -0.5
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise + (1.0 if parameter.ndim == 1 and parameter.mean() > 0.5 else 0.0))
    return model.eval()


def text_config(kind: str, tied: bool = False) -> dict[str, Any]:
    """The config of a decoder of four layers."""
    return dict(
        model_type=kind, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCAB, max_position_embeddings=512, rms_norm_eps=1e-6, eos_token_id=EOS,
        tie_word_embeddings=tied,
    ) | DECODERS[kind]  # fmt: skip


def llava(
    folder: Path, tower: str = "clip_vision_model", decoder: str = "llama", tied: bool = False, **text: Any
) -> PreTrainedModel:
    """16 visual tokens per image; the features are those behind the second of three blocks."""
    vision = dict(
        model_type=tower, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        image_size=56, patch_size=PATCH,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text_config(decoder, tied) | text, image_token_index=IMAGE,
        image_seq_length=16, tie_word_embeddings=tied, vision_feature_layer=-2,
        vision_feature_select_strategy="default" if tower.startswith("clip") else "full",
    )  # fmt: skip
    return saved(LlavaForConditionalGeneration(config), folder)


def qwen2_5_vl(folder: Path, tied: bool = False) -> PreTrainedModel:
    """One visual token per 28 × 28 pixels, windows of 2 × 2 tokens, full attention in blocks 1 and 3."""
    vision = dict(
        depth=4, hidden_size=48, intermediate_size=96, num_heads=4, patch_size=PATCH, spatial_merge_size=2,
        temporal_patch_size=2, window_size=56, fullatt_block_indexes=[1, 3], out_hidden_size=64, tokens_per_second=2,
    )  # fmt: skip
    return _qwen(Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, vision, [2, 3, 3], tied, folder)


def qwen2_vl(folder: Path, tied: bool = False) -> PreTrainedModel:
    """One visual token per 28 × 28 pixels."""
    vision = dict(
        depth=3, embed_dim=48, hidden_size=64, mlp_ratio=2, num_heads=4, patch_size=PATCH, spatial_merge_size=2,
        temporal_patch_size=2,
    )  # fmt: skip
    return _qwen(Qwen2VLConfig, Qwen2VLForConditionalGeneration, vision, [2, 3, 3], tied, folder)


def qwen3_vl(folder: Path, tied: bool = False) -> PreTrainedModel:
    """One visual token per 28 × 28 pixels, 5 × 5 learned positions, two planes for the first layers."""
    vision = dict(
        depth=4, hidden_size=48, intermediate_size=96, num_heads=4, patch_size=PATCH, spatial_merge_size=2,
        temporal_patch_size=2, out_hidden_size=64, num_position_embeddings=25, deepstack_visual_indexes=[0, 2],
    )  # fmt: skip
    return _qwen(Qwen3VLConfig, Qwen3VLForConditionalGeneration, vision, [4, 2, 2], tied, folder, head_dim=16)


def _qwen(
    config: Any, model: Any, vision: dict[str, Any], section: list[int], tied: bool, folder: Path, **more: Any
) -> PreTrainedModel:
    text = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCAB, max_position_embeddings=512, rms_norm_eps=1e-6, bos_token_id=1, eos_token_id=EOS,
        tie_word_embeddings=tied, rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=section),
        **more,
    )  # fmt: skip
    made = config(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=START, vision_end_token_id=END, tie_word_embeddings=tied,
    )  # fmt: skip
    return saved(model(made), folder)


CLIP = dict(
    model_type="clip_vision_model", hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    image_size=56, patch_size=PATCH,
)  # fmt: skip


def llava_next_video(folder: Path, tied: bool = False) -> PreTrainedModel:
    """As `llava_next`; 4 visual tokens per frame of a clip."""
    config = LlavaNextVideoConfig(
        vision_config=CLIP, text_config=text_config("llama", tied), image_token_index=IMAGE, video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS, tie_word_embeddings=tied,
    )  # fmt: skip
    return saved(LlavaNextVideoForConditionalGeneration(config), folder)


def llava_next(folder: Path, tied: bool = False) -> PreTrainedModel:
    """16 visual tokens per picture, tiles of 56 pixels."""
    config = LlavaNextConfig(
        vision_config=CLIP, text_config=text_config("mistral", tied) | dict(sliding_window=None),
        image_token_index=IMAGE, image_grid_pinpoints=PINPOINTS, tie_word_embeddings=tied,
    )  # fmt: skip
    return saved(LlavaNextForConditionalGeneration(config), folder)


def video_llava(folder: Path, tied: bool = False) -> PreTrainedModel:
    """16 visual tokens per image, 17 per frame of a clip."""
    config = VideoLlavaConfig(
        vision_config=CLIP, text_config=text_config("llama", tied), image_token_index=IMAGE, video_token_index=VIDEO,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return saved(VideoLlavaForConditionalGeneration(config), folder)


def llava_onevision(folder: Path, tied: bool = False, side: int = 56) -> PreTrainedModel:
    """As `llava_next`; 4 visual tokens per frame of a clip, and one behind all; 9 where `side` is 70."""
    vision = dict(
        model_type="siglip_vision_model", hidden_size=48, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, image_size=side, patch_size=PATCH,
    )  # fmt: skip
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=text_config("qwen2", tied), image_token_index=IMAGE, video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS, tie_word_embeddings=tied,
    )  # fmt: skip
    return saved(LlavaOnevisionForConditionalGeneration(config), folder)


SIGLIP = dict(
    model_type="siglip_vision_model", hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    image_size=56, patch_size=PATCH, vision_use_head=False,
)  # fmt: skip


def gemma3(folder: Path, tied: bool = False, **text: Any) -> PreTrainedModel:
    """4 visual tokens per image, each the mean of 2 × 2 patches; windows as long as 12 tokens."""
    config = Gemma3Config(
        vision_config=SIGLIP, text_config=text_config("gemma3_text", tied) | text, mm_tokens_per_image=4,
        image_token_index=IMAGE, tie_word_embeddings=tied,
    )  # fmt: skip
    return saved(Gemma3ForConditionalGeneration(config), folder)


def paligemma(folder: Path, decoder: str = "gemma", tied: bool = False, **text: Any) -> PreTrainedModel:
    """16 visual tokens per image."""
    config = PaliGemmaConfig(
        vision_config=SIGLIP | dict(projection_dim=64), text_config=text_config(decoder, tied) | text,
        image_token_index=IMAGE, projection_dim=64, hidden_size=64, tie_word_embeddings=tied,
    )  # fmt: skip
    return saved(PaliGemmaForConditionalGeneration(config), folder)


def instructblip(folder: Path, tied: bool = False) -> PreTrainedModel:
    """16 patches and a class token, 6 queries."""
    config = InstructBlipConfig(
        vision_config=dict(
            hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=PATCH,
        ),
        qformer_config=dict(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, vocab_size=32,
            max_position_embeddings=160, encoder_hidden_size=48,
        ),
        text_config=text_config("llama", tied), num_query_tokens=6, image_token_index=IMAGE, tie_word_embeddings=tied,
    )  # fmt: skip
    bert_tokenizer(folder)
    return saved(InstructBlipForConditionalGeneration(config), folder)


def blip_2(folder: Path, tied: bool = True) -> PreTrainedModel:
    """16 patches and a class token, 6 queries."""
    config = Blip2Config(
        vision_config=dict(
            hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=PATCH,
        ),
        qformer_config=dict(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, encoder_hidden_size=48,
        ),
        text_config=text_config("opt", tied), num_query_tokens=6, image_token_index=IMAGE, tie_word_embeddings=tied,
    )  # fmt: skip
    return saved(Blip2ForConditionalGeneration(config), folder)


def fast_vlm(folder: Path, tied: bool = False) -> PreTrainedModel:
    """One visual token per 64 × 64 pixels."""
    size = dict(layers=[1, 1, 2, 1, 2], embed_dims=[8, 8, 16, 32, 64])
    vision = TimmWrapperConfig(
        architecture="fastvit_mci3", hidden_size=128, model_args=dict(inference_mode=True, **size)
    )
    config = FastVlmConfig(
        vision_config=vision, text_config=text_config("qwen2", tied), image_token_index=IMAGE, tie_word_embeddings=tied
    )
    with mock.patch("transformers.models.fast_vlm.modeling_fast_vlm.AutoModel.from_config", timm_like.from_config):
        model = randomize(FastVlmForConditionalGeneration(config))
    timm_like.tame(model)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"crop_size": 192, "size": {"shortest_edge": 192}}))
    return model


def mobilevlm(
    folder: Path, tied: bool = False, version: int = 2, tower: bool = True, **text: Any
) -> original_like.Original:
    """4 visual tokens per image, each of 2 × 2 patches. tower: whether its weights and its config are in the checkpoint."""
    name, projector = {1: ("ldpnet", original_like.Ldp), 2: ("ldpnetv2", original_like.LdpV2)}[version]
    return _original(folder, {"model_type": "mobilevlm", "mm_projector_type": name}, projector, tied, tower, **text)


def llava_llama(
    folder: Path, tied: bool = False, tower: bool = True, projector: Any = original_like.Mlp, **text: Any
) -> original_like.Original:
    """16 visual tokens per image, or what `projector(tower width, language model's)` makes of them."""
    said = {"model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu"}
    return _original(folder, said, projector, tied, tower, **text)


def _original(
    folder: Path, said: dict[str, Any], projector: Any, tied: bool, tower: bool, **text: Any
) -> original_like.Original:
    text = text_config("llama", tied) | text
    model = randomize(original_like.Original(CLIP, text, projector))
    folder.mkdir(exist_ok=True)
    config = text | said | {
        "image_aspect_ratio": "pad", "mm_vision_tower": "somebody/small-clip", "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | ({"vision_config": CLIP} if tower else {})))
    tensors = {n: x.contiguous() for n, x in model.published().items() if tower or "vision_tower" not in n}
    save_file({n: x for n, x in tensors.items() if not tied or n != "lm_head.weight"}, folder / "model.safetensors")
    return model


def mistral3(folder: Path, tied: bool = False) -> PreTrainedModel:
    """One visual token per 28 × 28 pixels."""
    vision = dict(
        model_type="pixtral", hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        image_size=224, patch_size=PATCH,
    )  # fmt: skip
    config = Mistral3Config(
        vision_config=vision, text_config=text_config("mistral", tied) | dict(sliding_window=None, head_dim=24),
        image_token_index=IMAGE, spatial_merge_size=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return saved(Mistral3ForConditionalGeneration(config), folder)


def smolvlm(folder: Path, tied: bool = False) -> PreTrainedModel:
    """4 visual tokens per tile, of 2 × 2 patches each."""
    return _idefics(SmolVLMConfig, SmolVLMForConditionalGeneration, "smolvlm_vision", tied, folder)


def idefics3(folder: Path, tied: bool = False) -> PreTrainedModel:
    """As `smolvlm`."""
    return _idefics(Idefics3Config, Idefics3ForConditionalGeneration, "idefics3_vision", tied, folder)


def _idefics(config: Any, model: Any, tower: str, tied: bool, folder: Path) -> PreTrainedModel:
    vision = dict(
        model_type=tower, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=56,
        patch_size=PATCH,
    )  # fmt: skip
    text = text_config("llama", tied)
    made = config(
        vision_config=vision, text_config=text, image_token_id=IMAGE, scale_factor=2, tie_word_embeddings=tied,
        pad_token_id=0,
    )  # fmt: skip
    return saved(model(made), folder)


def internvl(folder: Path, decoder: str = "qwen2", tied: bool = False, **vision: Any) -> PreTrainedModel:
    """4 visual tokens per tile, of 2 × 2 patches each."""
    tower = dict(
        hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=[56, 56],
        patch_size=[PATCH, PATCH], attention_bias=True,
    ) | vision  # fmt: skip
    config = InternVLConfig(
        vision_config=tower, text_config=text_config(decoder, tied), image_token_id=IMAGE, image_seq_length=4,
        downsample_ratio=0.5, tie_word_embeddings=tied,
    )  # fmt: skip
    return saved(InternVLForConditionalGeneration(config), folder)


def internvl_chat(folder: Path, decoder: str = "qwen2", **vision: Any) -> PreTrainedModel:
    """As `internvl`, under the names that OpenGVLab publishes."""
    model = internvl(folder, decoder, **vision)
    config = json.loads((folder / "config.json").read_text())
    tower = config["vision_config"]
    published = {
        "model_type": "internvl_chat", "llm_config": config["text_config"], "ps_version": "v2", "select_layer": -1,
        "downsample_ratio": config["downsample_ratio"], "force_image_size": 56,
        "vision_config": {
            "model_type": "intern_vit_6b", "image_size": 56, "patch_size": PATCH, "qkv_bias": tower["attention_bias"],
            "qk_normalization": tower["use_qk_norm"],
            **{k: tower[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "norm_type")},
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(published))
    added = {str(IMAGE): {"content": "<IMG_CONTEXT>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    tensors = {}
    for name, tensor in model.state_dict().items():
        for old, new in INTERNVL:
            name = name.replace(old, new)
        tensors[name] = tensor
    for block in range(tower["num_hidden_layers"]):
        stem = f"vision_model.encoder.layers.{block}.attn"
        for kind in ("weight", "bias") if tower["attention_bias"] else ("weight",):
            tensors[f"{stem}.qkv.{kind}"] = torch.cat([tensors.pop(f"{stem}.{n}_proj.{kind}") for n in "qkv"])
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return model


INTERNVL = (
    ("model.language_model.", "language_model.model."), ("model.vision_tower.", "vision_model."),
    ("model.multi_modal_projector.layer_norm", "mlp1.0"), ("model.multi_modal_projector.linear_1", "mlp1.1"),
    ("model.multi_modal_projector.linear_2", "mlp1.3"), (".cls_token", ".class_embedding"),
    (".position_embeddings", ".position_embedding"), (".patch_embeddings.projection", ".patch_embedding"),
    (".encoder.layer.", ".encoder.layers."), (".attention.projection_layer", ".attn.proj"), (".attention.", ".attn."),
    (".layernorm_before", ".norm1"), (".layernorm_after", ".norm2"), (".lambda_", ".ls"), ("lm_head.", "language_model.lm_head."),
)  # fmt: skip
"""transformers' names of InternVL, and OpenGVLab's."""


def aya_vision(folder: Path, tied: bool = False) -> PreTrainedModel:
    """Not a family: 4 visual tokens per image, and a decoder with a layer that has a window and no positions in the other."""
    text = dict(
        model_type="cohere2", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCAB, max_position_embeddings=512, eos_token_id=EOS, tie_word_embeddings=tied,
        sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    config = AyaVisionConfig(
        vision_config=SIGLIP | dict(num_hidden_layers=2), text_config=text, image_token_index=IMAGE, downsample_factor=2,
        alignment_intermediate_size=64, tie_word_embeddings=tied,
    )  # fmt: skip
    return _with_normalization(saved(AyaVisionForConditionalGeneration(config), folder), folder)


def got_ocr2(folder: Path, tied: bool = True) -> PreTrainedModel:
    """Not a family: a tower of convolutions and windows, 16 visual tokens per image."""
    vision = dict(
        hidden_size=48, output_channels=32, num_hidden_layers=2, num_attention_heads=4, image_size=256, patch_size=16,
        mlp_dim=64, window_size=3, global_attn_indexes=[1],
    )  # fmt: skip
    config = GotOcr2Config(
        vision_config=vision, text_config=text_config("qwen2", tied), image_token_index=IMAGE, tie_word_embeddings=tied
    )
    return _with_normalization(saved(GotOcr2ForConditionalGeneration(config), folder), folder)


def _with_normalization(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    said = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7]}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return model


def clip(folder: Path, hidden: int = 48, layers: int = 3, early: bool = False, **text: Any) -> CLIPModel:
    """Not a family: the CLIP that `llava`'s tower could have come from, with a tokenizer of single letters.

    early: the end of text is called token 2, as in configs of before 2023.
    """
    letters = "abcdefghijklmnopqrstuvwxyz0123456789?"
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(words)}
    start, end = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
    config = CLIPConfig(
        vision_config=dict(
            hidden_size=hidden, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4, image_size=56,
            patch_size=PATCH,
        ),
        text_config=dict(
            hidden_size=40, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(vocab),
            max_position_embeddings=QUESTION_TOKENS, bos_token_id=start, eos_token_id=2 if early else end,
            pad_token_id=end, **text,
        ),
        projection_dim=24,
    )  # fmt: skip
    CLIPTokenizer(vocab, [], model_max_length=QUESTION_TOKENS).save_pretrained(folder)
    return saved(CLIPModel(config), folder)


def bert_tokenizer(folder: Path) -> Path:
    """A Q-Former's tokenizer, in the folder that a checkpoint has it in: 32 tokens."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxy?", "how", "##ow"]
    model = tokenizers.models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    (folder / INSTRUCTION_FOLDER).mkdir(parents=True)
    tokenizer.save(str(folder / INSTRUCTION_FOLDER / "tokenizer.json"))
    return folder / INSTRUCTION_FOLDER


def saved(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    randomize(model).save_pretrained(folder)
    return model


def plan(
    folder: Path, reductions: tuple[str, ...] = (), request: Request | None = None, profile: str = "cpu_fp32"
) -> Plan:
    found = unchecked(folder, reductions, request, profile)
    check_weights(found)
    return found


def unchecked(
    folder: Path, reductions: tuple[str, ...] = (), request: Request | None = None, profile: str = "cpu_fp32"
) -> Plan:
    """A plan whose reductions' weights may not be there."""
    return make_plan(Checkpoint(folder), reductions, _schema.load(profile), request)


def weights(step: Step, file: Path, seed: int = 0) -> Path:
    """Random trained tensors of a reduction, saved as it reads them; what goes through a matrix stays about as large."""
    draw = torch.Generator().manual_seed(seed)
    shapes = step.method.trained(step.site)
    made = {n: torch.randn(s, generator=draw) * math.prod(s[1:]) ** -0.5 for n, s in shapes.items()}
    save_file(made, file)
    return file


def endless(graphs: GraphSet) -> GraphSet:
    """Without end-of-sequence tokens: every answer is as long as asked for."""
    return replace(graphs, text=replace(graphs.text, eos=[]))


def language_model(graphs: GraphSet) -> GraphSet:
    """Without the graphs before it."""
    return replace(graphs, files={role: file for role, file in graphs.files.items() if role in ("prefill", "decode")})


Pixels = npt.NDArray[np.float32]
"""[1, frames, 3, height, width]"""


@dataclass(frozen=True)
class Question:
    """Text and pixels. `prompt` holds one image token per placeholder, as our runtime takes it."""

    prompt: list[int]
    pixels: Pixels
    side: dict[str, npt.NDArray[np.int64]]
    """What a reduction reads beside them, if it does: `question_ids`."""


def question(graphs: GraphSet, seed: int = 0, text: tuple[int, ...] = (11, 12, 13)) -> Question:
    """Random pixels, and text before and behind the image."""
    image, visual, token = graphs.image, graphs.visual, graphs.text.image_token
    pixels = np.random.default_rng(seed).standard_normal((1, visual.frames, 3, image.height, image.width))
    placeholders = [token] * visual.placeholders
    if graphs.family == "mistral3":  # row by row
        placeholders = [t for p in placeholders for t in (p, START)][:-1]
    if graphs.text.position_axes == 3 or graphs.family == "gemma3":
        placeholders = [t for p in placeholders for t in (START, p, END)]
    side, length = {}, graphs.question_tokens
    if length:
        ids = np.random.default_rng(seed).integers(0, 74, (1, length))
        side["question_ids"] = np.where(np.arange(length) < 5 + seed, ids, 75)  # 75 ends a question of `clip`
    if "instruction_ids" in graphs.side:
        words = np.arange(*graphs.side["instruction_ids"])[None]
        side["instruction_ids"] = np.where(words < 5 + seed, (words * 7 + seed) % 28 + 4, 0)
        side["instruction_mask"] = (words < 5 + seed).astype(np.int64)
    return Question([9, 10, *placeholders, *text], pixels.astype(np.float32), side)


def sides(asked: Sequence[Question]) -> dict[str, Any]:
    """Several questions' as one batch."""
    return {name: np.concatenate([q.side[name] for q in asked]) for name in asked[0].side}
