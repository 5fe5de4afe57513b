"""What runs on the device while `edgetrim deploy` talks to it: this one file, sent over the connection, never installed.

Python 3.8 and its standard library are enough. Requests are lines of JSON on stdin, `put` has bytes behind its line; answers are
lines of JSON on stdout. It ends with its connection: whatever it runs is killed, its lock falls, nothing half-done is live.

    <dir>/current             a link to the live release, switched by one rename
    <dir>/releases/<id>/      a bundle, complete and verified; `.sent.json` is the manifest as sent, `.steps.json` what was run
    <dir>/incoming/<id>/      a release that is not complete yet
    <dir>/incoming/parts/     files on their way, named by their hash: what is there is not sent again
    <dir>/incoming/gone-<id>/ a release that is being removed
    <dir>/record/history.jsonl  every switch
    <dir>/venv/               edgetrim, where `--install` put it
    <dir>/.lock               held (flock) by whoever changes anything
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import platform
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path, PurePosixPath
from typing import Any

try:
    import fcntl
except ImportError:  # where this file is only read, to be sent
    fcntl = None  # type: ignore[assignment]

HELLO = "edgetrim-agent 1"
ALIVE = {"op": "alive"}
"""Said in answer to a beat."""
IDLE_S = 180.0
"""Without a word from the other side for so long, it is taken for gone."""
BEAT_S = 5.0
LARGEST_LINE = 16 * 2**20
LARGEST_RECORD = 3 * 2**20
"""Bytes of one of `EVIDENCE`; all of them fit a line."""
RELEASE = re.compile(r"[0-9a-f]{64}-[0-9a-f]{8}")
HASH = re.compile(r"[0-9a-f]{64}")
WHEEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+!-]*\.whl")
FIXED = ("graphs/", "job.json")
"""What build, validate, bench and pack leave as it was sent: the rest of a release is compared with that only before they run."""
UNFINISHED = ".unfinished"
"""In venv/ while something is installed there."""
LAST_WORDS = 4000
"""Bytes of a command's output that are sent back, from its end."""
EVIDENCE = ("evidence/validation.json", "evidence/latency.json", "evidence/layers.json", "engines/engines.json")
"""What the stages leave in a release, and a record is made of."""


class Gone(Exception):
    """The other side has left."""


