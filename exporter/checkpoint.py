"""A Hugging Face checkpoint folder: config, tokenizer files and safetensors shards, read tensor by tensor."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from exporter._typed import parsed, read_json, typed
from exporter.errors import CheckpointError, EnvironmentMismatch, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from exporter.packings._contract import Matrix, Packing

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", "generation_config.json", "config.json",
)  # fmt: skip
"""Small files that a runtime needs; copied into the output."""

SENTENCEPIECE = "tokenizer.model"
"""What older checkpoints have in the place of `tokenizer.json`."""

QUANTIZATION_FILE = "hf_quant_config.json"
"""Where checkpoints of NVIDIA's ModelOpt say how they are quantised; newer ones say it in config.json too."""

INSTRUCTION_FOLDER = "qformer_tokenizer"
"""Where a checkpoint has the tokenizer that its Q-Former reads the question with, and where a copy of its small files has it."""


def resolve(name: str, revision: str | None = None, weights: bool = True) -> Path:
    """The folder of a checkpoint: a local path as it is, else a hub id, downloaded (safetensors and JSON only, or without
    `weights` JSON only).

    Raises:
        UsageError: neither a folder nor a hub id. EnvironmentMismatch: the hub could not be reached.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        raise UsageError(
            f"Checkpoint '{name}' is neither a folder nor a hub id (owner/name). Pass a folder with config.json and *.safetensors."
        )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as e:
        raise EnvironmentMismatch(
            f"'{name}' is no folder here, and downloading a hub id needs huggingface_hub. Install edgetrim[export]."
        ) from e
    try:
        patterns = [
            "*.safetensors.index.json",
            *TOKENIZER_FILES,
            SENTENCEPIECE,
            QUANTIZATION_FILE,
            f"{INSTRUCTION_FOLDER}/*.json",
        ]
        patterns += ["*.safetensors"] if weights else []
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        reason = str(e).strip().splitlines()[0]
        raise EnvironmentMismatch(
            f"Checkpoint '{name}' is no folder here and could not be downloaded ({reason}). Check the name and the network."
        ) from e


class Place(NamedTuple):
    """Where a tensor with a canonical name is: its file and name there, which of so many equal parts of the first axis it is,
    where in the file it begins, and its bytes."""

    file: Path
    key: str
    part: int
    parts: int
    offset: int
    bytes: int


class Stored(NamedTuple):
    """Where a tensor is: its file, its name there, and its shape there."""

    file: Path
    key: str
    shape: tuple[int, ...]


class Checkpoint:
    """A checkpoint folder. Tensors are memory-mapped; nothing is read before it is asked for."""

    def __init__(self, folder: Path, canonical: Callable[[str], str] = lambda key: key) -> None:
        """`canonical` maps a tensor's name in the file to the name the family uses. One with braces, "….{q,k,v}_proj.weight",
        stands for several tensors of equal size, stacked along the first axis."""
        self.folder = folder
        self._canonical = canonical

    @classmethod
    def of_config(cls, config: dict[str, Any]) -> Checkpoint:
        """A checkpoint that is nothing but its config: enough to plan, not to export."""
        found = cls(Path(str(config["_name_or_path"])))
        found.config = config
        return found

    @cached_property
    def config(self) -> dict[str, Any]:
        path = self.folder / "config.json"
        try:
            config = read_json(path)
        except FileNotFoundError as e:
            raise CheckpointError(
                f"{self.folder} has no config.json: it is not a Hugging Face checkpoint folder."
            ) from e
        except ValueError as e:
            raise CheckpointError(f"{path} is not valid JSON ({e}). Download the checkpoint again.") from e
        if not isinstance(config, dict) or "model_type" not in config:
            raise CheckpointError(f"{path} names no model_type, so the family is unknown.")
        return config

    def optional_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder, or {} if there is none."""
        path = self.folder / name
        if not path.is_file():
            return {}
        try:
            found = read_json(path)
        except ValueError as e:
            raise CheckpointError(f"{path} is not valid JSON ({e}). Download the checkpoint again.") from e
        return found if isinstance(found, dict) else {}

    def named(self, canonical: Callable[[str], str]) -> Checkpoint:
        found = Checkpoint(self.folder, canonical)
        if "config" in self.__dict__:
            found.config = self.config
        return found

    def with_config(self, config: dict[str, Any]) -> Checkpoint:
        """The same files, read with another config."""
        found = Checkpoint(self.folder, self._canonical)
        found.config = config
        return found

    @cached_property
    def shards(self) -> list[Path]:
        """The safetensors files, each checked against its own header.

        Raises:
            CheckpointError: a shard the index names is missing, or a file is shorter than its header says.
        """
        index = self.optional_json("model.safetensors.index.json").get("weight_map", {})
        if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
            raise CheckpointError(
                f"{self.folder}/model.safetensors.index.json is no index: `weight_map` has to map tensors to files. "
                "Download the checkpoint again."
            )
        names = sorted(set(index.values())) or ["model.safetensors"]
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(
                    f"{self.folder}: the index names a shard outside the folder: {name!r}. Do not use this checkpoint."
                )
        if not index and not (self.folder / names[0]).is_file():
            raise CheckpointError(
                f"{self.folder} has no model.safetensors. Download the checkpoint again; weights in pytorch_model.bin are not read, as "
                "such files can run code: save them as safetensors first (torch.load(…, weights_only=True), safetensors.torch.save_file)."
            )
        missing = [n for n in names if not (self.folder / n).is_file()]
        if missing:
            raise CheckpointError(
                f"{self.folder} lacks {len(missing)} of {len(names)} weight shards: {', '.join(missing[:4])}"
                f"{' …' if len(missing) > 4 else ''}. Download the checkpoint again."
            )
        paths = [self.folder / n for n in names]
        for path in paths:
            _check_shard(path)
        return paths

    @cached_property
    def _where(self) -> dict[str, Place]:
        where: dict[str, Place] = {}
        for path in self.shards:
            data, header = _check_shard(path)
            for key, entry in header.items():
                if key != "__metadata__":
                    begin, end = entry["data_offsets"]
                    names = _spelled_out(self._canonical(key))
                    size = (end - begin) // len(names)
                    for i, name in enumerate(names):
                        where[name] = Place(path, key, i, len(names), data + begin + i * size, size)
        return where

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def _found(self, name: str) -> Place:
        if name not in self._where:
            raise CheckpointError(
                f"{self.folder} has no tensor for `{name}`. The weights do not match config.json "
                f"(model_type {self.config['model_type']!r})."
            )
        return self._where[name]

    def tensor(self, name: str) -> Tensor:
        """The tensor with this canonical name, memory-mapped, in the dtype of the file.

        Every tensor has a mapping of its own, which goes with it: pages that were read count as memory in use as long as they
        are mapped.
        """
        from safetensors import SafetensorError, safe_open

        place = self._found(name)
        try:
            with safe_open(place.file, framework="pt") as file:
                if place.parts == 1:
                    whole: Tensor = file.get_tensor(place.key)
                    return whole
                stacked = file.get_slice(place.key)
                rows = stacked.get_shape()[0] // place.parts
                found: Tensor = stacked[place.part * rows : (place.part + 1) * rows]
                return found
        except (SafetensorError, OSError) as e:
            raise CheckpointError(
                f"{place.file} cannot be read as safetensors ({e}). Download this shard again."
            ) from e

    def expect(self, name: str) -> None:
        """Have the system read the tensor with this canonical name ahead, where it can; returns at once."""
        place = self._where.get(name)
        if place is None or not hasattr(os, "posix_fadvise"):
            return
        with place.file.open("rb") as file:
            os.posix_fadvise(file.fileno(), place.offset, place.bytes, os.POSIX_FADV_WILLNEED)

    @cached_property
    def _packing(self) -> tuple[Packing, dict[str, Any]] | None:
        """The layout of quantised matrices that the checkpoint names, if it names one, and what it says about it."""
        import exporter.packings
        from exporter import _discover

        found = self._quantization()
        if not found:
            return None
        method = str(found.get("quant_method", "")) if isinstance(found, dict) else ""
        known = _discover.names(exporter.packings)
        name = method.replace("-", "_")
        if name not in known:
            raise CheckpointError(
                f"{self.folder} says that its weights are quantised by '{method}', which is not read. "
                f"Read are {', '.join(known)}; or take the checkpoint that is not quantised."
            )
        packing: Packing = _discover.load(exporter.packings, "packing", name).PACKING
        try:
            packing.check(found)
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise CheckpointError(
                f"{self.folder}: what it says of how '{method}' quantised it cannot be read ({type(e).__name__}: {e}). Download it again."
            ) from e
        return packing, found

    def _quantization(self) -> Any:
        """What config.json says of quantised weights, or what ModelOpt wrote beside it before it wrote it there."""
        text = self.config.get("text_config")
        nested = text.get("quantization_config") if isinstance(text, dict) else None
        found = self.config.get("quantization_config") or self.config.get("compression_config") or nested
        if found:
            return found
        beside = self.optional_json(QUANTIZATION_FILE)
        producer, told = beside.get("producer"), beside.get("quantization")
        if not isinstance(told, dict) or not told.get("quant_algo"):
            return None
        return {"quant_method": producer.get("name") if isinstance(producer, dict) else "modelopt", **told}

    @property
    def quantized(self) -> bool:
        """Whether the checkpoint says that matrices are quantised. Raises CheckpointError where they cannot be read."""
        return self._packing is not None

    def matrix(self, name: str) -> Matrix | None:
        """The quantised matrix that stands for the canonical name "….weight"; None where that is a tensor like others."""
        from exporter.packings._contract import Matrix, Parts

        stem, _, leaf = name.rpartition(".")
        if leaf != "weight" or self._packing is None:
            return None
        packing, config = self._packing
        if not any(f"{stem}.{suffix}" in self._where for suffix in packing.marker):
            return None
        found = {n[len(stem) + 1 :]: self._where[n].bytes for n in self._below[stem] if not n.endswith(".bias")}
        return Matrix(
            packing, config, Parts(f"{self.folder}: {stem}", found, lambda suffix: self.tensor(f"{stem}.{suffix}"))
        )

    @cached_property
    def _below(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self._where:
            found.setdefault(name.rpartition(".")[0], []).append(name)
        return found

    def tensor_bytes(self, name: str) -> int:
        """What the tensor with this canonical name takes in its file."""
        return self._found(name).bytes

    def stored(self) -> dict[str, Stored]:
        """Canonical name → where the tensor is."""
        return {self._canonical(key): found for path in self.shards for key, found in _stored(path).items()}

    @property
    def bytes(self) -> int:
        return sum(p.stat().st_size for p in self.shards)

    def fingerprint(self) -> list[str]:
        """What tells whether this is the checkpoint that it was: names, sizes and times of the weights, and their headers."""
        found = []
        for path in self.shards:
            state = path.stat()
            with path.open("rb") as file:
                header = file.read(int.from_bytes(file.read(8), "little"))
            digest = hashlib.sha256(header).hexdigest()
            found.append(f"{path.name} {state.st_size} {state.st_mtime_ns} {digest}")
        return found


def _spelled_out(name: str) -> list[str]:
    """
    >>> _spelled_out("vision.{q,k}_proj.weight")
    ['vision.q_proj.weight', 'vision.k_proj.weight']
    """
    before, brace, rest = name.partition("{")
    inside, _, behind = rest.partition("}")
    return [before + word + behind for word in inside.split(",")] if brace else [name]


def stored_tensors(path: Path) -> dict[str, Stored]:
    """Name → what a safetensors file, or the shards of a checkpoint folder, hold under it.

    Raises:
        CheckpointError: it cannot be read, or is shorter than its header says.
    """
    if path.is_dir():
        return Checkpoint(path).stored()
    try:
        return _stored(path)
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror}.") from e


