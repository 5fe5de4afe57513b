"""The small files that a runtime needs beside the graphs: tokenizers, chat template, image processor settings."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.checkpoint import INSTRUCTION_FOLDER, SENTENCEPIECE, TOKENIZER_FILES, Checkpoint
from exporter.errors import CheckpointError
from exporter.plan import Plan
from exporter.runtime.question import FOLDER as CLIP_FOLDER

if TYPE_CHECKING:
    from exporter.runtime.prompt import Prompt

LLAMA = "LlamaTokenizer"


def write_processor(plan: Plan, folder: Path) -> None:
    """Those of a plan's checkpoints, each tokenizer in a folder of its own.

    Raises:
        CheckpointError: a tokenizer that cannot be read.
    """
    _copy(plan.checkpoint.folder, folder)
    if plan.clip is not None:
        _copy(plan.clip.folder, folder / CLIP_FOLDER)
    if plan.instruction is not None:
        _copy(plan.instruction, folder / INSTRUCTION_FOLDER)


def prompt_of(plan: Plan) -> Prompt:
    """The template and all tokenizers of a plan's checkpoints, whether its reductions read the question or not."""
    from exporter.runtime.prompt import Prompt

    clip = None if plan.request.clip is None else plan.request.clip.folder
    source, g = plan.checkpoint.folder, plan.geometry
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "processor"
        _copy(source, folder)
        if (source / INSTRUCTION_FOLDER).is_dir():
            _copy(source / INSTRUCTION_FOLDER, folder / INSTRUCTION_FOLDER)
        return Prompt.load(folder, g.image_token, clip, (g.mark, g.written), g.template, g.spliced)


def _copy(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (source / SENTENCEPIECE).is_file() and not (source / "tokenizer.json").is_file():
        _convert(source, folder / "tokenizer.json")


def _convert(source: Path, path: Path) -> None:
    """A Llama tokenizer that is a SentencePiece model only, in the form that needs no SentencePiece."""
    from transformers import LlamaTokenizer

    config = Checkpoint(source).optional_json("tokenizer_config.json")
    name = str(config.get("tokenizer_class", LLAMA)).removesuffix("Fast")
    if name != LLAMA:
        raise CheckpointError(
            f"{source} has its tokenizer as {SENTENCEPIECE} only, which is converted for {LLAMA}; found '{name}'. "
            "Put its tokenizer.json there."
        )
    # What a config leaves out is as it was before there was a choice.
    said = {key: config.get(key, default) for key, default in (("legacy", True), ("add_bos_token", True))}
    try:
        tokenizer = LlamaTokenizer.from_pretrained(source, local_files_only=True, **said)
    except Exception as e:  # transformers lets through whatever the parser of a damaged file raises
        raise CheckpointError(f"{source / SENTENCEPIECE} cannot be converted: {e}") from e
    tokenizer.backend_tokenizer.save(str(path))
