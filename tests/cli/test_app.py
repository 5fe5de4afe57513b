"""Every way a command can end: one message on stderr, one exit code, no traceback unless asked for."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable

import click
import pytest

from exporter import errors
from exporter.cli import _app
from graphs._contract import ReductionError


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Makes `edgetrim list` raise."""

    def install(error: BaseException) -> None:
        @click.command()
        def command() -> None:
            raise error

        monkeypatch.setattr("exporter.cli.list.command", command)

    import exporter.cli.list  # noqa: F401 - the attribute above has to be there

    return install


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (errors.ExportError("It went wrong."), 1, "It went wrong."),
        (errors.UsageError("Not like this."), 2, "Not like this."),
        (ReductionError("`keep` must be in 1..64"), 2, "`keep` must be in 1..64"),
        (errors.GateError("Too far off."), 3, "Too far off."),
        (errors.LatencyError("Too slow."), 4, "Too slow."),
        (errors.EnvironmentMismatch("No GPU."), 5, "No GPU."),
        (errors.VerificationError("A hash differs."), 6, "A hash differs."),
        (KeyboardInterrupt(), 130, "Interrupted; nothing half-written is left."),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/llm.data"),
            1,
            "The disk is full while writing out/llm.data. Free some space or choose another --output; "
            "nothing half-written is left.",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 1, "Permission denied: /root/x."),
        (
            ZeroDivisionError("division by zero"),
            1,
            "Unexpected ZeroDivisionError: division by zero. This is a fault in EdgeTrim. "
            "Add --debug for the traceback.",
        ),
    ],
)
def test_errors(
    edgetrim: Callable[..., tuple[int, str, str]],
    ending: Callable[[BaseException], None],
    error: BaseException,
    code: int,
    message: str,
) -> None:
    ending(error)
    found, out, err = edgetrim("list")
    assert (found, out, err.lstrip("\n")) == (code, "", f"Error: {message}\n")


@pytest.mark.parametrize("arguments", [("--debug", "list"), ("list", "--debug")])
def test_debug_shows_the_traceback(
    edgetrim: Callable[..., tuple[int, str, str]], ending: Callable[[BaseException], None], arguments: tuple[str, ...]
) -> None:
    ending(ZeroDivisionError("division by zero"))
    code, out, err = edgetrim(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith("Traceback (most recent call last):")
    assert err.endswith("\nError: Unexpected ZeroDivisionError: division by zero. This is a fault in EdgeTrim.\n")


def test_an_unknown_verb(edgetrim: Callable[..., tuple[int, str, str]]) -> None:
    known = ", ".join(_app.group.list_commands(click.Context(_app.group)))
    assert edgetrim("lits") == (2, "", f"Error: Unknown command 'lits'. Did you mean 'list'? Known: {known}.\n")


def test_an_unknown_option(edgetrim: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = edgetrim("list", "--jsn")
    assert (code, out) == (2, "")
    assert "Error: No such option '--jsn'." in err


def test_help_documents_the_exit_codes(edgetrim: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = edgetrim("--help")
    assert (code, err) == (0, "")
    documented = {int(line.split()[0]) for line in out.partition("Exit codes:\n")[2].splitlines()}
    raised = {e.exit_code for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.ExportError)}
    assert documented == raised | {0, _app.INTERRUPTED}


def test_version(edgetrim: Callable[..., tuple[int, str, str]]) -> None:
    import exporter

    assert edgetrim("--version") == (0, f"edgetrim, version {exporter.__version__}\n", "")


def test_a_reader_that_leaves_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    code = "import sys; from exporter.cli import main; sys.exit(main(['list', 'profiles']))"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, timeout=60, check=False
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")
