"""Layouts of other runtimes: what `pack --layout` writes beside the graphs. One file each; file name = `--layout` name."""
