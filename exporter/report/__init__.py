"""The evidence of one run as one HTML file: `report.write(ReportData(…), path)`. No torch, no network, no script."""

from exporter.report._data import (
    Answer,
    Curve,
    CurvePoint,
    Fidelity,
    Latency,
    Layers,
    Overlay,
    Quality,
    Reduction,
    Regression,
    ReportData,
    Score,
    Stage,
    Timing,
)
from exporter.report.report import render, write

__all__ = [
    "Answer",
    "Curve",
    "CurvePoint",
    "Fidelity",
    "Latency",
    "Layers",
    "Overlay",
    "Quality",
    "Reduction",
    "Regression",
    "ReportData",
    "Score",
    "Stage",
    "Timing",
    "render",
    "write",
]