def _stored(path: Path) -> dict[str, Stored]:
    _, header = _check_shard(path)
    try:
        shapes = {k: tuple(int(n) for n in entry["shape"]) for k, entry in header.items() if k != "__metadata__"}
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as e:
        raise CheckpointError(f"{path} is damaged: its header gives no shapes.") from e
    return {key: Stored(path, key, shape) for key, shape in shapes.items()}


def _check_shard(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file begin, and its header; the file is as long as that says."""
    size = path.stat().st_size
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise CheckpointError(
                f"{path} is damaged: {size} bytes, its header cannot be read. Download this shard again."
            )
        try:
            header: dict[str, Any] = parsed(f.read(length))
        except ValueError as e:
            raise CheckpointError(f"{path} is damaged: its header is not JSON. Download this shard again.") from e
    try:
        places = [typed(tuple[int, int], e["data_offsets"]) for key, e in header.items() if key != "__metadata__"]
        if not all(0 <= begin <= end for begin, end in places):
            raise ValueError("a tensor ends before it begins")
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as e:
        raise CheckpointError(f"{path} is damaged: its header lists no tensors. Download this shard again.") from e
    data = 8 + length
    expected = data + max((end for _, end in places), default=0)
    if size < expected:
        raise CheckpointError(
            f"{path} is truncated: {size} bytes, its header asks for {expected}. Download this shard again."
        )
    return data, header
