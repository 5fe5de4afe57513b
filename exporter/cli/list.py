"""`edgetrim list`: what there is to choose from, found by file name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from exporter.cli._options import clip_model_option, json_option
from exporter.cli._output import Output, table


@click.command()
@click.argument("kinds", nargs=-1, metavar="[reductions|families|profiles|backends|plugins]…")
@click.option(
    "--for", "checkpoint", metavar="CHECKPOINT",
    help="With `reductions`: which fit this model, and why others do not. A folder, a hub id, or `embedded`.",
)  # fmt: skip
@clip_model_option
@json_option
def command(kinds: tuple[str, ...], checkpoint: str | None, clip: str | None, as_json: bool) -> None:
    """Show the reductions, families, profiles, backends and plugins there are.

    Without an argument all five. A backend also says what this machine lacks for it, and so do the plugins.
    """
    from exporter.errors import UsageError, nearest

    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(f"Unknown kind '{kind}'. {nearest(kind, KINDS)}")
    if clip is not None and checkpoint is None:
        raise UsageError("--clip-model goes with --for: edgetrim list reductions --for CHECKPOINT --clip-model CLIP")
    if checkpoint is not None:
        if kinds not in ((), ("reductions",)):
            raise UsageError("--for goes with `reductions`: edgetrim list reductions --for CHECKPOINT")
        found, part = _fits(checkpoint, clip)
        Output(as_json).result(found, part)
        return
    data, parts = {}, []
    for kind in dict.fromkeys(kinds or KINDS):
        data[kind], part = KINDS[kind]()
        parts.append(part)
    Output(as_json).result(data, *parts)


def _reductions() -> tuple[list[Any], Any]:
    from exporter import methods
    from graphs import _spec

    names = _spec.names()
    data = methods.data(names)
    rows = [
        (
            d["name"], methods.PLACES[d["place"]], d["tier"], f"{d['summary']}\n{d['paper']}",
            ", ".join(map(_knob, d["knobs"])), ", ".join(d["needs"]) or None, methods.families_in_words(d["families"]),
        )
        for d in data
    ]  # fmt: skip
    columns = ("name", "acts", "tier", "what it does", "knobs", "needs", "families")
    return data, table("Reductions (--reduce NAME[:knob=value,…])", columns, rows)


def _knob(knob: dict[str, str]) -> str:
    return knob["name"] if knob["default"] in ("none", "required") else f"{knob['name']}={knob['default']}"


def _fits(checkpoint: str, clip: str | None) -> tuple[dict[str, Any], Any]:
    """Every reduction at half of the tokens, on this model."""
    from exporter import methods
    from exporter.checkpoint import Checkpoint
    from exporter.families._contract import Request
    from exporter.job import folder_of
    from exporter.plan import find_family
    from graphs import _spec

    found = Checkpoint(folder_of(checkpoint))
    family = find_family(found).model_type
    request = Request(clip=None if clip is None else Checkpoint(folder_of(clip)))
    fits = [methods.fit(name, found, request=request) for name in _spec.names()]
    data = [
        {"name": f.name, "fits": f.plan is not None, "image": f.image, "clip": f.clip, "spec": f.spec,
         "why_not": f.reason or None}
        for f in fits
    ]  # fmt: skip
    rows = [(f.name, "yes" if f.plan else "no", f.words, f.spec) for f in sorted(fits, key=lambda f: f.plan is None)]
    title = (
        f"Reductions for {checkpoint} ({family}), tried as written, on an image and on a clip of {methods.CLIP} frames"
    )
    return {"checkpoint": checkpoint, "family": family, "reductions": data}, table(
        title, ("name", "fits", "on, or why not", "tried"), rows
    )


def _families() -> tuple[list[Any], Any]:
    import exporter.families
    from exporter import _discover

    names = _discover.names(exporter.families)
    found = [_discover.load(exporter.families, "family", name).FAMILY for name in names]
    data = [{"name": name, "summary": family.summary} for name, family in zip(names, found, strict=True)]
    title = (
        "Families (model_type in config.json; others that transformers has are traced, for reductions before the LLM)"
    )
    return data, table(title, ("name", "models"), [(d["name"], d["summary"]) for d in data])


def _profiles() -> tuple[list[Any], Any]:
    from profiles import _schema

    found = [_schema.load(name) for name in _schema.names()]
    rows = [(p.name, p.device.title, p.stack.module or p.stack.backend, _precision(p), p.description) for p in found]
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


def _plugins() -> tuple[list[Any], Any]:
    import plugins
    from exporter import _discover
    from plugins import _library

    library = _library.path()
    missing = None if library else f"not built: {_library.HOW}"
    found = {name: _discover.load(plugins, "plugin", name).PLUGIN for name in _discover.names(plugins)}
    data = [{"name": name, "summary": plugin.summary, "missing": missing} for name, plugin in found.items()]
    rows = [(d["name"], d["summary"]) for d in data]
    state = f"built: {library}" if library else missing
    title = f"Plugins ([stack] plugins of a profile with module tensorrt; {state})"
    return data, table(title, ("name", "takes the place of"), rows)


KINDS: dict[str, Callable[[], tuple[list[Any], Any]]] = {
    "reductions": _reductions,
    "families": _families,
    "profiles": _profiles,
    "backends": _backends,
    "plugins": _plugins,
}
