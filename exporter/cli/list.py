"""`edgetrim list`: what there is to choose from, found by file name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from exporter.cli._options import json_option
from exporter.cli._output import Output, table


@click.command()
@click.argument("kinds", nargs=-1, metavar="[reductions|families|profiles|backends]…")
@json_option
def command(kinds: tuple[str, ...], as_json: bool) -> None:
    """Show the reductions, families, profiles and backends there are.

    Without an argument all four. A backend also says what this machine lacks for it.
    """
    from exporter.errors import UsageError, nearest

    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(f"Unknown kind '{kind}'. {nearest(kind, KINDS)}")
    data, parts = {}, []
    for kind in dict.fromkeys(kinds or KINDS):
        data[kind], part = KINDS[kind]()
        parts.append(part)
    Output(as_json).result(data, *parts)


def _reductions() -> tuple[list[Any], Any]:
    from graphs import _spec

    found = [_spec.describe(name) for name in _spec.names()]
    rows = [
        (d.name, d.place, f"{d.summary}\n{d.paper}", ", ".join(map(_knob, d.knobs)), ", ".join(d.needs) or None)
        for d in found
    ]
    columns = ("name", "acts", "what it does", "knobs", "needs")
    return [*map(_without_doc, found)], table("Reductions (--reduce NAME[:knob=value,…])", columns, rows)


def _knob(knob: Any) -> str:
    return str(knob.name) if knob.default in ("none", "required") else f"{knob.name}={knob.default}"


def _without_doc(description: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {k: v for k, v in asdict(description).items() if k != "doc"}


def _families() -> tuple[list[Any], Any]:
    import exporter.families
    from exporter import _discover

    names = _discover.names(exporter.families)
    found = [_discover.load(exporter.families, "family", name).FAMILY for name in names]
    data = [{"name": name, "summary": family.summary} for name, family in zip(names, found, strict=True)]
    title = "Families (model_type in the checkpoint's config.json)"
    return data, table(title, ("name", "models"), [(d["name"], d["summary"]) for d in data])


def _profiles() -> tuple[list[Any], Any]:
    from profiles import _schema

    found = [_schema.load(name) for name in _schema.names()]
    rows = [(p.name, p.device, p.stack.module or p.stack.backend, _precision(p), p.description) for p in found]
    return [*found], table("Profiles (--profile NAME)", ("name", "device", "stack", "precision", "description"), rows)


def _precision(profile: Any) -> str:
    weights, compute = profile.precision.weights, profile.precision.compute
    return compute if weights == "none" else f"{weights} weights, {compute}"


def _backends() -> tuple[list[Any], Any]:
    import exporter.backends
    from exporter import _discover

    data = []
    for name in _discover.names(exporter.backends):
        backend = _discover.load(exporter.backends, "backend", name).BACKEND
        data.append({"name": name, "missing": backend.missing(), "missing_to_run": backend.missing_to_run()})
    rows = [(d["name"], d["missing"] or "yes", d["missing_to_run"] or "yes") for d in data]
    return data, table("Backends", ("name", "builds here", "runs here"), rows)


KINDS: dict[str, Callable[[], tuple[list[Any], Any]]] = {
    "reductions": _reductions,
    "families": _families,
    "profiles": _profiles,
    "backends": _backends,
}
