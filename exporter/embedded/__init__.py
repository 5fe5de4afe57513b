"""The embedded VLM: a small LLaVA that is really trained, shipped with the package, and the task it was trained on.

`digits` makes the questions (numpy and PIL only), `train` is the recipe, `evaluate` measures a checkpoint through
plain transformers. Importing this package imports nothing heavy.
"""

from pathlib import Path

CHECKPOINT: Path = Path(__file__).resolve().parent / "checkpoint"
"""The shipped checkpoint: a Hugging Face `LlavaForConditionalGeneration` folder, FP16 safetensors."""
