"""The description of exported graphs: round trip, and files that leave the folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from exporter.errors import VerificationError
from exporter.graphset import GraphSet, ImageSpec, TextSpec, VisualLayout, tokens_in_words


def example() -> GraphSet:
    return GraphSet(
        family="llava",
        compute="fp32",
        weights="none",
        files={"vision": "vision.onnx", "reduce": "reduce.onnx", "prefill": "decode.onnx", "decode": "decode.onnx"},
        reductions=[],
        image=ImageSpec(56, 56, "exact", 56, 56, 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        visual=VisualLayout(1, 1, 4, 4, (2, 2), [[0], [1], [2], [3]], 4, "keep"),
        text=TextSpec(8, 1, 1, 8, 16, 1, [0], [4], 3, [2]),
        signals={"hidden": [1, 4, 8]},
        side={},
        sized=False,
    )


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    example().save(tmp_path)
    assert GraphSet.load(tmp_path) == example()


@pytest.mark.parametrize(("key", "value"), [("embedding", "../secret.npy"), ("files", {"vision": "/tmp/x.onnx"})])
def test_files_outside_the_folder_are_refused(tmp_path: Path, key: str, value: object) -> None:
    example().save(tmp_path)
    raw = json.loads((tmp_path / "graphs.json").read_text())
    (tmp_path / "graphs.json").write_text(json.dumps({**raw, key: value}))
    with pytest.raises(VerificationError, match="outside the folder"):
        GraphSet.load(tmp_path)


def test_a_reduction_is_said_both_ways() -> None:
    assert tokens_in_words(576, 64) == "576 → 64 tokens (11 % kept, 9.0× fewer)"
    assert tokens_in_words(64, 0) == "64 → 0 tokens"
