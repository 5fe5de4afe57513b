"""Bring a bundle to a device: preflight, send what it lacks, build, check and time it there, switch, fetch the record.

Until the switch the old bundle is live; whatever breaks off before it is gone on with by the same command.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from exporter import errors
from exporter._typed import read_json
from exporter.bundle import DEVICES, MANIFEST, Bundle, sha256
from exporter.deploy import preflight
from exporter.deploy.ssh import Connection, Host, Lost, printable
from exporter.errors import EnvironmentMismatch, ExportError, UsageError, VerificationError
from exporter.transfer import Transfer
from exporter.workspace import write_text

Log = Callable[[str], None]

STEPS: dict[str, tuple[str, ...]] = {
    "build": ("build", "--json"),
    "validate": ("validate", "--reference", "recorded", "--json"),
    "bench": ("bench", "--no-compare", "--json"),
    "pack": ("pack", "--json"),
}
"""What is run on the device, in order: arguments of edgetrim there."""
THROUGH = ("copy", "build", "validate", "bench")
"""How far a bundle is checked there before it goes live; each includes those before it."""
ROUNDS = 3
"""How often files that arrive damaged are sent again."""
RECORD_SCHEMA = 1
LARGEST_RECORD = 16 * 2**20


@dataclass(frozen=True)
class Request:
    """What to do on every device.

    through: one of `THROUGH`. not_slower: also time the live bundle there, in turn, and refuse what is slower. wheels: edgetrim's, and of
    what it needs there, to install first. keep: releases that stay there. dry: stop behind the preflight. config: an ssh configuration.
    """

    through: str = "bench"
    not_slower: bool = False
    wheels: tuple[Path, ...] = ()
    keep: int = 2
    dry: bool = False
    config: Path | None = None

    @property
    def steps(self) -> tuple[str, ...]:
        asked = THROUGH[1 : THROUGH.index(self.through) + 1]
        return (*asked, "pack") if asked else ()


@dataclass(frozen=True)
class Outcome:
    """What happened on one device. missing_bytes: what it lacked; live, before: releases; data: as in devices/<host>.json, where `record` says."""

    host: str
    folder: str
    preflight: list[preflight.Row]
    missing_bytes: int
    live: str | None = None
    before: str | None = None
    record: Path | None = None
    data: dict[str, Any] = field(default_factory=dict)
    compared: list[tuple[str, float, float]] = field(default_factory=list)
    """Stage, median of the device's record before, median now, in ms."""


def deploy(
    bundle: Bundle, host: Host, request: Request, log: Log = lambda text: None, stop: threading.Event | None = None
) -> Outcome:
    """Deploy a verified bundle to one device.

    Raises:
        EnvironmentMismatch: it does not fit; all reasons. ExportError and its kinds: what went wrong there; GateError if a gate did.
    """
    log("connecting")
    with Connection(host, request.config, stop) as device, _read(host):
        return _deploy(bundle, device, request, log)


def _deploy(bundle: Bundle, device: Connection, request: Request, log: Log) -> Outcome:
    profile, files = preflight.profile_of(bundle), _sent(bundle)
    builds = preflight.builds_there(bundle, profile)
    log("reading what the device has")
    facts = device.ask("facts")
    look = device.ask("look", files=files)
    missing = int(look["missing_bytes"])
    needed = preflight.need(bundle, missing, builds and "build" in request.steps, bool(request.steps))
    told = {**facts, "edgetrim": facts.get("edgetrim") or (request.wheels and "to be installed") or None}
    rows = preflight.check(told, look, profile, needed)
    label = device.host.label
    if reasons := preflight.reasons(rows):
        raise EnvironmentMismatch(
            f"{label}: the bundle does not fit, nothing was sent. {_listed(reasons)}{_how_to_install(rows)}"
        )
    if request.dry:
        return Outcome(label, device.folder, rows, missing, look.get("live"), look.get("live"))

    try:
        release, facts = _prepare(bundle, device, request, facts, look, files, builds, log)
    except Lost as e:
        raise Lost(f"{e} What was live still is. Run the same command again: it goes on where it was.") from e
    switched = device.ask("switch", release=release, why="deploy")
    record = {
        "schema": RECORD_SCHEMA,
        "host": label,
        "folder": device.folder,
        "release": release,
        "manifest": bundle.digest,
        "through": request.through,
        "utc": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "facts": facts,
        "preflight": [asdict(row) for row in rows],
        **device.ask("evidence", release=release),
    }
    path = record_path(bundle, device.host)
    compared = compare(read_record(path), record)
    path.parent.mkdir(exist_ok=True)
    write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    device.ask("clean", keep=request.keep)
    return Outcome(label, device.folder, rows, missing, release, switched.get("before"), path, record, compared)


