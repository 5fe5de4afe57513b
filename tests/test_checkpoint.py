"""Checkpoints that are incomplete, damaged or hostile: refused in words, before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from exporter.checkpoint import Checkpoint, resolve
from exporter.errors import CheckpointError, UsageError
from exporter.nn.layers import Linear
from exporter.weights import load, sources

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards and an index."""
    (tmp_path / "config.json").write_text('{"model_type": "sample"}')
    index = {}
    for i, (name, tensor) in enumerate(WEIGHTS.items()):
        index[name] = f"model-{i}.safetensors"
        save_file({name: tensor}, tmp_path / index[name])
    write_index(tmp_path, index)
    return tmp_path


def write_index(folder: Path, index: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def test_tensors_are_found_by_their_canonical_names(folder: Path) -> None:
    checkpoint = Checkpoint(folder, lambda key: f"own.{key}")
    assert torch.equal(checkpoint.tensor("own.a.weight"), WEIGHTS["a.weight"])
    assert "own.a.bias" in checkpoint
    assert "a.bias" not in checkpoint
    assert checkpoint.bytes == sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def test_a_linear_is_stored_the_other_way_round(folder: Path) -> None:
    with torch.device("meta"):
        module = torch.nn.ModuleDict({"a": Linear(3, 2)})
    load(module, "own", Checkpoint(folder, lambda key: f"own.{key}"))
    assert torch.equal(module.get_parameter("a.weight"), WEIGHTS["a.weight"].t())
    assert torch.equal(module.get_parameter("a.bias"), WEIGHTS["a.bias"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no config.json"),
        ("{", "is not valid JSON"),
        ("{}", "names no model_type"),
        ("[]", "names no model_type"),
    ],
)
def test_config(text: str | None, message: str, folder: Path) -> None:
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        _ = Checkpoint(folder).config


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of 2 weight shards: model-1\.safetensors"):
        Checkpoint(folder).tensor("a.weight")


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors\. Download the checkpoint again"):
        _ = Checkpoint(tmp_path).shards


@pytest.mark.parametrize("missing", [1, 30, 10_000])
def test_a_truncated_shard_is_named(missing: int, folder: Path) -> None:
    path = folder / "model-0.safetensors"
    path.write_bytes(path.read_bytes()[: max(0, path.stat().st_size - missing)])
    with pytest.raises(
        CheckpointError, match=r"model-0\.safetensors is (truncated|damaged).* Download this shard again"
    ):
        Checkpoint(folder).tensor("a.bias")


def test_a_header_that_is_no_json(folder: Path) -> None:
    (folder / "model-0.safetensors").write_bytes((4).to_bytes(8, "little") + b"nope" + bytes(100))
    with pytest.raises(CheckpointError, match="header is not JSON"):
        _ = Checkpoint(folder).shards


@pytest.mark.parametrize("header", ["[]", '{"a": 1}', '{"a": {"data_offsets": "xy"}}', '{"a": {}}'])
def test_a_header_that_describes_nothing(header: str, folder: Path) -> None:
    (folder / "model-0.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(100))
    with pytest.raises(CheckpointError, match=r"model-0\.safetensors .*Download this shard again"):
        Checkpoint(folder).tensor("a.bias")


@pytest.mark.parametrize("name", ["../model-0.safetensors", "/etc/passwd", "sub/model-0.safetensors"])
def test_an_index_may_not_leave_the_folder(name: str, folder: Path) -> None:
    write_index(folder, {"a.weight": name})
    with pytest.raises(CheckpointError, match="names a shard outside the folder"):
        _ = Checkpoint(folder).shards


@pytest.mark.parametrize("index", [[], {"a": 1}, "x"])
def test_an_index_of_another_form(index: Any, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index or ["x"]}))
    with pytest.raises(CheckpointError, match="index"):
        _ = Checkpoint(folder).shards


def test_a_tensor_that_is_not_there(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tensor for `b`.*model_type 'sample'"):
        Checkpoint(folder).tensor("b")


def test_a_tensor_of_another_shape(folder: Path) -> None:
    with torch.device("meta"):
        module = torch.nn.ModuleDict({"a": Linear(4, 2)})
    source = sources(module, "own")["a.weight"]
    with pytest.raises(CheckpointError, match=r"`own\.a\.weight` has shape \[2, 3\], config.json asks for \[2, 4\]"):
        source.read(Checkpoint(folder, lambda key: f"own.{key}"))


@pytest.mark.parametrize("name", ["nowhere", "/nowhere/at/all", "a/b/c", "../x", "owner/na me"])
def test_a_name_that_is_neither_folder_nor_hub_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UsageError, match="neither a folder nor a hub id"):
        resolve(name)


def test_a_folder_is_taken_as_it_is(folder: Path) -> None:
    assert resolve(str(folder)) == folder
