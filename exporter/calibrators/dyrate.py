"""DyRate's classifier, trained on the frozen model as in the paper, and the schedule that a static engine needs.

Half of the questions train, a quarter finds the buckets, a quarter is held out; answers should be as long as those that are
generated later.

Source: Liang et al. 2025, "Dynamic Token Reduction during Generation for Vision Language Models", arXiv:2501.14204.
Knobs:
    layer: from which on tokens are dropped. rates: K. state: width of the GRU, 0 for the paper's linear classifier.
    buckets: cache lengths that an engine may have.
    steps, batch: of training. cost: of keeping every visual token, in nats of the answer's cross-entropy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

from exporter.calibrators._contract import Calibration, Calibrator, Log, Table
from exporter.calibrators._predictor import Dropping, Predictor, Recipe, measure, train
from exporter.calibrators._schedule import schedule, written
from exporter.errors import UsageError
from exporter.plan import Plan
from exporter.stages._task import Question


@dataclass(frozen=True)
class DyRate(Calibrator):
    """Train a classifier, find a schedule."""

    suffix: ClassVar[str] = ".safetensors"

    layer: int = 3
    rates: int = 10
    state: int = 0
    buckets: int = 3
    steps: int = 300
    batch: int = 16
    cost: float = 0.5

    def __post_init__(self) -> None:
        if min(self.buckets, self.steps, self.batch) < 1 or min(self.state, self.cost) < 0:
            raise UsageError(
                "`buckets`, `steps` and `batch` of dyrate must be 1 or more, `state` and `cost` 0 or more; found "
                f"{self.buckets}, {self.steps}, {self.batch}, {self.state} and {self.cost:g}."
            )

    @property
    def least(self) -> int:
        return 8

    @property
    def reduction(self) -> str:
        return f"dyrate:layer={self.layer},rates={self.rates}"

    def calibrate(self, plan: Plan, questions: Sequence[Question], file: str, log: Log) -> Calibration:
        half, quarter = len(questions) // 2, len(questions) // 4
        rollout = Dropping(plan, self.layer)
        predictor = Predictor(self.rates, self.state)
        recipe = Recipe(steps=self.steps, batch=self.batch, cost=self.cost)
        train(rollout, predictor, questions[:half], recipe, log)
        starts, counts = schedule(measure(rollout, predictor, questions[half : half + quarter]).kept, self.buckets)
        held_out = questions[half + quarter :]
        found = {
            "unreduced": asdict(measure(rollout, None, held_out)),
            "dyrate": asdict(measure(rollout, predictor, held_out)),
        }
        specs = {
            "by schedule": written(self.layer, starts, counts),
            "by the classifier": written(self.layer, starts, counts, weights=file, rates=self.rates, state=self.state),
        }
        rows = [(name, f"{100 * f['right']:.1f}", " ".join(f"{n:.0f}" for n in f["kept"])) for name, f in found.items()]
        note = f"{len(held_out)} held-out questions, every step ranking the image anew."
        table = Table("Answers", ("", ">% right", "visual tokens per step"), rows, note)
        return Calibration(specs, {"visual_tokens": rollout.visual, **found}, table, predictor.dumped())


CALIBRATOR = DyRate
