"""Gates for CI systems: --junit and --annotations, of every verb that has one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from exporter.ci._case import Case
    from exporter.cli._output import Output

F = TypeVar("F", bound=Callable[..., Any])


class AnnotationsType(click.ParamType[str]):
    """A format of annotations: a file of exporter/ci."""

    name = "format"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        import exporter.ci
        from exporter import _discover

        _discover.load(exporter.ci, "format of annotations", str(value))
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        import exporter.ci
        from exporter import _discover

        return [CompletionItem(n) for n in _discover.names(exporter.ci) if n.startswith(incomplete)]


def ci_options(function: F) -> F:
    """--junit → Path | None; --annotations → str | None."""
    function = click.option(
        "--annotations", type=AnnotationsType(), metavar="FORMAT",
        help="Print what the gates found as annotations on stderr, for this CI system: github.",
    )(function)  # fmt: skip
    return click.option(
        "--junit", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
        help="Write what the gates found as JUnit XML.",
    )(function)  # fmt: skip


def tell(out: Output, title: str, cases: Sequence[Case], junit: Path | None, annotations: str | None) -> None:
    """Write and print what was asked for.

    Raises:
        UsageError: the file cannot be written.
    """
    from exporter.errors import UsageError
    from exporter.workspace import write_text

    if junit is not None:
        from exporter.ci import _junit

        try:
            junit.parent.mkdir(parents=True, exist_ok=True)
            write_text(junit, _junit.document(title, cases))
        except OSError as e:
            raise UsageError(f"Cannot write to {junit}: {e.strerror}. Choose another --junit.") from e
    if annotations is not None:
        import exporter.ci
        from exporter import _discover

        form = _discover.load(exporter.ci, "format of annotations", annotations)
        out.lines([form.annotation(case) for case in cases if case.outcome != "passed"])