class Refused(Exception):
    """An answer in words. `kind` tells the other side what it is about."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Channel:
    """Two file descriptors that speak lines of JSON, and bytes where a line announces them."""

    def __init__(self, source: int, sink: int) -> None:
        self._source, self._sink, self._buffer = source, sink, bytearray()
        self._heard = time.monotonic()

    def _more(self, timeout: float) -> bool:
        """Read what is there; False if nothing came in time."""
        ready, _, _ = select.select([self._source], [], [], timeout)
        if not ready:
            return False
        chunk = os.read(self._source, 1 << 20)
        if not chunk:
            raise Gone
        self._buffer += chunk
        self._heard = time.monotonic()
        return True

    def request(self) -> dict[str, Any]:
        seen = 0
        while (end := self._buffer.find(b"\n", seen)) < 0:
            seen = len(self._buffer)
            if seen > LARGEST_LINE or not self._more(IDLE_S):
                raise Gone
        found = json.loads(self._take(end + 1))
        return found if isinstance(found, dict) else {}

    def payload(self, count: int) -> bytes:
        while len(self._buffer) < count:
            if not self._more(IDLE_S):
                raise Gone
        return self._take(count)

    def _take(self, count: int) -> bytes:
        found = bytes(self._buffer[:count])
        del self._buffer[:count]
        return found

    def say(self, **message: Any) -> None:
        line = json.dumps(message).encode() + b"\n"
        try:
            while line:
                line = line[os.write(self._sink, line) :]
        except OSError as e:
            raise Gone from e

    def beat(self, text: str) -> None:
        """Say what is going on; the other side answers every one, so that its silence is noticed here."""
        self.say(beat=text)
        while self._more(0):
            pass
        if time.monotonic() - self._heard > IDLE_S:
            raise Gone


class Device:
    """One folder on this device, as one connection sees it."""

    def __init__(self, base: Path, channel: Channel) -> None:
        self.base, self.channel = base, channel
        self.releases, self.incoming, self.record = base / "releases", base / "incoming", base / "record"
        self.current = base / "current"
        self.locked = False
        self._targets: dict[str, list[Path]] = {}
        self._sizes: dict[str, int] = {}

    # --- what is there: changes nothing -------------------------------------------------------------------------------

    def look(self, files: dict[str, Any]) -> dict[str, Any]:
        """How many bytes of these files are not here yet, and which release is live."""
        wanted = {entry["sha256"]: entry["bytes"] for entry in checked(files).values()}
        known = self._known()
        missing = 0
        for digest, size in wanted.items():
            if not any(_whole(path, size) for path in known.get(digest, [])):
                missing += max(0, size - _size(self.incoming / "parts" / digest))
        live = self._live()
        return {"missing_bytes": missing, "live": live, "writable": _writable(self.base)}

    def facts(self) -> dict[str, Any]:
        return facts(self.base)

    # --- sending ------------------------------------------------------------------------------------------------------

    def lock(self, who: str) -> dict[str, Any]:
        self.base.mkdir(parents=True, exist_ok=True)
        handle = os.open(str(self.base / ".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.read(handle, 4096).decode("utf-8", "replace").strip() or "somebody"
            os.close(handle)
            raise Refused("locked", f"{owner} is changing {self.base}") from None
        os.ftruncate(handle, 0)
        os.write(handle, f"{who}, since {_utc()}, process {os.getpid()}".encode())
        self.locked = True  # until this process ends: the descriptor is never closed
        return {}

    def begin(self, release: str, manifest: str) -> dict[str, Any]:
        """Prepare a release; what older ones have of it is linked, not sent. Returns what is missing."""
        tree = self._tree(_release(release))
        tree.mkdir(parents=True, exist_ok=True)
        _write(tree / ".sent.json", manifest)
        known = self._known()
        for name, entry in self._files(tree).items():
            target = tree / name
            if _whole(target, entry["bytes"]):
                continue
            source = next((p for p in known.get(entry["sha256"], []) if _whole(p, entry["bytes"])), None)
            if source is not None:
                _link(source, target)
            elif entry["bytes"] == 0:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.touch()
        return {"missing": self._missing(tree)}

    def put(self, sha256: str, offset: int, length: int) -> dict[str, Any]:
        """Append `length` bytes, which follow, to a file on its way. Complete, it takes its places."""
        content = self.channel.payload(length)
        if sha256 not in self._targets:
            raise Refused("failed", f"nobody asked for {sha256}")
        part = self.incoming / "parts" / sha256
        part.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(str(part), os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            size = os.fstat(handle).st_size
            if size != offset:
                raise Refused("failed", f"{part} has {size} bytes, expected {offset}")
            while content:
                written = os.pwrite(handle, content, size)
                content, size = content[written:], size + written
            complete = size == self._sizes[sha256]
            if complete:
                os.fsync(handle)
        finally:
            os.close(handle)
        if complete:
            first, *others = self._targets.pop(sha256)
            first.parent.mkdir(parents=True, exist_ok=True)
            part.chmod(
                0o444
            )  # shared with later releases by hard links: a stage that replaces a file renames, and breaks none
            os.replace(str(part), str(first))
            for other in others:
                _link(first, other)
        return {"size": size}

    def check(self, release: str) -> dict[str, Any]:
        """Hash every file. What is wrong is removed and returned as missing; without any, the release is complete."""
        tree = self._tree(_release(release))
        for name, entry in self._files(tree).items():
            if _whole(tree / name, entry["bytes"]) and self._sha256(tree / name) != entry["sha256"]:
                (tree / name).unlink()
        missing = self._missing(tree)
        if not missing and tree.parent == self.incoming:
            shutil.copyfile(str(tree / ".sent.json"), str(tree / "manifest.json"))
            for folder in [tree, *(p for p in tree.rglob("*") if p.is_dir())]:
                _sync(folder)
            self.releases.mkdir(exist_ok=True)
            os.replace(str(tree), str(self.releases / release))
            _sync(self.releases)
        return {"missing": missing}

    def _tree(self, release: str) -> Path:
        done = self.releases / release
        return done if done.is_dir() else self.incoming / release

    def _files(self, tree: Path) -> dict[str, dict[str, Any]]:
        """What was sent; of a complete release, without what its stages replace."""
        files = checked(json.loads((tree / ".sent.json").read_text(encoding="utf-8"))["files"])
        return files if tree.parent == self.incoming else {n: e for n, e in files.items() if n.startswith(FIXED)}

    def _missing(self, tree: Path) -> list[dict[str, Any]]:
        """One entry per content: hash, bytes, and how many of them are here."""
        self._targets, self._sizes = {}, {}
        for name, entry in self._files(tree).items():
            if not _whole(tree / name, entry["bytes"]):
                self._targets.setdefault(entry["sha256"], []).append(tree / name)
                self._sizes[entry["sha256"]] = entry["bytes"]
        return [{"sha256": d, "bytes": self._sizes[d], "have": self._have(d)} for d in self._targets]

    def _have(self, digest: str) -> int:
        """Bytes of a file on its way. One that cannot be the beginning of it is removed."""
        part = self.incoming / "parts" / digest
        size = _size(part)
        if size >= self._sizes[digest]:
            part.unlink()
            return 0
        return size

    def _known(self) -> dict[str, list[Path]]:
        """Hash → files of releases that had it when they were sent."""
        found: dict[str, list[Path]] = {}
        for sent in [*self.releases.glob("*/.sent.json"), *self.incoming.glob("*/.sent.json")]:
            try:
                files = checked(json.loads(sent.read_text(encoding="utf-8"))["files"])
            except (OSError, ValueError, KeyError, Refused):
                continue
            for name, entry in files.items():
                found.setdefault(entry["sha256"], []).append(sent.parent / name)
        return found

    def _sha256(self, path: Path) -> str:
        digest, beaten = hashlib.sha256(), time.monotonic()
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
                if time.monotonic() - beaten > BEAT_S:
                    beaten = time.monotonic()
                    self.channel.beat(f"checking {path.name}")
        return digest.hexdigest()

    # --- edgetrim on the device ---------------------------------------------------------------------------------------

    def begin_wheels(self, wheels: dict[str, Any]) -> dict[str, Any]:
        folder = self.incoming / "wheels"
        shutil.rmtree(str(folder), ignore_errors=True)
        folder.mkdir(parents=True)
        self._targets, self._sizes = {}, {}
        for name, entry in wheels.items():
            if not WHEEL.fullmatch(name) or not HASH.fullmatch(entry["sha256"]):
                raise Refused("failed", f"{name!r} is not the name of a wheel")
            self._targets[entry["sha256"]] = [folder / name]
            self._sizes[entry["sha256"]] = int(entry["bytes"])
        return {"missing": [{"sha256": d, "bytes": s, "have": self._have(d)} for d, s in self._sizes.items()]}

    def install(self) -> dict[str, Any]:
        """An environment of our own that sees the system's packages, JetPack's TensorRT among them."""
        venv, unfinished = self.base / "venv", self.base / "venv" / UNFINISHED
        wheels = sorted(str(p) for p in (self.incoming / "wheels").glob("*.whl"))
        if unfinished.exists():  # pip takes what a killed one left for installed
            shutil.rmtree(str(venv))
        venv.mkdir(exist_ok=True)
        unfinished.touch()
        for command in (
            [sys.executable, "-m", "venv", "--system-site-packages", str(venv)],
            [str(venv / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "-q", *wheels],
        ):  # fmt: skip
            done = self._run(command)
            if done["code"] != 0:
                unfinished.unlink()  # what fails by itself leaves what was there before
                raise Refused("failed", f"`{' '.join(command[:4])} …` failed: {done['err'] or done['out']}")
        unfinished.unlink()
        return {}

    def step(self, release: str, name: str, arguments: list[str]) -> dict[str, Any]:
        """Run `edgetrim ARGUMENTS… RELEASE`, unless it was run well on this release before."""
        folder = self.releases / _release(release)
        steps = self._steps(folder)
        if name in steps:
            return dict(steps[name], before=True)
        found = edgetrim(self.base)
        if found is None:
            raise Refused("failed", "edgetrim is not installed on the device")
        began = time.monotonic()
        done = self._run([*found, *arguments, str(folder)])
        done["seconds"] = round(time.monotonic() - began, 1)
        if done["code"] == 0:
            _write(folder / ".steps.json", json.dumps(dict(steps, **{name: {k: done[k] for k in ("code", "seconds")}})))
        return done

    def evidence(self, release: str) -> dict[str, Any]:
        """The JSON that the stages left in a release, and which of them were run."""
        folder = self.releases / _release(release)
        found: dict[str, Any] = {"steps": self._steps(folder)}
        for name in EVIDENCE:
            with contextlib.suppress(OSError, ValueError):
                if _size(folder / name) <= LARGEST_RECORD:
                    found[PurePosixPath(name).stem] = json.loads((folder / name).read_text(encoding="utf-8"))
        return found

    def _steps(self, folder: Path) -> dict[str, Any]:
        try:
            return dict(json.loads((folder / ".steps.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def _run(self, command: list[str]) -> dict[str, Any]:
        """Run a command to its end; it does not outlive this connection."""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True, cwd=str(self.base),
                preexec_fn=_dying_with_agent(),
            )  # fmt: skip
            began = time.monotonic()
            try:
                while True:
                    try:
                        code = process.wait(BEAT_S)
                        break
                    except subprocess.TimeoutExpired:
                        self.channel.beat(f"{time.monotonic() - began:.0f} s")
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise
            return {"code": code, "out": _tail(out), "err": _tail(err)}

    # --- going live ---------------------------------------------------------------------------------------------------

    def switch(self, release: str, why: str) -> dict[str, Any]:
        """Make a complete release the live one, in one rename."""
        before = self._live()
        if not (self.releases / _release(release)).is_dir():
            raise Refused("failed", f"there is no release {release}")
        if before != release:
            beside = self.base / ".current-new"
            with contextlib.suppress(FileNotFoundError):
                beside.unlink()
            beside.symlink_to(Path("releases") / release)
            os.replace(str(beside), str(self.current))
            _sync(self.base)
            self.record.mkdir(exist_ok=True)
            with (self.record / "history.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"utc": _utc(), "release": release, "before": before, "why": why}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        return {"before": before, "live": release}

    def rollback(self) -> dict[str, Any]:
        """Switch back to the release that was live before this one, if it still is what was packed."""
        live = self._live()
        target = self._previous(live)
        if target is None:
            raise Refused("refused", f"no release was live in {self.base} before the present one")
        folder = self.releases / target
        for name, entry in checked(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]).items():
            if not _whole(folder / name, entry["bytes"]) or self._sha256(folder / name) != entry["sha256"]:
                raise Refused("damaged", f"the release before is damaged: {name} is not what its manifest says")
        return self.switch(target, "rollback")

    def clean(self, keep: int) -> dict[str, Any]:
        """Remove what is on its way, and all releases but the `keep` that were live last."""
        shutil.rmtree(str(self.incoming), ignore_errors=True)
        live = self._live()
        last = [live, self._previous(live), *(entry["release"] for entry in reversed(self._history()))]
        kept = list(dict.fromkeys(r for r in last if r))[: max(1, keep)]
        gone = [p.name for p in self.releases.iterdir() if p.name not in kept]
        self.incoming.mkdir(exist_ok=True)
        for name in gone:  # a release that is half removed is none
            os.replace(str(self.releases / name), str(self.incoming / f"gone-{name}"))
        shutil.rmtree(str(self.incoming))
        return {"removed": gone}

    def _live(self) -> str | None:
        try:
            name = os.path.basename(os.readlink(str(self.current)))
        except FileNotFoundError:
            return None
        except OSError as e:
            raise Refused("refused", f"{self.current} is no link of edgetrim's; move it away") from e
        if not RELEASE.fullmatch(name):
            raise Refused("refused", f"{self.current} leads to {name!r}, which is no release; move it away")
        return name

    def _previous(self, live: str | None) -> str | None:
        """The release that was live before `live`, as far as it is still here."""
        history = self._history()
        last = [entry["before"] for entry in reversed(history) if entry["release"] == live]
        last += [entry["release"] for entry in reversed(history)]  # a switch whose line a power cut took
        return next((r for r in last if r and r != live and (self.releases / r).is_dir()), None)

    def _history(self) -> list[dict[str, Any]]:
        found = []
        with contextlib.suppress(OSError):
            for line in (self.record / "history.jsonl").read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(line)
                    if RELEASE.fullmatch(entry["release"]):
                        found.append({"before": None, **entry})
        return found


# --- facts --------------------------------------------------------------------------------------------------------------


def facts(base: Path, root: Path = Path("/")) -> dict[str, Any]:
    """What this device is and has; None where it does not tell. `root`: where its files are, in tests."""
    memory = _meminfo(root)
    disk = shutil.disk_usage(str(_nearest(base)))
    l4t = re.search(r"R(\d+).*?REVISION:\s*([\d.]+)", _text(root / "etc/nv_tegra_release") or "")
    jetpack = _first(_said(["dpkg-query", "-W", "-f", "${Version}\\n", "nvidia-jetpack"]))
    found = edgetrim(base)
    return {
        "host": platform.node(),
        "machine": platform.machine(),
        "system": _os_name(root),
        "python": platform.python_version(),
        "model": (_text(root / "proc/device-tree/model") or "").strip("\0 \n") or None,
        "l4t": f"{l4t[1]}.{l4t[2]}" if l4t else None,
        "jetpack": _version(jetpack) or (_jetpack(f"{l4t[1]}.{l4t[2]}") if l4t else None),
        "tensorrt": _tensorrt(found),
        "driver": _driver(root),
        "power_mode": _power_mode(),
        "memory_total_mib": memory.get("MemTotal"),
        "memory_available_mib": memory.get("MemAvailable"),
        "swap_free_mib": memory.get("SwapFree"),
        "unfragmented_mib": _unfragmented(root),
        "disk_free_mib": disk.free // 2**20,
        "edgetrim": _edgetrim_version(found),
    }


def edgetrim(base: Path) -> list[str] | None:
    """The command that runs edgetrim here: of our own environment, of the PATH, of the user's."""
    own = base / "venv"
    for found in (
        None if (own / UNFINISHED).exists() else str(own / "bin" / "edgetrim"),
        shutil.which("edgetrim"),
        os.path.expanduser("~/.local/bin/edgetrim"),
    ):
        if found and os.access(found, os.X_OK):
            return [found]
    return None


