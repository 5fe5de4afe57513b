"""A plan's trained tensors beside the model's own: where a reduction's are, and whether they are what it needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from exporter.checkpoint import Stored, stored_tensors
from exporter.errors import CheckpointError, UsageError
from exporter.families import _traced
from exporter.plan import Plan, Step
from graphs import _spec
from graphs._compressor import Compressor


def check_weights(plan: Plan) -> None:
    """Raise UsageError if a reduction's weights lack a tensor that it needs, or have it in another shape; CheckpointError if
    they cannot be read, or the model's are quantised in a way that cannot."""
    if plan.checkpoint.quantized and isinstance(plan.family, _traced.Traced):
        raise CheckpointError(
            f"{plan.checkpoint.folder} is quantised, and {plan.family.model_type} is traced from transformers' modules, which have "
            "float weights. Take the checkpoint that is not quantised."
        )
    for step in plan.steps:
        wanted = step.method.trained(step.site)
        if wanted and (strange := step.method.strange(_names(plan, step))):
            raise UsageError(
                f"--reduce {_spec.format(step.method)}: {_where(plan, step)} does not fit this method: {strange}."
            )
        found = trained_tensors(plan, step) if wanted else {}
        wrong = [
            f"`{n}` {list(s)} (found {list(found[n].shape) if n in found else 'none'})"
            for n, s in wanted.items()
            if n not in found or found[n].shape != s
        ]
        if wrong:
            more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            hint = "" if step.weights else f" Name its weights: {step.name}:weights=FILE."
            raise UsageError(
                f"--reduce {_spec.format(step.method)}: {_where(plan, step)} does not fit this model. Expected {', '.join(wrong[:4])}{more}.{hint}"
            )


def trained_tensors(plan: Plan, step: Step) -> dict[str, Stored]:
    """A reduction's own trained tensors, by the names it has for them, as far as they are there."""
    found, prefixes = _stored(plan, step)
    return {
        name: found[prefix + name]
        for name in step.method.trained(step.site)
        for prefix in prefixes
        if prefix + name in found
    }


def _stored(plan: Plan, step: Step) -> tuple[Mapping[str, Stored], tuple[str, ...]]:
    """What lies where a reduction's trained tensors are looked for, and what may stand before their names there."""
    if isinstance(step.method, Compressor) and not step.weights:
        own = plan.checkpoint
        return {**stored_tensors(own.folder), **own.stored()}, (*step.method.prefixes, "projector.")
    return stored_tensors(Path(step.weights)), step.method.prefixes


def _names(plan: Plan, step: Step) -> set[str]:
    """What lies there, by the names that the method would have for it."""
    found, prefixes = _stored(plan, step)
    return {name.removeprefix(prefix) for name in found for prefix in prefixes if name.startswith(prefix)}


def _where(plan: Plan, step: Step) -> str:
    return step.weights or f"{plan.checkpoint.folder}, the model's own checkpoint,"
