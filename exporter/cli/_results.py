"""What the verbs say about an output folder: as data, and as tables. Reads what the stages left on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.cli._output import table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from exporter.graphset import GraphSet
    from exporter.job import Job
    from exporter.workspace import Workspace


@dataclass(frozen=True)
class Found:
    """A result in both forms that `Output.result` takes."""

    data: dict[str, Any]
    parts: list[RenderableType]


def summary(work: Workspace) -> Found:
    """Everything there is: tokens, fidelity, quality, latency, engines, the report."""
    from exporter.graphset import GraphSet
    from exporter.job import Job
    from exporter.stages import report

    job, graphs = Job.read(work), GraphSet.load(work.graphs)
    data: dict[str, Any] = {"folder": work.folder, **described(job, graphs)}
    parts: list[RenderableType] = [headline(job, graphs)]
    for name, show in (("validation", validation), ("latency", latency)):
        data[name], shown = evidence(work, name, show)
        parts += shown
    found = engines(work, job, graphs)
    data["engines"] = found.data["engines"]
    parts += found.parts
    page = work.folder / report.REPORT
    data["bytes"] = report.size_of(work.folder)
    data["report"] = page if page.is_file() else None
    if page.is_file():
        parts.append(f"Report: {page}")
    return Found(data, parts)


def evidence(
    work: Workspace, name: str, show: Callable[[Mapping[str, Any]], list[RenderableType]]
) -> tuple[Any, list[RenderableType]]:
    """A record of the evidence, and what is shown of it; nothing where there is none. Raises VerificationError."""
    from exporter.errors import VerificationError
    from exporter.stages import report

    record = report.optional(work, f"evidence/{name}.json")
    try:
        return record, [] if record is None else show(record)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError) as e:
        path = work.folder / "evidence" / f"{name}.json"
        raise VerificationError(
            f"{path} is damaged ({type(e).__name__}: {e}). Run the verb that writes it again."
        ) from e


def described(job: Job, graphs: GraphSet) -> dict[str, Any]:
    """The model and what was reduced, as data."""
    return {
        "checkpoint": job.checkpoint,
        "family": graphs.family,
        "profile": job.profile,
        "precision": {"compute": graphs.compute, "weights": graphs.weights},
        "reductions": graphs.reductions,
        "visual_tokens": {
            "before": graphs.visual.total,
            "into_llm": graphs.visual.kept,
            "per_kv_group": graphs.text.kept,
        },
    }


def headline(job: Job, graphs: GraphSet) -> str:
    """The model in a line, then a line per reduction: "visionzip: 64 → 32 tokens (50 % kept, 2.0× fewer)"."""
    from exporter.graphset import tokens_in_words

    precision = graphs.compute if graphs.weights == "none" else f"{graphs.weights} weights, {graphs.compute}"
    lines = [f"{job.checkpoint} ({graphs.family}) for {Path(job.profile).stem}: {precision}"]
    lines += [f"  {r['name']}: {tokens_in_words(r['before'], r['after'])}" for r in graphs.reductions]
    if not graphs.reductions:
        lines.append(f"  no reduction: all {graphs.visual.total} visual tokens")
    elif len(graphs.reductions) > 1:
        lines.append(f"  together: {tokens_in_words(graphs.visual.total, graphs.reductions[-1]['after'])}")
    return "\n".join(lines) + "\n"


def validation(record: Mapping[str, Any]) -> list[RenderableType]:
    """Fidelity and quality, two tables: never mixed in one number."""
    rows = [
        (
            row["stage"],
            None if row["cosine"] is None else f"{row['cosine']:.6f}",
            None if row["max_abs"] is None else f"{row['max_abs']:.2g}",
            None if row["agreement"] is None else f"{100 * row['agreement']:.1f} %",
            row["gate"] or None,
            {True: "pass", False: "FAIL", None: None}[row["passed"]],
        )
        for row in record["fidelity"]
    ]
    columns = ("stage", ">cosine", ">max diff", ">agree", "gate", "")
    parts = [table(f"Fidelity: {record['executed']}, against PyTorch FP32", columns, rows)]
    if record["quality"]:
        kinds = list(record["quality"][0]["scores"])
        answered = [
            (row["label"], *(_share(row["scores"][kind]) for kind in kinds), _share(_all(row["scores"])))
            for row in record["quality"]
        ]
        title = f"Quality: right answers to {record['questions']} questions"
        parts.append(table(title, ("variant", *(f">{kind}" for kind in kinds), ">all"), answered))
        parts += [f"{gate['words'][:1].upper()}{gate['words'][1:]}." for gate in record.get("gates", [])]
        if causes := record.get("regressions", {}).get("causes"):
            by = ", ".join(f"{count} by the {cause}" for cause, count in causes.items())
            parts.append(f"Right before and wrong now: {by}; see evidence/answers.jsonl.")
    return [*parts, *(f"{note[:1].upper()}{note[1:]}." for note in record["notes"])]


def _all(scores: Mapping[str, Any]) -> list[float]:
    return [sum(counts[i] for counts in scores.values()) for i in (0, 1)]


def _share(counts: list[float]) -> str:
    return f"{100 * counts[0] / max(1, counts[1]):.1f} %"


def latency(record: Mapping[str, Any]) -> list[RenderableType]:
    """Median milliseconds per stage, PyTorch and engine, each with and without reduction."""
    variants = record["variants"]
    pairs = (("reference", "PyTorch"), ("engine", "engine"))
    columns, rows = ["stage"], []
    for key, name in pairs:
        both = [f"{key}_{how}" for how in ("unreduced", "reduced") if f"{key}_{how}" in variants]
        columns += [f">{name} {v.partition('_')[2]}" for v in both]
        columns += [">"] if len(both) == 2 else []
    for stage, title in STAGES.items():
        if not any(stage in found for found in variants.values()):
            continue
        row: list[str | None] = [title]
        for key, _ in pairs:
            present = [variants[name] for how in ("unreduced", "reduced") if (name := f"{key}_{how}") in variants]
            times = [found[stage]["median_ms"] if stage in found else None for found in present]
            row += [None if t is None else f"{t:.2f}" for t in times]
            row += [_ratio(*times)] if len(times) == 2 else []
        rows.append(row)
    machine = record["machine"]
    load = "" if machine["load"] is None else f", load {machine['load']:g}"
    title = f"Latency: median ms of {record['rounds']} rounds; engine: {record['executed']}"
    where = f"Measured on {machine['processor']}, {machine['cores']} cores{load}.\n"
    return [table(title, columns, rows), where]


STAGES = {
    "vision": "vision",
    "question": "question",
    "reduce": "reduce and project",
    "prefill": "prefill",
    "ttft": "to first token",
    "decode": "per output token",
}


def _ratio(before: float | None, after: float | None) -> str | None:
    return f"{before / after:.2f}×" if before and after else None


def engines(work: Workspace, job: Job, graphs: GraphSet) -> Found:
    """Graphs, and the engines built from them."""
    from exporter.stages import report

    entries = report.engine_entries(work, graphs, job.loaded_profile())
    return engine_table(entries, "Graphs and engines")


def engine_table(entries: list[dict[str, Any]], title: str) -> Found:
    from exporter.report.report import in_bytes

    rows = [
        (
            " and ".join(e["roles"]),
            e["profile"],
            e["nodes"],
            in_bytes(e["graph_bytes"]),
            *(
                (in_bytes(e["engine_bytes"]), f"{e['build_s']:.1f} s", f"{e['peak_rss_mib']:,.0f} MiB")
                if "backend" in e
                else ("not built", None, None)
            ),
        )
        for e in entries
    ]
    columns = ("role", "profile", ">nodes", ">graph", ">engine", ">built in", ">peak memory")
    return Found({"engines": entries}, [table(title, columns, rows)])