def _edgetrim_version(found: list[str] | None) -> str | None:
    words = (_said([*found, "--version"]) if found else "").split()
    return words[-1] if words else None


def _tensorrt(found: list[str] | None) -> str | None:
    """Of the Python module that edgetrim would import, else of the system's library."""
    beside = os.path.join(os.path.dirname(found[0]), "python") if found else ""
    python = beside if os.access(beside, os.X_OK) else sys.executable
    asked = _said([python, "-c", "import importlib.metadata as m; print(m.version('tensorrt'))"])
    for package in ("libnvinfer11", "libnvinfer10", "libnvinfer8"):
        asked = asked or _said(["dpkg-query", "-W", "-f", "${Version}\\n", package])
    return _version(_first(asked))


def _power_mode() -> str | None:
    found = re.search(r"NV Power Mode:\s*(\S+)", _said(["nvpmodel", "-q"]))
    return found[1] if found else None


def _driver(root: Path) -> str | None:
    found = re.search(r"Module\s+(?:for \S+\s+)?(\d+[\d.]+)", _text(root / "proc/driver/nvidia/version") or "")
    return found[1] if found else None


def _jetpack(l4t: str) -> str | None:
    """JetPack of an L4T release (NVIDIA's archive), where the package that names it is not installed."""
    table = {"35.4": "5.1.2", "35.5": "5.1.3", "35.6": "5.1.4", "36.2": "6.0", "36.3": "6.0", "36.4": "6.2" if l4t >= "36.4.3" else "6.1", "36.5": "6.2.2", "38.2": "7.0", "38.4": "7.1"}  # fmt: skip
    return table.get(".".join(l4t.split(".")[:2]))


