"""The question alone, in other tokens than the language model's: what reductions read it in.

They take it as the user asked it, without chat template and without the images. CLIP's tokenizer makes the input of the graph
`question`, a Q-Former's own tokenizer that of `reduce`. Export puts them into folders beside the model's tokenizer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from tokenizers import Tokenizer

from exporter.checkpoint import INSTRUCTION_FOLDER, Checkpoint
from exporter.clip import text_tokens
from exporter.errors import CheckpointError
from exporter.runtime import _tokenizer
from exporter.runtime.sequence import Ints
from graphs._contract import INSTRUCTION_TOKENS

FOLDER = "clip"
"""Where CLIP's tokenizer lies in the folder of the model's."""


class Reader(ABC):
    """A tokenizer at a fixed length: a text that is too long loses its tail, another one is padded."""

    owner: ClassVar[str]
    """Whose it is, for error messages."""
    padding: ClassVar[str]
    """The padding of a tokenizer whose files name none."""

    def __init__(self, tokenizer: Tokenizer, tokens: int, padding: str | None = None) -> None:
        """`tokens`: length of a question. Raises CheckpointError: this tokenizer has no such padding, or ends no text."""
        padding = padding or self.padding
        pad_id = tokenizer.token_to_id(padding)
        if pad_id is None or not tokenizer.num_special_tokens_to_add(False):
            lack = f"padding token {padding!r}" if pad_id is None else "end-of-text token that it puts behind a text"
            raise CheckpointError(f"{self.owner}'s tokenizer.json has no {lack}. Save it again with transformers.")
        tokenizer.enable_truncation(tokens)
        tokenizer.enable_padding(length=tokens, pad_id=pad_id, pad_token=padding)
        self.tokenizer = tokenizer

    @abstractmethod
    def side(self, texts: Sequence[str]) -> dict[str, Ints]:
        """What `Generator.generate` wants in `side` for these questions, one per row."""

    def encode(self, texts: Sequence[str]) -> Ints:
        """int64 [batch, tokens]: start, the text's tokens, end, padding."""
        return np.array([e.ids for e in self.tokenizer.encode_batch(list(texts))], np.int64)


class QuestionTokenizer(Reader):
    """CLIP's tokenizer at its text tower's fixed length."""

    owner, padding = "CLIP", "<|endoftext|>"

    @classmethod
    def load(cls, folder: Path) -> QuestionTokenizer:
        """Read a CLIP checkpoint's folder, or the copy of its small files in an export.

        Raises:
            CheckpointError: no tokenizer, or files that cannot be read.
        """
        special = _tokenizer.special_tokens(_tokenizer.config(folder))
        return cls(_tokenizer.read(folder), text_tokens(Checkpoint(folder)), special.get("pad_token"))

    def side(self, texts: Sequence[str]) -> dict[str, Ints]:
        return {"question_ids": self.encode(texts)}


class InstructionTokenizer(Reader):
    """A Q-Former's own tokenizer, BERT's."""

    owner, padding = "The Q-Former", "[PAD]"

    @classmethod
    def load(cls, folder: Path) -> InstructionTokenizer:
        """Read the tokenizer's folder in a checkpoint, or its copy in an export. Raises CheckpointError as above."""
        special = _tokenizer.special_tokens(_tokenizer.config(folder))
        return cls(_tokenizer.read(folder), INSTRUCTION_TOKENS, special.get("pad_token"))

    def side(self, texts: Sequence[str]) -> dict[str, Ints]:
        mask = np.array([e.attention_mask for e in self.tokenizer.encode_batch(list(texts))], np.int64)
        return {"instruction_ids": self.encode(texts), "instruction_mask": mask}


def readers(folder: Path, clip: Path | None = None) -> list[Reader]:
    """Those in the folder of the model's tokenizer, of a checkpoint or an export. Raises CheckpointError as above.

    Args:
        clip: the CLIP checkpoint's folder; else the one that an export has in its own.
    """
    found: list[Reader] = []
    clip = folder / FOLDER if clip is None and (folder / FOLDER).is_dir() else clip
    if clip is not None:
        found.append(QuestionTokenizer.load(clip))
    if (folder / INSTRUCTION_FOLDER).is_dir():
        found.append(InstructionTokenizer.load(folder / INSTRUCTION_FOLDER))
    return found
