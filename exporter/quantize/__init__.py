"""Weight-only quantisation to symmetric blocks of INT4, or INT8 columns, in the one form that ONNX Runtime and TensorRT keep packed.

One way of choosing the integers per file; `[precision] quantizer` and `--quantizer` take the file's name.
"""
