"""TensorRT plugins, each a pair of files: `<name>.py` says what it replaces, `<name>.cu` has the kernels.

An optional peephole for full TensorRT: every graph works without, and the plain graph stays beside the one that has plugins. A
profile chooses them by name (`plugins` in [stack]). Nothing here knows a model, a method or a device.
"""
