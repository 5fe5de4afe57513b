"""EdgeTrim: vision-language models to engines, with visual-token reduction baked into the exported graphs."""

__version__ = "0.1.0"
