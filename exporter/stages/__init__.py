"""The stages: each takes values, gives values, and writes its result to disk so that it can be rerun alone."""
