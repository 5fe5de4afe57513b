"""Made-up numbers of a plausible run. They are nobody's measurement."""

from __future__ import annotations

from typing import Any

import numpy as np

from exporter.backends._contract import Layer
from exporter.report import (
    Answer,
    Curve,
    CurvePoint,
    Fidelity,
    Latency,
    Layers,
    Overlay,
    Quality,
    Reduction,
    ReportData,
    Score,
    Stage,
    Timing,
)
from exporter.report.overlay import draw, png

NO_GPU = "TensorRT-RTX engines are built without a GPU and run only with one; this machine has none."
KINDS = ("cell", "count", "moved")
RATIOS = (0.0625, 0.125, 0.25, 0.5, 0.75)
SHAPE = {"visionzip": 0.25, "fastv": 0.75, "tome": 0.45, "random": 1.6, "uniform": 1.9}


def picture(seed: int = 0, size: int = 64) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A few bright blobs on a coloured ground."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    image = np.stack([40 + 60 * x, 50 + 50 * y, 90 + 40 * (1 - x)], -1)
    for _ in range(5):
        cy, cx, colour = rng.random(), rng.random(), rng.integers(120, 255, 3)
        blob = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 0.008)[..., None]
        image = image * (1 - blob) + blob * colour
    return image.clip(0, 255).astype(np.uint8)


