"""Weight-only quantisation to symmetric blocked INT4, in the one form that ONNX Runtime and TensorRT both keep packed."""
