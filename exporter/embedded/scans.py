"""Where `digits.npz` comes from: `python -m exporter.embedded.scans [FILE]`, needed once (extra `train`).

Takes the 1,797 scans of scikit-learn's `load_digits` as they are and draws 400 of them to be held out.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

HELD_OUT = 400


def write(file: Path) -> None:
    """Write images uint8 [1797, 8, 8] (0 to 16), labels uint8 [1797], held_out bool [1797]."""
    data = load_digits()
    held_out = np.zeros(len(data.target), bool)
    held_out[np.random.default_rng(0).permutation(len(held_out))[:HELD_OUT]] = True
    images, labels = data.images.astype(np.uint8), data.target.astype(np.uint8)
    np.savez_compressed(file, images=images, labels=labels, held_out=held_out)


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("digits.npz"))
