"""From a module's parameters to the checkpoint's tensors: which tensor, which layout, what shape it must have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from exporter.checkpoint import Checkpoint
from exporter.errors import CheckpointError
from exporter.nn.layers import Linear, PackedLinear, RMSNorm
from exporter.plan import Plan
from exporter.trained import trained_tensors

if TYPE_CHECKING:
    from exporter.nn.specs import DecoderShape
    from exporter.quantize._contract import Quantized


@dataclass(frozen=True)
class Source:
    """Where a parameter comes from. `transposed`: stored [out, in] in the checkpoint, wanted [in, out]. `offset`: stored
    without it, wanted with it."""

    name: str
    shape: tuple[int, ...]
    transposed: bool
    offset: float = field(default=0.0, kw_only=True)

    def read(self, checkpoint: Checkpoint) -> Tensor:
        """The tensor as wanted: a view of the memory-mapped file, in the file's dtype, or float32 where something is added.

        Raises:
            CheckpointError: no such tensor, or another shape than the config promises.
        """
        name = self._stored(checkpoint)
        matrix = checkpoint.matrix(name)
        tensor = checkpoint.tensor(name) if matrix is None else matrix.read().t()
        while tensor.ndim > len(self.shape) and tensor.shape[0] == 1:
            tensor = tensor[0]
        if self.transposed:
            tensor = tensor.t()
        if tuple(tensor.shape) != self.shape:
            found, wanted = (tuple(reversed(s)) if self.transposed else tuple(s) for s in (tensor.shape, self.shape))
            raise CheckpointError(
                f"{checkpoint.folder}: tensor `{name}` has shape {list(found)}, config.json asks for {list(wanted)}. "
                "Config and weights do not belong together."
            )
        return tensor.float() + self.offset if self.offset else tensor

    def expect(self, checkpoint: Checkpoint) -> None:
        """It will be read next."""
        checkpoint.expect(self._stored(checkpoint))

    def bytes(self, checkpoint: Checkpoint) -> int:
        """What there is to read. Raises CheckpointError where there is no such tensor."""
        name = self._stored(checkpoint)
        matrix = checkpoint.matrix(name)
        return checkpoint.tensor_bytes(name) if matrix is None else matrix.bytes

    def numbers(self, checkpoint: Checkpoint) -> str | None:
        """What its numbers are called (`Form.numbers`) where the checkpoint has it quantised already and `quantized` gives it."""
        matrix = checkpoint.matrix(self.name) if self.transposed else None
        return None if matrix is None else matrix.numbers

    def quantized(self, checkpoint: Checkpoint) -> Quantized:
        """The tensor [in, out] as the checkpoint has it quantised, without loss. Raises CheckpointError as `read`."""
        matrix = checkpoint.matrix(self.name)
        assert matrix is not None
        found = matrix.quantized()
        if found.shape != self.shape:
            raise CheckpointError(
                f"{checkpoint.folder}: the quantised `{self.name}` is {list(found.shape)} [in, out], config.json asks for "
                f"{list(self.shape)}. Config and weights do not belong together."
            )
        return found

    def _stored(self, checkpoint: Checkpoint) -> str:
        """The name that it has in the checkpoint."""
        tied = self.name == "head.weight" and self.name not in checkpoint and checkpoint.matrix(self.name) is None
        return "text.embed_tokens.weight" if tied else self.name


@dataclass(frozen=True)
class PackedSource(Source):
    """Tensors of the checkpoint side by side, along the last axis."""

    parts: tuple[Source, ...]

    def read(self, checkpoint: Checkpoint) -> Tensor:
        """Where the parts lie row by row, so does the whole: the matrix is their rows, turned."""
        if self.transposed:
            return torch.cat([part.read(checkpoint).t() for part in self.parts]).t()
        return torch.cat([part.read(checkpoint) for part in self.parts], -1)

    def expect(self, checkpoint: Checkpoint) -> None:
        for part in self.parts:
            part.expect(checkpoint)

    def bytes(self, checkpoint: Checkpoint) -> int:
        return sum(part.bytes(checkpoint) for part in self.parts)

    def numbers(self, checkpoint: Checkpoint) -> str | None:
        first, *others = {part.numbers(checkpoint) for part in self.parts}
        return None if others else first

    def quantized(self, checkpoint: Checkpoint) -> Quantized:
        from exporter.quantize._contract import side_by_side

        whole = side_by_side([part.quantized(checkpoint) for part in self.parts])
        if whole is None:
            names = ", ".join(part.name for part in self.parts)
            raise CheckpointError(
                f"{checkpoint.folder}: {names} read the same input, but differ in blocks, in the scale of the whole matrix or in the "
                "order of their channels (g_idx). "
                "Take a checkpoint in which they do not, or the one that is not quantised."
            )
        return whole


@dataclass(frozen=True)
class FileSource(Source):
    """A parameter that comes from a safetensors file of its own, not from the checkpoint."""

    file: Path

    def read(self, checkpoint: Checkpoint) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.file, framework="pt") as f:
            tensor: Tensor = f.get_tensor(self.name)
        return tensor

    def expect(self, checkpoint: Checkpoint) -> None:
        """They are small."""

    def bytes(self, checkpoint: Checkpoint) -> int:
        """What it takes in float32, as such files usually are."""
        return 4 * math.prod(self.shape)

    def numbers(self, checkpoint: Checkpoint) -> str | None:
        return None


@dataclass(frozen=True)
class CheckpointSource(Source):
    """A parameter that comes from another checkpoint than the model's."""

    checkpoint: Checkpoint

    def read(self, checkpoint: Checkpoint) -> Tensor:
        return super().read(self.checkpoint)

    def expect(self, checkpoint: Checkpoint) -> None:
        super().expect(self.checkpoint)

    def bytes(self, checkpoint: Checkpoint) -> int:
        return super().bytes(self.checkpoint)

    def numbers(self, checkpoint: Checkpoint) -> str | None:
        return super().numbers(self.checkpoint)

    def quantized(self, checkpoint: Checkpoint) -> Quantized:
        return super().quantized(self.checkpoint)


