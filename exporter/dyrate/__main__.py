"""`python -m exporter.dyrate CHECKPOINT --questions FILE --out FILE`: train the classifier, find the schedule, print the spec.

Half of the questions train, a quarter calibrates the buckets, a quarter is held out. FILE is as for `edgetrim validate`: JSON
lines with images, question and answer; answers should be as long as those that are generated later.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from exporter.errors import ExportError, UsageError


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m exporter.dyrate", description="Train DyRate's classifier.")
    parser.add_argument("checkpoint", help="Hugging Face folder, or `embedded`")
    parser.add_argument("--questions", type=Path, required=True, help="JSON lines: images, question, answer")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--frames", type=int, default=1)
    parser.add_argument("--layer", type=int, default=3, help="layer from which on tokens are dropped")
    parser.add_argument("--rates", type=int, default=10, help="K")
    parser.add_argument("--state", type=int, default=0, help="width of the GRU; 0: the paper's linear classifier")
    parser.add_argument("--buckets", type=int, default=3, help="cache lengths that an engine may have")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--cost", type=float, default=0.5, help="of keeping every visual token, in nats of cross-entropy"
    )
    options = parser.parse_args(arguments)
    try:
        found = run(options)
    except ExportError as e:
        click.echo(f"Error: {e}", err=True)
        return int(e.exit_code)
    click.echo(json.dumps(found, indent=1))
    return 0


def run(options: argparse.Namespace) -> dict[str, object]:
    """Train, calibrate, measure; the classifier is written, the rest is returned."""
    from exporter.dyrate.predictor import Predictor, Recipe, measure, train
    from exporter.dyrate.rollout import Rollout
    from exporter.dyrate.schedule import schedule, written
    from exporter.job import Job
    from exporter.stages import _task

    questions = _task.from_file(options.questions, options.frames)
    if len(questions) < 8:
        raise UsageError(f"{options.questions} holds {len(questions)} questions; expected 8 or more to train on.")
    half, quarter = len(questions) // 2, len(questions) // 4
    plan = Job(options.checkpoint, (), "cpu_fp32", options.frames).plan()
    rollout = Rollout(plan, options.layer)
    predictor = Predictor(options.rates, options.state)
    recipe = Recipe(steps=options.steps, batch=options.batch, cost=options.cost)
    train(rollout, predictor, questions[:half], recipe, lambda text: click.echo(text, err=True))
    predictor.save(options.out)
    calibrated = measure(rollout, predictor, questions[half : half + quarter])
    starts, counts = schedule(calibrated.kept, options.buckets)
    held_out = questions[half + quarter :]
    return {
        "spec": written(options.layer, starts, counts),
        "adaptive_spec": written(
            options.layer, starts, counts, weights=str(options.out), rates=options.rates, state=options.state
        ),
        "visual_tokens": rollout.visual,
        "unreduced": asdict(measure(rollout, None, held_out)),
        "dyrate": asdict(measure(rollout, predictor, held_out)),
    }


if __name__ == "__main__":
    sys.exit(main())