def chosen(frames: np.ndarray[Any, np.dtype[np.uint8]], grid: int, keep: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    size = frames.shape[1] // grid
    cells = frames.astype(float).sum(-1).reshape(len(frames), grid, size, grid, size).mean((2, 4))
    return np.sort(np.argsort(-cells.ravel(), kind="stable")[:keep])


def curve(method: str) -> Curve:
    points = [
        CurvePoint(r, {kind: round(0.97 - (0.05 + 0.02 * k) * i * SHAPE[method] * (1 + (1 - r)), 3)
                       for k, kind in enumerate(KINDS)})
        for i, r in ((len(RATIOS) - j, r) for j, r in enumerate(RATIOS))
    ]  # fmt: skip
    bounded = [CurvePoint(p.keep_ratio, {k: max(v, 0.02) for k, v in p.accuracy.items()}) for p in points]
    return Curve(method, bounded, control=method in ("random", "uniform"))


def sample(**changes: Any) -> ReportData:
    frames = np.stack([picture(i) for i in range(4)])
    single = frames[:1]
    values: dict[str, Any] = {
        "title": "Digits VLM, one token in nine",
        "checkpoint": "embedded:digits",
        "family": "llava",
        "profile": "rtx_int4",
        "backend": "trt (tensorrt_rtx)",
        "precision": "INT4 weights, FP16",
        "device": "2-core x86-64, no GPU",
        "created": "21 November 2026, 03:18 UTC",
        "bundle_bytes": 9_412_331,
        "unreduced_tokens": 576,
        "kept_tokens": 64,
        "reductions": [
            Reduction("visionzip", "visionzip:keep=128", "before_llm, per frame", 576, 128),
            Reduction("fastv", "fastv:layer=2,keep=64", "in_llm[2]", 128, 64),
        ],
        "stages": [
            Stage("vision", 214, 3_911_204, 4_420_112, 3.2, 812.4, False),
            Stage("reduce", 41, 18_402, 330_244, 0.4, 402.0, True, "runs on ONNX Runtime"),
            Stage("prefill", 366, 4_980_112, 5_230_044, 6.1, 1204.7, False, "one engine, two profiles"),
            Stage("decode", 366, 4_980_112, "the same engine as prefill", "the same engine as prefill",
                  "the same engine as prefill", False),
        ],
        "fidelity": [
            Fidelity("vision", 0.9999991, 1.2e-3, NO_GPU, NO_GPU, "cosine ≥ 0.9999", True),
            Fidelity("reduce", 1.0, 0.0, 1.0, "no tokens come out of this stage", "indices equal", True),
            Fidelity("prefill", 0.999871, 3.4e-2, 0.994, 0.988, "cosine ≥ 0.9999", False),
            Fidelity("decode", NO_GPU, NO_GPU, NO_GPU, NO_GPU, "greedy tokens ≥ 95 %", None),
        ],
        "quality": [
            Quality("unreduced", "Unreduced, PyTorch",
                    {"cell": Score(491, 500), "count": Score(468, 500), "moved": Score(478, 500)}),
            Quality("reduced", "Reduced, PyTorch",
                    {"cell": Score(484, 500), "count": Score(455, 500), "moved": Score(461, 500)}),
            Quality("engine", "Reduced, engine", {"cell": NO_GPU, "count": NO_GPU, "moved": NO_GPU}),
            Quality("control", "random", {"cell": Score(341, 500), "count": Score(290, 500), "moved": Score(322, 500)}),
            Quality("control", "uniform", {"cell": Score(316, 500), "count": Score(275, 500), "moved": Score(301, 500)}),
        ],
        "latency": [
            Latency("vision", Timing(61.2, 64.0), Timing(62.0, 66.1), NO_GPU, NO_GPU),
            Latency("reduce", "the unreduced model has no such stage.", Timing(3.1, 3.4), NO_GPU, NO_GPU),
            Latency("prefill", Timing(349.8, 361.2), Timing(58.7, 61.0), NO_GPU, NO_GPU),
        ],
        "ttft": Latency("ttft", Timing(411.9, 424.0), Timing(124.6, 130.2), NO_GPU, NO_GPU),
        "answer_tokens": 16,
        "token": Latency("token", Timing(12.9, 13.6), Timing(12.4, 13.0), NO_GPU, NO_GPU),
        "layers": Layers("ONNX Runtime, CPU", 16, {
            "vision": [
                Layer("encoder/layers/0/self_attn/MatMul", "MatMul", ("encoder/layers/0/self_attn",), "float [1, 577, 1024]", "CPU", 4.0),
                Layer("encoder/layers/1/self_attn/MatMul", "MatMul", ("encoder/layers/1/self_attn",), "float [1, 577, 1024]", "CPU", 3.0),
                Layer("Transpose", "Transpose", (), "float [1, 577, 1024]", "CPU", 1.0),
            ],
            "reduce": [Layer(f"visionzip/{'x' * 200}/TopK", "TopK", ("visionzip",), "int64 [1, 64]", "")],
            "decode": [],
        }),
        "curves": [curve(m) for m in SHAPE],
        "full_accuracy": {"cell": 0.982, "count": 0.936, "moved": 0.956},
        "overlays": [
            Overlay("mosaic, one frame", "visionzip",
                    [png(draw(single, chosen(single, 8, 14), (8, 8), anchors=np.array([3, 40]), caption="visionzip"))]),
            Overlay("mosaic, one frame", "uniform", [png(draw(single, np.arange(0, 64, 4), (8, 8), caption="uniform"))]),
            Overlay("clip of four frames", "visionzip", [png(draw(frames, chosen(frames, 8, 32), (8, 8)))]),
        ],
        "answers": [
            Answer("cell", "Which digit is in row 2, column 3?", "7",
                   {"Unreduced": "7", "Reduced": "7", "random": "1", "uniform": "7"}),
            Answer("count", "How many sevens are there?", "3",
                   {"Unreduced": "3", "Reduced": "3", "random": "2", "uniform": "1"}),
            Answer("moved", "Which digit moved?", "4", {"Unreduced": "4", "Reduced": "9", "random": "9", "uniform": "0"}),
        ],
        "geometry": {"image": "384 × 384", "patches": "24 × 24", "frames": "1", "prompt": "16 to 64 text tokens",
                     "positions": "kept tokens keep their ids"},
        "environment": {"processor": "Some CPU", "power mode": "MAXN_SUPER", "GPU clocks": "306–1020 MHz", "load average": "0.4"},
        "versions": {"edgetrim": "0.1.0", "torch": "2.13.0", "onnx": "1.23.2", "tensorrt_rtx": "1.7.1.116"},
        "notes": ["All numbers in this file are made up: it shows the layout."],
        "command": "edgetrim run demo --reduce visionzip:keep=128 --reduce fastv:layer=2,keep=64 --profile rtx_int4 -o out/",
    }  # fmt: skip
    return ReportData(**(values | changes))
