"""From a module's parameters to the checkpoint's tensors: which tensor, which layout, what shape it must have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from exporter.checkpoint import Checkpoint
from exporter.errors import CheckpointError
from exporter.nn.layers import Linear


@dataclass(frozen=True)
class Source:
    """Where a parameter comes from. `transposed`: stored [out, in] in the checkpoint, wanted [in, out]."""

    name: str
    shape: tuple[int, ...]
    transposed: bool

    def read(self, checkpoint: Checkpoint) -> Tensor:
        """The tensor in the wanted layout: a view of the memory-mapped file, in the file's dtype.

        Raises:
            CheckpointError: no such tensor, or another shape than the config promises.
        """
        name = self.name
        if name == "head.weight" and name not in checkpoint:
            name = "text.embed_tokens.weight"  # tied
        tensor = checkpoint.tensor(name)
        if self.transposed:
            tensor = tensor.t()
        if tuple(tensor.shape) != self.shape:
            found, wanted = (tuple(reversed(s)) if self.transposed else tuple(s) for s in (tensor.shape, self.shape))
            raise CheckpointError(
                f"{checkpoint.folder}: tensor `{name}` has shape {list(found)}, config.json asks for {list(wanted)}. "
                "Config and weights do not belong together."
            )
        return tensor


def sources(module: nn.Module, prefix: str) -> dict[str, Source]:
    """Parameter name → source, for a module whose names start with `prefix` in the checkpoint ("vision", "text", …)."""
    found = {}
    for owner_name, owner in module.named_modules():
        for leaf, parameter in owner.named_parameters(recurse=False):
            name = f"{owner_name}.{leaf}" if owner_name else leaf
            where = "head.weight" if name == "lm_head.weight" else f"{prefix}.{name}"
            transposed = isinstance(owner, Linear) and leaf == "weight"
            found[name] = Source(where, tuple(parameter.shape), transposed)
    return found


def load(module: nn.Module, prefix: str, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Fill a module on the meta device with the checkpoint's weights, converted to `dtype`. For the reference, not for export."""
    for name, source in sources(module, prefix).items():
        owner, _, leaf = name.rpartition(".")
        value = source.read(checkpoint).to(dtype).contiguous()
        setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    return module.eval()
