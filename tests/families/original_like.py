"""LLaVA as its own code has it (arXiv:2310.03744), and MobileVLM (arXiv:2312.16886, arXiv:2402.03766): Hugging Face's CLIP tower and
Llama, and between them projectors of plain torch modules, whose names are those of the published checkpoints."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

IMAGE = -200


class Channels(nn.LayerNorm):
    """Over the channels of every place: x [n, dim, rows, cols]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Excite(nn.Module):
    def __init__(self, dim: int, squeezed: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(dim, squeezed, 1), nn.Conv2d(squeezed, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3), keepdim=True)
        return x * nn.functional.hardsigmoid(self.fc2(self.fc1(means).relu()))


class Bottleneck(nn.Module):
    """MobileNetV3's, that does not widen."""

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        depthwise = nn.Conv2d(dim, dim, 3, stride, 1, groups=dim, bias=False)
        pointwise = nn.Conv2d(dim, dim, 1, bias=False)
        self.adds = stride == 1
        self.block = nn.Sequential(
            nn.Sequential(depthwise, Channels(dim), nn.Hardswish()),
            Excite(dim, dim // 4),
            nn.Sequential(pointwise, Channels(dim)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.adds else self.block(x)


def as_raster(x: Tensor) -> Tensor:
    side = int(x.shape[1] ** 0.5)
    return x.transpose(1, 2).reshape(len(x), -1, side, side)


class Mlp(nn.Sequential):
    """LLaVA-1.5's. [n, tokens, inputs] → [n, tokens, outputs]"""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs))


class Ldp(nn.Module):
    """The first version's. [n, tokens, inputs] → [n, tokens / 4, outputs]"""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.mlp = nn.Sequential(
            nn.Identity(), nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs)
        )
        self.model.mb_block = nn.Sequential(nn.Identity(), Bottleneck(outputs, 1), Bottleneck(outputs, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.model.mb_block(as_raster(self.model.mlp(x))).flatten(2).transpose(1, 2)


class LdpV2(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.mlp, self.peg = nn.Module(), nn.Module()
        self.mlp.mlp = nn.Sequential(nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs))
        self.peg.peg = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1, groups=outputs))

    def forward(self, x: Tensor) -> Tensor:
        pooled = nn.functional.avg_pool2d(as_raster(self.mlp.mlp(x)), 2)
        return (pooled + self.peg.peg(pooled)).flatten(2).transpose(1, 2)


class Original(nn.Module):
    """Answers what a model of transformers answers, as far as the tests ask. A projector with `reads` gets those hidden states of
    the tower, each [n, tokens, width]; others the last but one."""

    def __init__(self, vision: dict[str, Any], text: dict[str, Any], projector: type[nn.Module]) -> None:
        super().__init__()
        self.tower = CLIPVisionModel(CLIPVisionConfig(**vision))
        self.projector = projector(vision["hidden_size"], text["hidden_size"])
        self.llama = LlamaForCausalLM(LlamaConfig(**text))
        self.generation_config, self.config = self.llama.generation_config, self.llama.config

    @property
    def model(self) -> Original:
        return self

    def published(self) -> dict[str, Tensor]:
        """The tensors as a checkpoint has them."""
        found = {f"model.mm_projector.{name}": x for name, x in self.projector.state_dict().items()}
        for name, x in self.tower.state_dict().items():
            found[f"model.vision_tower.vision_tower.vision_model.{name.removeprefix('vision_model.')}"] = x
        return found | self.llama.state_dict()

    def get_image_features(self, pixel_values: Tensor) -> Any:
        """[frames, 3, height, width] → one [tokens, hidden] per frame."""
        states = self.tower(pixel_values, output_hidden_states=True).hidden_states
        reads = getattr(self.projector, "reads", (-2,))
        return SimpleNamespace(pooler_output=tuple(self.projector(*(states[i][:, 1:] for i in reads))))

    def embedded(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        embeds = self.llama.get_input_embeddings()(input_ids.clamp(min=0))
        embeds[input_ids == IMAGE] = torch.cat(self.get_image_features(pixel_values).pooler_output)
        return embeds

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Any:
        return self.llama(inputs_embeds=self.embedded(input_ids, pixel_values), attention_mask=attention_mask)

    def generate(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, **more: Any) -> Tensor:
        """The prompt and the answer, as other models return them."""
        embeds = self.embedded(input_ids, pixel_values)
        return torch.cat(
            [input_ids, self.llama.generate(inputs_embeds=embeds, attention_mask=attention_mask, **more)], 1
        )
