"""Options that several verbs share, so that one word means one thing everywhere."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import click
from click.shell_completion import CompletionItem

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Settings:
    """What holds for the whole invocation. click's `obj`."""

    debug: bool = False


def debug_option() -> click.Option:
    """`--debug`, which every command gets by itself: the traceback with every error."""

    def switch_on(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            ctx.ensure_object(Settings).debug = True

    return click.Option(
        ["--debug"], is_flag=True, is_eager=True, expose_value=False, callback=switch_on,
        help="Show the traceback with an error.",
    )  # fmt: skip


class ProfileType(click.ParamType[str]):
    """A profile's name, or the path of a TOML file, made absolute. Checked here, read again where it is used."""

    name = "profile"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from profiles import _schema

        text = str(value)
        _schema.load(text)
        path = Path(text)
        return str(path.resolve()) if path.suffix == ".toml" or path.name != text else text

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from profiles import _schema

        return [CompletionItem(n) for n in _schema.names() if n.startswith(incomplete)]


class ReductionType(click.ParamType[str]):
    """A reduction spec, left as text; completes the name."""

    name = "spec"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from graphs import _spec

        return [CompletionItem(n) for n in _spec.names() if n.startswith(incomplete)]


class ImageSizeType(click.ParamType[tuple[int, int]]):
    """ "448x672", or "448" for a square → (height, width) in pixels."""

    name = "HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"(\d{1,5})(?:[xX×](\d{1,5}))?", value.strip())
        height, width = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not (height and width):
            self.fail(f"'{value}' is not an image size; write height and width in pixels, as in 448x672.", param, ctx)
        return height, width


def checkpoint_argument(*, required: bool = True) -> Callable[[F], F]:
    """CHECKPOINT: a folder in Hugging Face layout, a hub id, or `embedded`. Passed as text."""
    return click.argument("checkpoint", required=required, default=None if required else "embedded")


def reduce_option(function: F) -> F:
    """--reduce, repeatable → tuple[str, ...] of specs."""
    return click.option(
        "--reduce", "-r", "reductions", multiple=True, type=ReductionType(), metavar="NAME[:knob=value,…]",
        help="Visual-token reduction; repeat to compose. `edgetrim list reductions` shows them.",
    )(function)  # fmt: skip


def profile_option(default: str | None = "cpu_fp32") -> Callable[[F], F]:
    """--profile → a name or an absolute path, or None where there is no default."""
    return click.option(
        "--profile", "-p", type=ProfileType(), default=default, show_default=default is not None, metavar="NAME|TOML",
        help="Target: device, stack, precision, limits. `edgetrim list profiles` shows them.",
    )  # fmt: skip


def profiles_option(function: F) -> F:
    """--profile, repeatable → profiles: tuple[str, ...], names or absolute paths."""
    return click.option(
        "--profile", "-p", "profiles", multiple=True, type=ProfileType(), metavar="NAME|TOML",
        help="Target; repeat to compare. `edgetrim list profiles` shows them.",
    )(function)  # fmt: skip


def output_option(default: str | None = None) -> Callable[[F], F]:
    """--output → Path. Required without a default."""
    return click.option(
        "--output", "-o", type=click.Path(file_okay=False, path_type=Path), default=default, required=default is None,
        show_default=default is not None, metavar="FOLDER", help="Folder to write to.",
    )  # fmt: skip


def json_option(function: F) -> F:
    """--json → as_json: bool."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(function)


def folder_argument(function: F) -> F:
    """FOLDER: an output folder that is there → Path."""
    return click.argument("folder", type=click.Path(path_type=Path), callback=_there)(function)


def _there(ctx: click.Context, param: click.Parameter, value: Path) -> Path:
    from exporter.errors import UsageError

    if not value.is_dir():
        what = "is a file" if value.exists() else "is not there"
        raise UsageError(f"The folder {value} {what}. `edgetrim run` and `edgetrim export` make one.")
    return value


def questions_option(function: F) -> F:
    """--questions → Path | None; --per-kind → int."""
    function = click.option(
        "--per-kind", type=click.IntRange(1), default=200, show_default=True, metavar="N",
        help="Questions of each kind, from the embedded set.",
    )(function)  # fmt: skip
    return click.option(
        "--questions", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.jsonl",
        help='Questions with answers: {"image": "…", "question": "…", "answer": "…"} a line. Default: the embedded set.',
    )(function)  # fmt: skip


def baselines_option(function: F) -> F:
    """--baselines → Path."""
    return click.option(
        "--baselines", type=click.Path(file_okay=False, path_type=Path), default=Path("baselines"), show_default=True,
        metavar="FOLDER", help="Where latency baselines are kept; meant to be committed.",
    )(function)  # fmt: skip


def rounds_option(function: F) -> F:
    """--rounds → int."""
    return click.option(
        "--rounds", type=click.IntRange(1), default=9, show_default=True, metavar="N",
        help="Timed rounds, after two to warm up.",
    )(function)  # fmt: skip


def images_options(function: F) -> F:
    """--image, --clip → tuple[Path, ...] each."""
    function = click.option(
        "--clip", "clips", multiple=True, type=click.Path(path_type=Path), metavar="PATH",
        help="A clip: a video, an animated image, a folder of frames, or repeated, its frames. Sampled to the model's frames.",
    )(function)  # fmt: skip
    return click.option(
        "--image", "-i", "images", multiple=True, type=click.Path(path_type=Path), metavar="PATH",
        help="An image; repeat for models that take several.",
    )(function)  # fmt: skip


def threads_option(function: F) -> F:
    """--threads → int | None."""
    return click.option(
        "--threads",
        type=click.IntRange(1, 1024),
        metavar="N",
        help="CPU threads of the runtime. Default: its own choice.",
    )(function)


def frames_option(function: F) -> F:
    """--frames → int."""
    return click.option(
        "--frames", type=click.IntRange(1), default=1, show_default=True, metavar="N",
        help="Images or clip frames per sample; fixed in the graphs.",
    )(function)  # fmt: skip


def image_size_option(function: F) -> F:
    """--image-size → (height, width) | None."""
    return click.option(
        "--image-size", type=ImageSizeType(), metavar="HxW",
        help="Image size in pixels, for families without one of their own; a multiple of a tile's cuts images into tiles. "
        "Default: the family's.",
    )(function)  # fmt: skip


def clip_model_option(function: F) -> F:
    """--clip-model → clip: str | None. Not --clip, which is a clip of images."""
    return click.option(
        "--clip-model", "clip", metavar="FOLDER|HUB_ID",
        help="The CLIP checkpoint that the model's tower came from: for reductions that read the question with CLIP, and models that do not hold their tower.",
    )(function)  # fmt: skip


class QuantizerType(click.ParamType[str]):
    """A quantiser's name, checked where it meets the profile."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from profiles import _schema

        return [CompletionItem(n) for n in _schema.quantizers() if n.startswith(incomplete)]


def quantizer_options(function: F) -> F:
    """--quantizer → str | None; --calibration → str | None, an absolute path."""
    function = click.option(
        "--calibration", type=click.Path(dir_okay=False, exists=True, resolve_path=True), metavar="FILE.jsonl",
        help="Questions whose activations a quantiser looks at, as --questions has them. Default: some about digits.",
    )(function)  # fmt: skip
    return click.option(
        "--quantizer", type=QuantizerType(), metavar="NAME",
        help="How INT4 weights are chosen: rounded (rtn), or calibrated on activations (awq, …). Default: the profile's.",
    )(function)  # fmt: skip


def kv_option(function: F) -> F:
    """--kv → "none", "int8" or None."""
    return click.option(
        "--kv", type=click.Choice(["none", "int8"]),
        help="Keys and values in the cache: as they are, or INT8 with a scale per token and head. Default: the profile's.",
    )(function)  # fmt: skip


def islands_option(function: F) -> F:
    """--islands → "none", "auto" or None."""
    return click.option(
        "--islands", type=click.Choice(["none", "auto"]),
        help="Run the graphs on the calibration questions, and compute in FP32 what comes near FP16's end. Default: the profile's.",
    )(function)  # fmt: skip


def seed_option(function: F) -> F:
    """--seed → int."""
    return click.option(
        "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, metavar="N",
        help="Seed of everything that is drawn.",
    )(function)  # fmt: skip


def signers_option(function: F) -> F:
    """--signers → Path | None"""
    return click.option(
        "--signers", type=click.Path(path_type=Path), metavar="FILE",
        help="Also ask for a signature of one of these: OpenSSH's list of allowed signers.",
    )(function)  # fmt: skip


def devices_options(function: F) -> F:
    """--to → to: tuple[str, ...]; --fleet → Path | None; --ssh-config → config: Path | None; --jobs → int."""
    function = click.option(
        "--jobs", type=click.IntRange(1, 64), default=1, show_default=True, metavar="N", help="Devices at a time."
    )(function)
    function = click.option(
        "--ssh-config", "config", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
        help="An ssh configuration in place of yours: ports, keys, known hosts.",
    )(function)  # fmt: skip
    function = click.option(
        "--fleet", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.toml",
        help='Devices from a file: hosts = ["user@one", "user@two:folder"].',
    )(function)  # fmt: skip
    return click.option(
        "--to", multiple=True, metavar="[USER@]HOST[:FOLDER]",
        help="A device; repeat for several. FOLDER holds one live bundle; default: edgetrim in the home folder.",
    )(function)  # fmt: skip


def job_options(function: F) -> F:
    """CHECKPOINT and every option that says what is to be made of it → job: Job."""

    @functools.wraps(function)
    def with_job(
        checkpoint: str, reductions: tuple[str, ...], profile: str, frames: int, image_size: tuple[int, int] | None,
        clip: str | None, quantizer: str | None, calibration: str | None, kv: Literal["none", "int8"] | None,
        islands: Literal["none", "auto"] | None, **others: Any,
    ) -> Any:  # fmt: skip
        from exporter.job import Job

        job = Job(checkpoint, reductions, profile, frames, image_size, clip, quantizer, calibration, kv, islands)
        return function(job=job, **others)

    options: tuple[Callable[[Any], Any], ...] = (
        checkpoint_argument(required=False), reduce_option, profile_option(), frames_option, image_size_option,
        clip_model_option, quantizer_options, kv_option, islands_option,
    )  # fmt: skip
    for option in reversed(options):
        with_job = option(with_job)
    return cast(F, with_job)
