"""Quantised checkpoints, written bit by bit as their publishers' tools write them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

Ints = npt.NDArray[Any]
GROUP = 32


class Rounded(NamedTuple):
    """weight[o, i] = scale[o, g] * (q[o, i] - zero[o, g]); q and zero in 0..2^bits - 1; group: int [in], which g."""

    q: Ints
    zero: Ints
    scale: npt.NDArray[np.float16]
    group: Ints

    def dequantized(self) -> torch.Tensor:
        scale, zero = self.scale.astype(np.float32)[:, self.group], self.zero[:, self.group]
        return torch.from_numpy((scale * (self.q.astype(np.float32) - zero)).astype(np.float32))


def rounded(shape: tuple[int, int], symmetric: bool, seed: int, bits: int = 4, scattered: bool = False) -> Rounded:
    """Random integers; `shape` is [out, in]. Scattered groups depend on the width alone, as q, k and v see the same input."""
    rng, groups, half = np.random.default_rng(seed), shape[1] // GROUP, 2 ** (bits - 1)
    q = rng.integers(0, 2**bits, shape)
    zero = np.full((shape[0], groups), half) if symmetric else rng.integers(1, 2**bits, (shape[0], groups))
    scale = (rng.uniform(0.5, 1.5, (shape[0], groups)) * 2 * shape[1] ** -0.5 / half).astype(np.float16)
    group = np.arange(shape[1]) // GROUP
    return Rounded(q, zero, scale, np.random.default_rng(shape[1]).permutation(group) if scattered else group)


def words(values: Ints, order: Iterable[int] = range(8), bits: int = 4) -> torch.Tensor:
    """[n, m] → int32 [n, m * bits / 32]; place p of a word holds column order[p] of those that share it."""
    places = list(order)
    found = np.zeros((len(values), values.shape[1] // len(places)), np.uint32)
    for word in range(found.shape[1]):
        for place, column in enumerate(places):
            found[:, word] |= values[:, word * len(places) + column].astype(np.uint32) << np.uint32(bits * place)
    return torch.from_numpy(found.view(np.int32))


def awq(r: Rounded) -> dict[str, torch.Tensor]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    scales = torch.from_numpy(r.scale.T.copy())
    return {"qweight": words(r.q.T, order), "qzeros": words(r.zero.T, order), "scales": scales}


def gptq(r: Rounded, before: int = 1, bits: int = 4) -> dict[str, torch.Tensor]:
    eight = range(32 // bits)
    return {
        "qweight": words(r.q, eight, bits).T.contiguous(),
        "qzeros": words(r.zero.T - before, eight, bits),
        "scales": torch.from_numpy(r.scale.T.copy()),
        "g_idx": torch.from_numpy(r.group.astype(np.int32)),
    }


def compressed(r: Rounded, symmetric: bool, bits: int = 4) -> dict[str, torch.Tensor]:
    places = range(32 // bits)
    found = {
        "weight_packed": words(r.q, places, bits),
        "weight_scale": torch.from_numpy(r.scale.copy()),
        "weight_shape": torch.tensor(r.q.shape),
    }
    if not symmetric:
        found["weight_zero_point"] = words(r.zero.T, places, bits).T.contiguous()
    if (np.diff(r.group) < 0).any():
        found["weight_g_idx"] = torch.from_numpy(r.group.astype(np.int32))
    return found


class Nested(NamedTuple):
    """weight[o, i] = codes[o, i] * scale[o, i // 16] * whole, codes of E2M1 and scales of E4M3 as their bytes."""

    codes: Ints
    scale: Ints
    whole: np.float32

    def dequantized(self) -> torch.Tensor:
        numbers = self.codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
        scale = self.scale.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * self.whole
        return torch.from_numpy(numbers * np.repeat(scale, 16, 1))

    def packed(self) -> torch.Tensor:
        return torch.from_numpy(self.codes[:, 0::2] | self.codes[:, 1::2] << 4)

    def scales(self) -> torch.Tensor:
        return torch.from_numpy(self.scale).view(torch.float8_e4m3fn)


def nested(shape: tuple[int, int], seed: int) -> Nested:
    """Random codes and scales, one of them zero; `shape` is [out, in]."""
    rng = np.random.default_rng(seed)
    scale = rng.uniform(20, 448, (shape[0], shape[1] // 16)).astype(ml_dtypes.float8_e4m3fn)
    scale[1, 1] = 0
    whole = np.float32(1e-3 * shape[1] ** -0.5)
    return Nested(rng.integers(0, 16, shape, dtype=np.uint8), scale.view(np.uint8), whole)


def modelopt(n: Nested) -> dict[str, torch.Tensor]:
    beside = {"weight_scale_2": torch.tensor(n.whole), "input_scale": torch.tensor(0.01)}
    return {"weight": n.packed(), "weight_scale": n.scales()} | beside


def nvfp4_packed(n: Nested) -> dict[str, torch.Tensor]:
    """As compressed-tensors has it; `whole` is a power of two, else its inverse would round."""
    return {
        "weight_packed": n.packed(),
        "weight_scale": n.scales(),
        "weight_global_scale": torch.tensor([1 / n.whole]),
        "input_global_scale": torch.tensor([100.0]),
    }


def publish(
    source: Path, folder: Path, config: dict[str, Any], pack: Callable[[tuple[int, int], int], tuple[dict[str, torch.Tensor], torch.Tensor]]
) -> Path:  # fmt: skip
    """Two checkpoints: `folder`/quantized, where `pack` gives what stands for each matrix of the decoder's layers, and
    `folder`/plain, with the weights that this stands for."""
    tensors = load_file(source / "model.safetensors")
    plain, quantized = dict(tensors), dict(tensors)
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        if "language_model" in name and ".layers." in name and tensor.ndim == 2:
            parts, weight = pack((tensor.shape[0], tensor.shape[1]), number)
            plain[name] = weight
            del quantized[name]
            quantized |= {f"{name.removesuffix('.weight')}.{suffix}": part for suffix, part in parts.items()}
    for kind, found in (("plain", plain), ("quantized", quantized)):
        target = folder / kind
        target.mkdir(parents=True)
        for file in source.iterdir():
            if file.suffix != ".safetensors":
                (target / file.name).write_bytes(file.read_bytes())
        save_file({n: t.contiguous() for n, t in found.items()}, target / "model.safetensors", {"format": "pt"})
    described = json.loads((folder / "quantized/config.json").read_text()) | {"quantization_config": config}
    (folder / "quantized/config.json").write_text(json.dumps(described))
    return folder
