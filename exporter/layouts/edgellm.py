"""NVIDIA TensorRT Edge-LLM: refused, and why. Read: its documentation and sources of 0.4 to 0.11.

Language model
    Its engines are built of ONNX graphs of its own exporter, with `AttentionPlugin` in every layer, which rotates, reads and writes the
    cache: inputs `rope_rotary_cos_sin` and a paged cache `past_key_values_i` with `kv_page_table` (cpp/common/bindingNames.h). Ours have
    plain attention with an explicit order, and keys and values as inputs and outputs that grow.
Vision
    Its runners count the visual tokens of an image themselves, from its size: patches ÷ merge² for Qwen
    (cpp/multimodal/qwen2/qwenViTRunner.cpp), 256 per tile for InternVL (internViTRunner.cpp), and make that many places and positions. An
    engine that returns fewer leaves the rest of them unwritten. So a tower with a reduction in it does not fit either.

What there is in its place: Edge-LLM drops visual tokens by itself, between its own engines (`--visualPrune`, a variant of DART).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from exporter.errors import UsageError
from exporter.layouts._contract import Layout

if TYPE_CHECKING:
    from exporter.graphset import GraphSet
    from profiles._schema import Profile


class EdgeLlm(Layout):
    def files(self, graphs: GraphSet, folder: Path, profile: Profile) -> dict[str, bytes]:
        kept = (
            f"it would make room for {graphs.visual.total} and get {graphs.visual.kept}"
            if graphs.visual.kept < graphs.visual.total
            else "so that a reduction would have no effect but a wrong prompt"
        )
        raise UsageError(
            "TensorRT Edge-LLM cannot run this model: its language-model engines need its own attention plugin and paged cache in every "
            "layer, where these graphs have plain attention; and it counts the visual tokens of an image by the image's size, "
            f"whatever its vision engine returns ({kept}). Run these graphs with `edgetrim build` and `edgetrim chat`; or "
            "export the unreduced checkpoint with Edge-LLM's own tools and drop tokens there, with its option --visualPrune (Qwen-VL)."
        )


LAYOUT = EdgeLlm()
