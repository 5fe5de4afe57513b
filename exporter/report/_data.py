"""What a report is made of: plain values that go to JSON and back.

A number that was not measured is the reason why, as a string: "no GPU here". It is shown as "not measured". The empty
string is a number that does not exist there, such as the cosine of a count: it is shown as a dash.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field, fields, is_dataclass
from math import sqrt
from pathlib import Path
from typing import Any, Literal, Union

from exporter._typed import parsed, typed
from exporter.backends._contract import Layer
from exporter.errors import VerificationError

Number = Union[float, str]  # noqa: UP007  (evaluated at run time, and Python 3.10's `|` has no get_origin of Union)
"""A measured number, or the reason why there is none."""


@dataclass(frozen=True)
class Reduction:
    """One reduction, in the order they act. `before` and `after`: visual tokens."""

    name: str
    spec: str
    place: str
    before: int
    after: int


@dataclass(frozen=True)
class Stage:
    """One graph and what was built from it. `executed`: the engine ran on the machine that wrote the report. `built`: there
    is an engine; where it is False, the three numbers are the reason."""

    name: str
    nodes: int
    graph_bytes: int
    engine_bytes: Number
    build_s: Number
    peak_rss_mib: Number
    executed: bool
    note: str = ""
    built: bool = True


@dataclass(frozen=True)
class Fidelity:
    """Same mathematics, other runtime. Agreements are fractions. `gate` says the threshold in words: "cosine ≥ 0.9999"."""

    stage: str
    cosine: Number
    max_abs: Number
    index_agreement: Number
    greedy_agreement: Number
    gate: str
    passed: bool | None
    """None: the gate was not applied."""


@dataclass(frozen=True)
class Score:
    """Right answers out of `n` questions; half a point for half an answer, where the metric gives that."""

    correct: float
    n: int

    @property
    def value(self) -> float:
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval: right near 0 and 1 too, where most of our scores are."""
        z = 1.96
        centre, spread = (
            self.value + z * z / (2 * self.n),
            z * sqrt(self.value * (1 - self.value) / self.n + z * z / (4 * self.n**2)),
        )
        scale = 1 + z * z / self.n
        return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


Scored = Union[Score, str]  # noqa: UP007
Variant = Literal["unreduced", "reduced", "engine", "control"]


@dataclass(frozen=True)
class Quality:
    """Accuracy of one variant, by kind of question. Controls are `random` and `uniform` at the same keep."""

    variant: Variant
    label: str
    scores: dict[str, Scored]


@dataclass(frozen=True)
class Timing:
    """Milliseconds."""

    median: float
    p90: float


Timed = Union[Timing, str]  # noqa: UP007


@dataclass(frozen=True)
class Latency:
    """One stage, four ways."""

    stage: str
    reference_unreduced: Timed
    reference_reduced: Timed
    engine_unreduced: Timed
    engine_reduced: Timed


@dataclass(frozen=True)
class Layers:
    """What engines became when they ran. engines: stage → layers; none where the runtime does not tell. executed: which runtime.
    new_tokens: of the answer that their milliseconds are of."""

    executed: str
    new_tokens: int
    engines: dict[str, list[Layer]]


@dataclass(frozen=True)
class CurvePoint:
    keep_ratio: float
    accuracy: dict[str, float]
    """By kind of question."""


@dataclass(frozen=True)
class Curve:
    """One method's accuracy against the fraction of visual tokens it keeps."""

    method: str
    points: list[CurvePoint]
    control: bool = False


@dataclass(frozen=True)
class Overlay:
    """Pictures of which tokens were kept, as PNG bytes (`overlay.png`)."""

    caption: str
    method: str
    images: list[bytes]


@dataclass(frozen=True)
class Answer:
    """One question and what each variant answered: label → answer."""

    kind: str
    question: str
    expected: str
    answers: dict[str, str]
    right: dict[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Regression:
    """A question that the unreduced model answers right and the engine does not. cause: what lost it, "reduction" or
    "precision". image: PNG, with the kept tokens if they can be drawn."""

    kind: str
    question: str
    expected: str
    cause: str
    answers: dict[str, str]
    image: bytes


@dataclass(frozen=True)
class ReportData:
    """Everything a report shows. Lists may be empty: the section then says that it was not measured."""

    title: str
    checkpoint: str
    family: str
    profile: str
    backend: str
    precision: str
    device: str
    """The machine that measured, in words."""
    created: str
    """Date and time, in words."""
    bundle_bytes: Number
    unreduced_tokens: int
    kept_tokens: int
    reductions: list[Reduction]
    stages: list[Stage] = field(default_factory=list)
    fidelity: list[Fidelity] = field(default_factory=list)
    quality: list[Quality] = field(default_factory=list)
    latency: list[Latency] = field(default_factory=list)
    """One per stage."""
    ttft: Latency | None = None
    """Time to first token: all stages up to the first logits."""
    token: Latency | None = None
    """Time per output token."""
    answer_tokens: int = 0
    """Tokens of an answer as it was timed; 0: not known."""
    layers: Layers | None = None
    curves: list[Curve] = field(default_factory=list)
    full_accuracy: dict[str, float] = field(default_factory=dict)
    """Unreduced, by kind, in the curves' setting."""
    overlays: list[Overlay] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    regressions: list[Regression] = field(default_factory=list)
    """Those that are shown."""
    regressed: dict[str, int] = field(default_factory=dict)
    """All of them, by cause."""
    geometry: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    """The machine that measured: processor, power mode, clocks, driver, load."""
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    command: str = ""
    """A line each."""

    def to_json(self) -> str:
        return json.dumps(_plain(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ReportData:
        try:
            return typed(cls, parsed(text))
        except ValueError as e:
            raise VerificationError(f"This is not the data of a report: {e}. Run it again.") from e

    def save(self, path: Path) -> None:
        path.write_text(self.to_json(), encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value
