"""Our own blocks: towers and decoders in plain torch, traced into small graphs.

Parameter names are those of the Hugging Face modules they stand for, so that loading is a lookup; only `Linear` differs:
its weight is stored [in, out], the layout that ONNX MatMul, blocked INT4 and every runtime want.
"""
