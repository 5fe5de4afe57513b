"""GitHub Actions: workflow commands, which become annotations of the run. The runner reads them from stderr too."""

from __future__ import annotations

from exporter.ci._case import Case

LEVELS = {"failed": "error", "undecided": "warning", "passed": "notice"}


def annotation(case: Case) -> str:
    """One line; what the runner takes for syntax is escaped as its toolkit does."""
    title = f"EdgeTrim {case.group}: {case.name}"
    return f"::{LEVELS[case.outcome]} title={_property(title)}::{_data(case.message)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
