"""The shared options: what they hand to a command, and what they say about nonsense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from exporter.cli import _options as o
from exporter.errors import UsageError
from exporter.job import Job
from profiles import _schema


@pytest.fixture
def got() -> dict[str, Any]:
    return {}


@pytest.fixture
def command(got: dict[str, Any]) -> click.Command:
    """A verb with every shared option."""

    @click.command()
    @o.checkpoint_argument()
    @o.reduce_option
    @o.profile_option()
    @o.output_option("out")
    @o.frames_option
    @o.image_size_option
    @o.threads_option
    @o.seed_option
    @o.json_option
    def verb(**values: Any) -> None:
        got.update(values)

    return verb


def run(command: click.Command, *arguments: str) -> Any:
    return CliRunner().invoke(command, list(arguments))


def test_what_a_job_says_of_itself_is_what_was_typed(tmp_path: Path) -> None:
    """Every option of `run`, out of `Job.words`, which reports and `tune` print, into the same job again."""

    @click.command()
    @o.job_options
    def verb(job: Job) -> None:
        found.append(job)

    found: list[Job] = []
    (tmp_path / "mine.jsonl").touch()
    calibration = str((tmp_path / "mine.jsonl").resolve())
    asked = Job(
        "m", ("visionzip:keep=64", "fastv"), "cpu_int4", 4, (448, 672), "clip", "gptq", calibration, "int8", "auto"
    )
    for job in (asked, Job("m", (), "cpu_fp32")):
        assert run(verb, *job.words()).exit_code == 0
        assert found.pop() == job
    assert all(getattr(asked, f.name) != f.default for f in fields(Job) if f.compare), "an option is not in this test"


def test_defaults(command: click.Command, got: dict[str, Any]) -> None:
    assert run(command, "embedded").exit_code == 0
    assert got == {
        "checkpoint": "embedded",
        "reductions": (),
        "profile": "cpu_fp32",
        "output": Path("out"),
        "frames": 1,
        "image_size": None,
        "threads": None,
        "seed": 0,
        "as_json": False,
    }


def test_everything_given(command: click.Command, got: dict[str, Any]) -> None:
    text = (
        "m -r visionzip:keep=64 -r fastv -p rtx_int4 -o x --frames 4 --image-size 448x672 --threads 2 --seed 7 --json"
    )
    assert run(command, *text.split()).exit_code == 0
    assert got == {
        "checkpoint": "m",
        "reductions": ("visionzip:keep=64", "fastv"),
        "profile": "rtx_int4",
        "output": Path("x"),
        "frames": 4,
        "image_size": (448, 672),
        "threads": 2,
        "seed": 7,
        "as_json": True,
    }


@pytest.mark.parametrize(("text", "size"), [("448", (448, 448)), ("224X336", (224, 336)), ("224×336", (224, 336))])
def test_image_sizes(command: click.Command, got: dict[str, Any], text: str, size: tuple[int, int]) -> None:
    run(command, "m", "--image-size", text)
    assert got["image_size"] == size


@pytest.mark.parametrize("text", ["big", "0x448", "448x", "-3", "448x448x3"])
def test_no_image_size(command: click.Command, text: str) -> None:
    result = run(command, "m", "--image-size", text)
    assert result.exit_code == 2
    assert f"'{text}' is not an image size; write height and width in pixels, as in 448x672." in result.output


def test_an_unknown_profile(command: click.Command) -> None:
    error = run(command, "m", "-p", "cpu_fp23").exception
    assert isinstance(error, UsageError)
    assert str(error).startswith("Unknown profile 'cpu_fp23'. Did you mean 'cpu_fp32'?")


def test_a_profile_of_ones_own_keeps_its_place(
    command: click.Command, got: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.toml").write_text((_schema.FOLDER / "cpu_fp32.toml").read_text())
    monkeypatch.chdir(tmp_path)
    assert run(command, "m", "-p", "mine.toml").exit_code == 0
    assert got["profile"] == str(tmp_path / "mine.toml")


def test_no_threads(command: click.Command) -> None:
    assert run(command, "m", "--threads", "0").exit_code == 2


@pytest.mark.parametrize(
    ("kind", "typed", "offered"),
    [(o.ProfileType(), "cpu_f", ["cpu_fp32"]), (o.ReductionType(), "vision", ["visionzip"])],
)
def test_completion(command: click.Command, kind: Any, typed: str, offered: list[str]) -> None:
    context = click.Context(command)
    complete: Callable[..., list[Any]] = kind.shell_complete
    assert [c.value for c in complete(context, command.params[0], typed)] == offered
