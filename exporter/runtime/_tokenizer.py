"""A tokenizer's folder as transformers reads it: `tokenizer.json`, and beside it who the special tokens are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from exporter._typed import read_json
from exporter.errors import CheckpointError

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read(folder: Path) -> Tokenizer:
    """The tokenizer, without padding or truncation. Raises CheckpointError: none there, or it cannot be read."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"There is no {path}. Save it with transformers: `AutoTokenizer.from_pretrained(…).save_pretrained(…)`."
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # the bindings raise Exception itself
        raise CheckpointError(f"{path} cannot be read: {e}") from e
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with what only special_tokens_map.json has."""
    return {**json_object(folder / "special_tokens_map.json"), **json_object(folder / "tokenizer_config.json")}


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and its kind, each a string or {"content": …}."""
    found = {name: content(config.get(name)) for name in NAMED_TOKENS}
    return {name: token for name, token in found.items() if token is not None}


def content(token: Any) -> str | None:
    """A token's text, however the file writes it."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def json_object(path: Path) -> dict[str, Any]:
    """A JSON file, or {} if there is none. Raises CheckpointError: it cannot be read, or is no object."""
    if not path.is_file():
        return {}
    try:
        value = read_json(path)
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path} cannot be read: {e}") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected an object.")
    return value