def elsewhere(module: nn.Module, prefix: str, checkpoint: Checkpoint) -> dict[str, Source]:
    """Parameter name → source, as `sources`, for a module whose parameters are another checkpoint's."""
    found = sources(module, prefix)
    return {n: CheckpointSource(s.name, s.shape, s.transposed, checkpoint, offset=s.offset) for n, s in found.items()}


def trained(plan: Plan, place: str, module: str) -> dict[str, Source]:
    """Parameter → source, for reductions with weights of their own at `place`; `module` names theirs, {} for the method."""
    return {
        f"{module.format(step.name)}.{name}": FileSource(found.key, found.shape, False, found.file)
        for step in plan.at(place)
        if step.method.trained(step.site)
        for name, found in trained_tensors(plan, step).items()
    }


ROOTS = {"lm_head": "head", "projector": "projector"}
"""Children that a checkpoint has beside the module that they are in here."""


def sources(module: nn.Module, prefix: str) -> dict[str, Source]:
    """Parameter name → source, for a module whose names start with `prefix` in the checkpoint ("vision", "text", …), but for
    those of `ROOTS`."""
    found = {}
    for owner_name, owner in module.named_modules():
        for leaf, parameter in owner.named_parameters(recurse=False):
            name = f"{owner_name}.{leaf}" if owner_name else leaf
            root, _, rest = name.partition(".")
            where = f"{ROOTS[root]}.{rest}" if root in ROOTS else f"{prefix}.{name}"
            transposed = isinstance(owner, Linear) and leaf == "weight"
            offset = owner.offset if isinstance(owner, RMSNorm) else 0.0
            found[name] = Source(where, tuple(parameter.shape), transposed, offset=offset)
            if isinstance(owner, PackedLinear):
                found[name] = packed(found[name], owner.parts)
    return found


def packed(whole: Source, parts: Mapping[str, int]) -> PackedSource:
    """`…self_attn.qkv_proj.weight` from `…self_attn.q_proj.weight` and those beside it."""
    path, _, leaf = whole.name.rpartition(".")
    beside = path.rpartition(".")[0]
    lead = whole.shape[:-1]
    own = tuple(Source(f"{beside}.{n}.{leaf}", (*lead, width), whole.transposed) for n, width in parts.items())
    return PackedSource(whole.name, whole.shape, whole.transposed, own)


def text_embeddings(rows: Tensor, spec: DecoderShape) -> Tensor:
    """Rows of a checkpoint's embedding table as the language model takes them; the LM head may share the table as it is."""
    return rows if spec.embed_scale == 1.0 else rows.float() * spec.embed_scale


def load(module: nn.Module, prefix: str, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Fill a module on the meta device with the checkpoint's weights, converted to `dtype`. For the reference, not for export."""
    return fill(module, sources(module, prefix), checkpoint, dtype)


def fill(module: nn.Module, found: Mapping[str, Source], checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    """Give a module the parameters that `found` names, converted to `dtype`."""
    for name, source in found.items():
        owner, _, leaf = name.rpartition(".")
        value = source.read(checkpoint).to(dtype).contiguous()
        setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    return module.eval()
