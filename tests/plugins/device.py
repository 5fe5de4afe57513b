"""The kernels on a GPU, through torch's memory and stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from exporter.backends._contract import Array
from plugins._library import Library, Memory


def memory(x: torch.Tensor) -> Memory:
    assert x.is_contiguous()
    return Memory(x.data_ptr(), tuple(x.shape), str(x.dtype).removeprefix("torch."))


def call(library: Library, name: str, inputs: Sequence[Array], attributes: Mapping[str, int]) -> list[Array]:
    tensors = [torch.from_numpy(x.copy()).cuda() for x in inputs]
    given = [memory(x) for x in tensors]
    outputs = [
        torch.full(shape, -1, dtype=getattr(torch, dtype), device="cuda")
        for shape, dtype in library.outputs(name, given, attributes)
    ]
    scratch = torch.full([library.workspace(name, given, attributes) + 16], 0xAB, dtype=torch.uint8, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    library.run(name, given, [memory(x) for x in outputs], attributes, scratch.data_ptr(), stream)
    torch.cuda.synchronize()
    return [x.cpu().numpy() for x in outputs]
