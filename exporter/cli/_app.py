"""The click group that finds the verbs, and `main`, where every error becomes a message and an exit code."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

import exporter
import exporter.cli as verbs
from exporter import _discover
from exporter.cli._options import Settings, debug_option
from exporter.errors import EnvironmentMismatch, ExportError, UsageError
from graphs._contract import ReductionError

INTERRUPTED = 130
EPILOG = """\b
Exit codes:
    0  ok
    1  failure
    2  usage
    3  a fidelity or quality gate did not pass
    4  a latency gate did not pass
    5  this machine lacks what the target needs
    6  a bundle is not what its manifest says
  130  interrupted
"""


class Verbs(click.Group):
    """Finds verbs by file name and imports the one that is used (`--help` of the group imports all; they are light)."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return _discover.names(verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = _discover.load(verbs, "command", cmd_name).command
        if not any(p.name == "debug" for p in command.params):
            command.params.append(debug_option())
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-"):
            _discover.load(verbs, "command", args[0])
        return super().resolve_command(ctx, args)


@click.group(cls=Verbs, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=True)
@click.version_option(exporter.__version__, prog_name="edgetrim")
def group() -> None:
    """Vision-language models to engines, with visual-token reduction baked into the graphs.

    Results go to stdout, progress to stderr. Every command takes --json and --debug.
    """


group.params.append(debug_option())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. Every message an error makes is printed here."""
    settings = Settings()
    try:
        returned: Any = group.main(
            args=None if arguments is None else list(arguments),
            prog_name="edgetrim",
            standalone_mode=False,
            obj=settings,
        )
        sys.stdout.flush()
        return returned if isinstance(returned, int) else 0
    except click.ClickException as e:
        e.show()
        return e.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _fail("Interrupted; nothing half-written is left.", INTERRUPTED, settings)
    except ExportError as e:
        return _fail(str(e), e.exit_code, settings)
    except ReductionError as e:
        return _fail(str(e), UsageError.exit_code, settings)
    except BrokenPipeError:
        # Whoever read our output has left. Python flushes stdout once more on exit: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as e:
        if e.errno == errno.ENOSPC:
            where = f" while writing {e.filename}" if e.filename else ""
            text = f"The disk is full{where}. Free some space or choose another --output; nothing half-written is left."
        else:
            text = f"{e.strerror or e}{f': {e.filename}' if e.filename else ''}."
        return _fail(text, 1, settings)
    except ModuleNotFoundError as e:
        module = (e.name or "").partition(".")[0]
        if (extra := extra_with(module)) is None:
            return _unexpected(e, settings)
        text = f"This needs `{module}`, which is not installed here. pip install 'edgetrim[{extra}]', or do it on a machine that has it."
        return _fail(text, EnvironmentMismatch.exit_code, settings)
    except Exception as e:
        return _unexpected(e, settings)


def extra_with(module: str) -> str | None:
    """The extra of this package that brings a module, or None."""
    import importlib.metadata

    try:
        requires = importlib.metadata.requires("edgetrim") or ()
    except importlib.metadata.PackageNotFoundError:  # run from its source
        return None
    for line in requires:
        found = re.match(r"([\w.-]+).*extra == ['\"](\w+)['\"]", line)
        if found and found[1].replace("-", "_").lower() == module.lower():
            return found[2]
    return None


def _unexpected(error: Exception, settings: Settings) -> int:
    hint = "" if settings.debug else " Add --debug for the traceback."
    return _fail(f"Unexpected {type(error).__name__}: {error}. This is a fault in EdgeTrim.{hint}", 1, settings)


def _fail(message: str, code: int, settings: Settings) -> int:
    if settings.debug:
        traceback.print_exc(file=sys.stderr)
    click.secho("Error: ", fg="red", nl=False, err=True)
    click.echo(message, err=True)
    return code
