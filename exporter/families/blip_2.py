"""BLIP-2 with OPT: EVA-CLIP tower, a Q-Former, one linear layer, OPT decoder.

A prompt is the images' queries, the beginning of text and "Question: … Answer:", as the paper asks; earlier turns stand before it in
the same words. Checkpoints with Flan-T5 are refused: their language model is an encoder and a decoder.
"""

from __future__ import annotations

from typing import Any, ClassVar

from exporter.checkpoint import Checkpoint
from exporter.errors import CheckpointError
from exporter.families._contract import (
    OPT_NAMES,
    Geometry,
    Request,
    decoder_spec,
    renamed,
    text_config,
)
from exporter.families.instructblip import QFORMER, TOWER, InstructBlip
from exporter.nn.specs import DecoderSpec

TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is not string %}{% for part in message['content'] if part['type'] == 'image' %}"
    "{{ '<image>' }}{% endfor %}{% endif %}{% endfor %}{{ bos_token | default('</s>') }}"
    "{% for message in messages %}"
    "{{ 'Question: ' if message['role'] == 'user' else ' ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ ' Answer:' if message['role'] == 'user' else '. ' }}"
    "{% endfor %}"
)


class Blip2(InstructBlip):
    model_type = "blip_2"
    summary = "BLIP-2 with OPT: EVA-CLIP tower, Q-Former, OPT decoder"
    published: ClassVar = {
        "_name_or_path": "Salesforce/blip2-opt-2.7b", "model_type": "blip-2", "image_token_index": 50265,
        "num_query_tokens": 32, "vision_config": TOWER, "qformer_config": QFORMER,
        "text_config": {
            "model_type": "opt", "hidden_size": 2560, "ffn_dim": 10240, "num_hidden_layers": 32, "num_attention_heads": 32,
            "vocab_size": 50304, "word_embed_proj_dim": 2560,
        },
    }  # fmt: skip
    template, asks = TEMPLATE, False

    def canonical(self, key: str) -> str:
        return renamed(super().canonical(key), OPT_NAMES)

    def geometry(self, checkpoint: Checkpoint, request: Request) -> Geometry:
        if "image_token_index" not in checkpoint.config:
            raise CheckpointError(
                f"{checkpoint.folder}/config.json has no image_token_index: the checkpoint is older than the image token of its "
                "tokenizer. Download it again."
            )
        return super().geometry(checkpoint, request)

    def decoder(self, checkpoint: Checkpoint) -> DecoderSpec:
        kind = text_config(checkpoint.config).get("model_type", "opt")
        if kind in ("t5", "flan-t5"):
            raise CheckpointError("Decoder 't5' is half of an encoder and a decoder, which is not supported, only OPT.")
        return decoder_spec({"text_config": {"model_type": kind, **text_config(checkpoint.config)}})

    def compressor(self, config: dict[str, Any]) -> str:
        return f"qformer:{self.knobs(config)}"


FAMILY = Blip2()
