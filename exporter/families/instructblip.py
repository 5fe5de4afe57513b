"""InstructBLIP with a Llama-type decoder (Vicuna): EVA-CLIP tower, a Q-Former that reads the question, one linear layer.

A prompt is the images' queries, the beginning of text and the question. The Q-Former is the compressor `qformer_text`, its
question in tokens of its own. Checkpoints with Flan-T5 are refused: their decoder is another kind.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from exporter.checkpoint import Checkpoint
from exporter.families._contract import (
    INSTRUCTION,
    Family,
    Geometry,
    Request,
    counted,
    decoder_spec,
    image_spec,
    image_token,
    only_size,
    renamed,
    site_of,
)
from exporter.nn.specs import DecoderSpec, VitSpec
from graphs._contract import InTower

if TYPE_CHECKING:
    from torch import nn


RENAMES = (
    (r"^model\.", ""),
    (r"^vision_model\.", "vision."),
    (r"^vision\.embeddings\.position_embedding$", "vision.embeddings.position_embedding.weight"),
    (r"^(vision\.encoder\.layers\.\d+\.self_attn)\.qkv\.", r"\1.{q,k,v}_proj."),
    (r"^(vision\.encoder\.layers\.\d+\.self_attn)\.projection\.", r"\1.out_proj."),
    (r"^(query_tokens|qformer|language_projection)\b", r"projector.\1"),
    (r"^language_model\.lm_head\.", "head."),
    (r"^lm_head\.", "head."),
    (r"^language_model\.(?:model\.)?", "text."),
)
TOWER = {
    "hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16, "image_size": 224,
    "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True,
}  # fmt: skip
QFORMER = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "cross_attention_frequency": 2, "vocab_size": 30522, "max_position_embeddings": 512,
}  # fmt: skip
"""What configs leave out, as transformers takes it."""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TEMPLATE = (
    "{% if messages | length > 1 %}{{ raise_exception('InstructBLIP answers one question; it has no conversations') }}{% endif %}"
    "{% set content = messages[0]['content'] %}"
    "{% if content is string %}{{ bos_token + content }}{% else %}"
    "{% for part in content if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{{ bos_token }}{% for part in content if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
)


class InstructBlip(Family):
    template, asks = TEMPLATE, True
    """How a prompt is written, and whether the Q-Former reads the question."""
    model_type = "instructblip"
    summary = "InstructBLIP: EVA-CLIP tower, a Q-Former that reads the question, Llama-type decoder (Vicuna)"
    published: ClassVar = {
        "_name_or_path": "Salesforce/instructblip-vicuna-7b", "model_type": "instructblip", "image_token_index": 32000,
        "num_query_tokens": 32, "vision_config": TOWER, "qformer_config": QFORMER | {"vocab_size": 30523},
        "text_config": {"model_type": "llama", "rms_norm_eps": 1e-6, "vocab_size": 32001},
    }  # fmt: skip

    def canonical(self, key: str) -> str:
        return renamed(key, RENAMES)

    def geometry(self, checkpoint: Checkpoint, request: Request) -> Geometry:
        spec, decoder = self.tower(checkpoint.config), self.decoder(checkpoint)
        side = spec.image
        only_size(request, side)
        tower = site_of(spec, decoder, request.frames)
        tower = replace(tower, signals=tower.signals | (INSTRUCTION if self.asks else set()), patch_dim=spec.hidden)
        image = image_spec(checkpoint, MEAN, STD, height=side, width=side, resize="exact")
        found = counted(
            checkpoint, decoder, image, tower, replace(tower, signals=spec.in_tower_signals),
            image_token(checkpoint.config, 32000),
            template=self.template,
        )  # fmt: skip
        return replace(found, compressor=self.compressor(checkpoint.config))

    def vision(
        self, checkpoint: Checkpoint, geometry: Geometry, taps: tuple[str, ...], in_tower: tuple[str, InTower] | None
    ) -> nn.Module:
        from exporter.nn.vit import Vit

        return Vit(self.tower(checkpoint.config), taps, geometry.frames, in_tower)

    def projector(self, checkpoint: Checkpoint, geometry: Geometry) -> None:
        return None

    def decoder(self, checkpoint: Checkpoint) -> DecoderSpec:
        return decoder_spec(checkpoint.config)

    def tower(self, config: dict[str, Any]) -> VitSpec:
        """Class token and all, its last norm included."""
        vision = TOWER | (config.get("vision_config") or {})
        layers = int(vision["num_hidden_layers"])
        return VitSpec(
            hidden=int(vision["hidden_size"]),
            intermediate=int(vision["intermediate_size"]),
            blocks=layers,
            layers=layers,
            heads=int(vision["num_attention_heads"]),
            patch=int(vision["patch_size"]),
            image=int(vision["image_size"]),
            eps=float(vision["layer_norm_eps"]),
            activation=str(vision["hidden_act"]),
            qkv_bias=bool(vision["qkv_bias"]),
            cls=True,
            pre_norm=False,
            patch_bias=True,
            post_norm=True,
        )

    def compressor(self, config: dict[str, Any]) -> str:
        found = QFORMER | (config.get("qformer_config") or {})
        text = f"vocab={found['vocab_size']},positions={found['max_position_embeddings']}"
        return f"qformer_text:{self.knobs(config)},{text}"

    def knobs(self, config: dict[str, Any]) -> str:
        """Of a Q-Former, whatever it reads."""
        found = QFORMER | (config.get("qformer_config") or {})
        return (
            f"queries={config.get('num_query_tokens', 32)},layers={found['num_hidden_layers']},width={found['hidden_size']},"
            f"heads={found['num_attention_heads']},inner={found['intermediate_size']},every={found['cross_attention_frequency']}"
        )


FAMILY = InstructBlip()