def _prepare(
    bundle: Bundle, device: Connection, request: Request, facts: dict[str, Any], look: Mapping[str, Any], files: Mapping[str, Any],
    builds: bool, log: Log,
) -> tuple[str, dict[str, Any]]:  # fmt: skip
    """Everything before the switch: a complete release there, built and checked. Returns its name, and what the device is by now."""
    device.ask("lock", who=_who())
    if request.wheels:
        _install(device, request.wheels, log)
        facts = device.ask("facts")
    release = release_name(bundle, facts, request.through)
    _send(bundle, device, release, files, log)
    for name in request.steps:
        if builds or name != "build":
            _step(device, release, name, STEPS[name], log)
    if request.not_slower and look["live"] not in (None, release):
        against = ("bench", "--against", f"{device.folder}/current", "--json")
        _step(device, release, f"gate against {look['live']}", against, log)
    return release, facts


def _who() -> str:
    return f"{getpass.getuser()}@{socket.gethostname()}"


def rollback(host: Host, config: Path | None = None, stop: threading.Event | None = None) -> dict[str, Any]:
    """Make the release live again that was before the live one. Returns {"before", "live"}."""
    with Connection(host, config, stop) as device, _read(host):
        device.ask("lock", who=_who())
        return {"host": host.label, "folder": device.folder, **device.ask("rollback")}


def release_name(bundle: Bundle, facts: Mapping[str, Any], through: str) -> str:
    """A bundle as checked on one stack: the manifest's hash, and a short one of what may change engines and evidence.

    So a live release is never built anew in place: another stack is another release.
    """
    stack = (
        {key: facts.get(key) for key in ("jetpack", "l4t", "tensorrt", "driver", "edgetrim")}
        if through != "copy"
        else {}
    )
    text = json.dumps({"through": through, **stack}, sort_keys=True)
    return f"{bundle.digest}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


