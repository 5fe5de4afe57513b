"""The question alone, in CLIP's tokens: what the graph `question` reads.

A reduction that compares patches with the question in CLIP's space takes it as the user asked it, without chat template and
without the images. Export puts CLIP's tokenizer into the folder `clip` beside the model's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from exporter.checkpoint import Checkpoint
from exporter.clip import text_tokens
from exporter.errors import CheckpointError
from exporter.runtime import _tokenizer
from exporter.runtime.sequence import Ints

FOLDER = "clip"
"""Where CLIP's tokenizer lies in the folder of the model's."""

PADDING = "<|endoftext|>"
"""The padding of a CLIP tokenizer whose files name none."""


class QuestionTokenizer:
    """CLIP's tokenizer at its text tower's fixed length."""

    def __init__(self, tokenizer: Tokenizer, tokens: int, padding: str = PADDING) -> None:
        """`tokens`: length of a question. Raises CheckpointError: this tokenizer has no such padding, or ends no text."""
        pad_id = tokenizer.token_to_id(padding)
        if pad_id is None or not tokenizer.num_special_tokens_to_add(False):
            lack = f"padding token {padding!r}" if pad_id is None else "end-of-text token that it puts behind a text"
            raise CheckpointError(f"CLIP's tokenizer.json has no {lack}. Save it again with transformers.")
        tokenizer.enable_truncation(tokens)
        tokenizer.enable_padding(length=tokens, pad_id=pad_id, pad_token=padding)
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path) -> QuestionTokenizer:
        """Read a CLIP checkpoint's folder, or the copy of its small files in an export.

        Raises:
            CheckpointError: no tokenizer, or files that cannot be read.
        """
        tokenizer = _tokenizer.read(folder)
        special = _tokenizer.special_tokens(_tokenizer.config(folder))
        return cls(tokenizer, text_tokens(Checkpoint(folder)), special.get("pad_token", PADDING))

    def encode(self, texts: Sequence[str]) -> Ints:
        """int64 [batch, tokens]: start, the text's tokens, end, padding. A text that is too long loses its tail."""
        return np.array([e.ids for e in self.tokenizer.encode_batch(list(texts))], np.int64)
