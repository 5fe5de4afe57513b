"""What a target's ONNX parser and builder would do with a graph, known without the target: one table per version of them.

A table is a TOML file named `<module>-<version>.toml`; `_table` reads it, `_conditions` are the words its rules are written in,
`_check` applies it.
"""