@contextlib.contextmanager
def _read(host: Host) -> Iterator[None]:
    """Answers of a device of another form than the agent's are its fault."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ExportError(f"{host.label} gave an answer that cannot be read ({type(e).__name__}: {e}).") from e


def _sent(bundle: Bundle) -> dict[str, Any]:
    return {name: {"sha256": e["sha256"], "bytes": e["bytes"]} for name, e in bundle.manifest["files"].items()}


def _send(bundle: Bundle, device: Connection, release: str, files: Mapping[str, Any], log: Log) -> None:
    """Send what the device lacks until every hash is right there."""
    paths = {entry["sha256"]: bundle.folder / name for name, entry in files.items()}
    manifest = (bundle.folder / MANIFEST).read_text(encoding="utf-8")
    if hashlib.sha256(manifest.encode()).hexdigest() != bundle.digest:
        raise VerificationError(f"{bundle.folder} was packed again meanwhile. Deploy it again.")
    missing = device.ask("begin", log, release=release, manifest=manifest)["missing"]
    for _ in range(ROUNDS):
        _put(device, missing, paths, log)
        log("checking every hash there")
        missing = device.ask("check", log, release=release)["missing"]
        if not missing:
            return
    raise VerificationError(
        f"{device.host.label}: {len(missing)} file(s) arrived damaged {ROUNDS} times. Check the device's disk and memory."
    )


def _put(device: Connection, missing: list[dict[str, Any]], paths: Mapping[str, Path], log: Log) -> None:
    transfer = Transfer(sum(int(m["bytes"]) - int(m["have"]) for m in missing), "sending", log)
    for entry in missing:
        if (path := paths.get(str(entry["sha256"]))) is None:
            raise ExportError(f"{device.host.label} asks for a file that is not of the bundle. Nothing was switched.")
        device.send(path, entry, transfer.advance)


def _install(device: Connection, wheels: tuple[Path, ...], log: Log) -> None:
    paths = {sha256(path): path for path in wheels}
    entries = {path.name: {"sha256": digest, "bytes": path.stat().st_size} for digest, path in paths.items()}
    _put(device, device.ask("begin_wheels", wheels=entries)["missing"], paths, log)
    log("installing edgetrim there")
    device.ask("install", log)


def _step(device: Connection, release: str, name: str, arguments: tuple[str, ...], log: Log) -> None:
    """One verb there. Its exit code means there what it means here."""
    log(f"{arguments[0]} there")
    done = device.ask(
        "step", lambda text: log(f"{arguments[0]} there, {text}"), release=release, name=name, arguments=arguments
    )
    code = int(done["code"])
    if code:
        words = printable(str(done.get("err") or done.get("out") or "")).strip()
        kinds = {
            kind.exit_code: kind
            for kind in vars(errors).values()
            if isinstance(kind, type) and issubclass(kind, ExportError)
        }
        raise kinds.get(code, ExportError)(
            f"{device.host.label}: `edgetrim {arguments[0]}` there failed with exit code {code}, so the old bundle stays live. It says: "
            f"{words.removeprefix('Error: ')[-1500:] or 'nothing'}"
        )


def _listed(reasons: list[str]) -> str:
    return "".join(f"\n  - {reason}" for reason in reasons)


def _how_to_install(rows: list[preflight.Row]) -> str:
    if all(row.fits is not False for row in rows if row.what == "edgetrim"):
        return ""
    return "\nedgetrim gets there with `--install WHEEL`; `--through copy` runs nothing there."


# --- records ------------------------------------------------------------------------------------------------------------


def record_path(bundle: Bundle, host: Host) -> Path:
    """Where the record of a device lies: beside the bundle's own files, and no part of it."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", host.label)
    if name != host.label:  # two labels never share a file
        name = f"{name}-{hashlib.sha256(host.label.encode()).hexdigest()[:8]}"
    return bundle.folder / DEVICES / f"{name}.json"


def read_record(path: Path) -> dict[str, Any] | None:
    """A record that was fetched before, or None where there is none that can be read."""
    try:
        found = read_json(path, LARGEST_RECORD)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("schema") == RECORD_SCHEMA else None


def records(folder: Path) -> list[dict[str, Any]]:
    """What devices recorded of a bundle, as far as it can be read."""
    found = (read_record(path) for path in sorted((folder / DEVICES).glob("*.json")))
    return [record for record in found if record is not None]


def compare(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """Medians of the stages that both records have, in ms. What a difference means is `bench`'s to say."""
    old, new = medians(before or {}), medians(now)
    return [(stage, old[stage], new[stage]) for stage in new if stage in old]


def medians(record: Mapping[str, Any]) -> dict[str, float]:
    """Stage → median in ms, of a device's record."""
    try:
        stages = next(iter(record["latency"]["variants"].values()))
        return {printable(str(stage)): float(timing["median_ms"]) for stage, timing in stages.items()}
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration):
        return {}


def wheel(path: Path) -> Path:
    """A wheel that is there. Raises UsageError."""
    if not path.is_file() or path.suffix != ".whl":
        raise UsageError(f"{path} is no wheel (.whl).")
    return path