def _meminfo(root: Path) -> dict[str, int]:
    """MiB by name."""
    found = re.findall(r"^(\w+):\s+(\d+) kB", _text(root / "proc/meminfo") or "", re.M)
    return {name: int(kib) // 1024 for name, kib in found}


def _unfragmented(root: Path) -> int | None:
    """MiB of free memory in the kernel's largest pieces (4 MiB each with pages of 4 KiB), `lfb` in tegrastats."""
    zones = [line.split() for line in (_text(root / "proc/buddyinfo") or "").splitlines()]
    counts = [int(words[-1]) * 2 ** (len(words) - 5) for words in zones if len(words) > 5 and words[-1].isdigit()]
    return sum(counts) * os.sysconf("SC_PAGE_SIZE") // 2**20 if counts else None


def _os_name(root: Path) -> str | None:
    found = re.search(r'^PRETTY_NAME="?([^"\n]*)', _text(root / "etc/os-release") or "", re.M)
    return found[1] if found else None


def _text(path: Path) -> str | None:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(1 << 20)
    except OSError:
        return None


def _said(command: list[str]) -> str:
    """What a command prints; empty if it fails, hangs or is not there."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace")


def _first(text: str) -> str:
    return next(iter(text.split()), "")


def _version(text: str) -> str | None:
    """ "10.3.0.30-1+cuda12.5" → "10.3.0.30" """
    found = re.match(r"\d+(\.\d+)*", text)
    return found[0] if found else None


# --- files --------------------------------------------------------------------------------------------------------------


def checked(files: Any) -> dict[str, dict[str, Any]]:
    """The files of a manifest, every name inside the bundle. The sender checked them too; a device trusts nobody."""
    for name, entry in files.items():
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\0" in name or not HASH.fullmatch(entry["sha256"]):
            raise Refused("failed", f"the manifest names {name!r}, which is no file of a bundle")
    return {name: {"sha256": entry["sha256"], "bytes": int(entry["bytes"])} for name, entry in files.items()}


def _release(name: str) -> str:
    if not RELEASE.fullmatch(name):
        raise Refused("failed", f"{name!r} is no release")
    return name


def _whole(path: Path, size: int) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size == size


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def _link(source: Path, target: Path) -> None:
    """The same file a second time, in no more room where the disk can."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        target.unlink()
    try:
        os.link(str(source), str(target))
    except OSError as e:
        if e.errno == errno.ENOSPC:
            raise
        shutil.copyfile(str(source), str(target))


def _write(path: Path, text: str) -> None:
    """Write beside, then rename."""
    beside = path.with_name(path.name + ".new")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(str(beside), str(path))


def _sync(folder: Path) -> None:
    handle = os.open(str(folder), os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _nearest(path: Path) -> Path:
    """The path, or the first folder above it that is there."""
    return next(p for p in [path, *path.parents] if p.is_dir())


def _writable(base: Path) -> bool:
    return os.access(str(_nearest(base)), os.W_OK)


def _dying_with_agent() -> Any:
    """What a process does first that is to die with this one, however this one ends; nothing where the system cannot do it."""
    if not sys.platform.startswith("linux"):
        return None
    agent, prctl, set_death_signal = os.getpid(), ctypes.CDLL(None).prctl, 1  # PR_SET_PDEATHSIG

    def ask() -> None:
        prctl(set_death_signal, signal.SIGKILL)
        if os.getppid() != agent:  # it died before
            os.kill(os.getpid(), signal.SIGKILL)

    return ask


def _tail(file: Any) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - LAST_WORDS))
    return str(file.read().decode("utf-8", "replace")).strip()


