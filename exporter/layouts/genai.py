"""onnxruntime-genai: `og.Model("out/graphs")` loads what this writes. Tested with 0.18.

A multimodal model is three graphs there (src/models/multi_modal.cpp): *vision* makes `image_features` of `pixel_values`, *embedding*
puts them where image tokens stand in `input_ids`, the *decoder* takes `inputs_embeds` in the order of the prompt, `position_ids` that
count and an `attention_mask`. What ours need beyond that travels in columns behind the embeddings, see `_genai_graphs`; so
positions with gaps, M-RoPE, tiles, DeepStack and tokens that see ahead work too.

`model.type` is `videochat_flash_qwen`, the type whose interface is ours: `pixel_values` [1, frames, 3, height, width], a fixed number
of visual tokens, plain positions. The type also decides which image processor `create_multimodal_processor` makes; that one knows
neither the pixels nor the prompts of other families, so `pixel_values` are given with `Generator.set_inputs` (docs/bundle.md).

There is no place for
    what is dropped inside the language model, in its cache or while decoding: all layers share one cache length;
    the question: the vision model is given nothing else than images;
    sizes of merged tokens: the cache holds keys and values only;
    engines that are not ONNX Runtime's.
One prompt at a time: genai pads batches on the right, where these graphs answer, and gives its embedding model one row for all
beams.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.errors import EnvironmentMismatch, UsageError
from exporter.layouts._contract import Layout

if TYPE_CHECKING:
    from exporter.graphset import GraphSet
    from profiles._schema import Limits, Profile

VISION, EMBEDDING, DECODER, CONFIG = (
    "genai_vision.onnx", "genai_embedding.onnx", "genai_decoder.onnx", "genai_config.json",
)  # fmt: skip


class Genai(Layout):
    def files(self, graphs: GraphSet, folder: Path, profile: Profile) -> dict[str, bytes]:
        if refused := "; ".join(_refusals(graphs, profile)):
            raise UsageError(f"onnxruntime-genai cannot run this model: {refused}.")
        if importlib.util.find_spec("onnx_ir") is None:
            raise EnvironmentMismatch(
                "`--layout genai` needs onnx_ir here: pip install 'edgetrim[export]', or pack where it was exported."
            )
        from exporter.layouts import _genai_graphs as models

        decoder = models.decoder(graphs, folder)
        shared = models.grows_in_place(decoder)
        found = {
            VISION: models.as_bytes(models.vision(graphs, folder)),
            EMBEDDING: models.as_bytes(models.embedding(graphs, folder)),
            DECODER: models.as_bytes(decoder),
        }
        config = _config(graphs, profile.limits, shared)
        return found | {CONFIG: (json.dumps(config, indent=1) + "\n").encode()}


def _refusals(graphs: GraphSet, profile: Profile) -> Iterator[str]:
    """Why not, each with what to do."""
    visual = graphs.visual
    if profile.stack.backend != "ort":
        yield (
            f"profile `{profile.name}` is for {profile.stack.backend} engines, genai runs ONNX Runtime; "
            "export for a profile of that, such as cpu_int4"
        )
    inside = [r["name"] for r in graphs.reductions if r["place"] in ("in_llm", "in_cache")]
    if graphs.prefill_apart or len(graphs.text.kept) > 1 or visual.readers or inside:
        yield (
            f"{' and '.join(inside) or 'a reduction'} acts inside the language model or its cache, where genai has one "
            "length for all layers; reduce before it"
        )
    if graphs.side:
        yield (
            f"its reduction also reads {', '.join(graphs.side)}, and genai gives its vision model images only; "
            "choose one that reads neither the question nor the camera's movement"
        )
    if graphs.sized:
        yield "merged tokens count as many times as they have parts, and genai's cache has no place for their sizes"
    if visual.placeholders > 1 and visual.kept < visual.total and (visual.policy == "keep" or graphs.reaches):
        yield (
            f"how many tokens each of its {visual.placeholders} images keeps is known only when they have been seen, and genai "
            "wants it in the prompt; export for one image, or with position=compact"
        )
    if visual.policy == "keep" and visual.kept < visual.total:
        if graphs.text.window:
            yield (
                f"some layers look back {graphs.text.window} tokens, and genai does not count dropped ones; "
                "reduce with position=compact"
            )
        if graphs.text.longest:
            yield (
                "its positions are learned ones, counted from 0, and genai has no gaps between them; reduce with position=compact"
            )


def _config(graphs: GraphSet, limits: Limits, shared: bool) -> dict[str, Any]:
    """genai_config.json; keys as in genai's src/config.h."""
    from exporter.layouts._genai_graphs import columns

    text, visual = graphs.text, graphs.visual
    length = text.longest or visual.kept + limits.text + limits.new_tokens
    return {
        "model": {
            "type": "videochat_flash_qwen",
            "vocab_size": text.vocab,
            "context_length": length,
            "eos_token_id": text.eos,
            "pad_token_id": text.eos[0],
            "image_token_id": text.image_token,
            "tokenizer_dir": "processor",
            "vision": {
                "filename": VISION,
                "num_visual_tokens": visual.kept,
                "inputs": {"pixel_values": "pixel_values"},
                "outputs": {"image_features": "image_features"},
            },
            "embedding": {
                "filename": EMBEDDING,
                "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
                "outputs": {"inputs_embeds": "inputs_embeds"},
            },
            "decoder": {
                "filename": DECODER,
                "session_options": {"provider_options": []},
                "hidden_size": text.width + columns(graphs),
                "num_hidden_layers": text.layers,
                "num_key_value_heads": text.kv_heads,
                "head_size": text.head_dim,
                "inputs": {
                    "inputs_embeds": "inputs_embeds",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_%d",
                    "past_value_names": "past_value_%d",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present_key_%d",
                    "present_value_names": "present_value_%d",
                },
            },
        },
        "search": {
            "do_sample": False,
            "num_beams": 1,
            "max_length": length,
            "past_present_share_buffer": shared,
        },
    }


LAYOUT = Genai()
