"""Backends: what builds engines from graphs, and what runs them. One file each; file name = `--backend` name."""