def _utc() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


# --- the loop -----------------------------------------------------------------------------------------------------------

NEEDS_LOCK = {
    "facts": False, "look": False, "lock": False, "begin": True, "put": True, "check": True, "begin_wheels": True,
    "install": True, "step": True, "evidence": True, "switch": True, "rollback": True, "clean": True,
}  # fmt: skip
"""The requests: methods of `Device`."""


def answer(device: Device, request: dict[str, Any]) -> dict[str, Any]:
    name = str(request.pop("op", ""))
    if name not in NEEDS_LOCK:
        raise Refused("failed", f"the device does not do {name!r}")
    if NEEDS_LOCK[name] and not device.locked:
        raise Refused("failed", f"{name!r} needs the lock")
    found: dict[str, Any] = getattr(device, name)(**request)
    return found


def serve(source: int, sink: int) -> None:
    """Answer until the other side leaves."""
    channel = Channel(source, sink)
    channel.say(hello=HELLO)
    try:
        base = Path(os.path.expanduser(str(channel.request()["dir"])))
        device = Device(Path.home() / base, channel)  # an absolute path stays what it is
        channel.say(ok={"dir": str(device.base)})
        while True:
            request = channel.request()
            if request == ALIVE:
                continue
            try:
                channel.say(ok=answer(device, request))
            except Refused as e:
                channel.say(error=e.kind, message=str(e))
            except OSError as e:
                full = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
                channel.say(
                    error="full" if full else "failed", message=f"{e.strerror or e}: {e.filename or device.base}"
                )
            except (KeyError, TypeError, ValueError) as e:
                channel.say(error="failed", message=f"{type(e).__name__}: {e}")
    except Gone:
        return


def _leave(number: int, frame: Any) -> None:
    raise Gone


if __name__ == "__main__":
    for number in (signal.SIGHUP, signal.SIGTERM):  # what is being run ends too, in any case
        signal.signal(number, _leave)
    serve(0, 1)
