"""Quantised checkpoints as they are published: one layout per file, named after `quant_method` in `quantization_config`."""
