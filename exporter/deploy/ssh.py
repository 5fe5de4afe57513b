"""A connection to a device: the system's `ssh`, and on its other end `agent.py`, which is sent and runs until the connection ends.

What a user says never becomes part of a command line there: everything but the host is JSON on the agent's stdin.
"""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from exporter.deploy import agent
from exporter.errors import EnvironmentMismatch, ExportError, UsageError, VerificationError

Log = Callable[[str], None]

OPTIONS = (
    "BatchMode=yes",  # keys only: nobody is asked for a password
    "StrictHostKeyChecking=yes",
    "ConnectTimeout=15",
    "ServerAliveInterval=15",
    "ServerAliveCountMax=4",
    "ClearAllForwardings=yes",
    "ForwardAgent=no",
    "PermitLocalCommand=no",
    "RemoteCommand=none",
    "RequestTTY=no",
)
"""Before those of the user's configuration, which cannot change them."""
BOOTSTRAP = 'python3 -I -c \'import sys; f = sys.stdin.buffer; exec(compile(f.read(int(f.readline())), "edgetrim-agent", "exec"))\''
"""The whole command line on the device, the same for everybody."""
SILENCE_S = 120.0
CHUNK = 2**20
WINDOW = 8
"""Chunks on their way before an answer is awaited, so that a slow line is kept busy; what a cut costs at most."""
LARGEST_GREETING = 64 * 1024
"""Bytes that a login shell may print before the agent speaks."""
FOLDER = "edgetrim"
"""Where a host names no folder: in the home folder there."""

HOST = re.compile(r"(?:(?P<user>[^\s@:/-][^\s@:/]*)@)?(?P<host>[A-Za-z0-9_%][A-Za-z0-9._%+-]*|\[[0-9A-Fa-f:.]+(?:%\w+)?\])(?::(?P<dir>.+))?", re.S)  # fmt: skip


class Lost(ExportError):
    """The connection broke off."""


@dataclass(frozen=True)
class Host:
    """A device as typed: user, name (or an alias of the ssh configuration, or an address in brackets) and folder there."""

    destination: str
    folder: str = FOLDER

    @classmethod
    def parse(cls, text: str) -> Host:
        """`[user@]host[:folder]`. Raises UsageError."""
        found = HOST.fullmatch(text)
        if found is None or "\0" in text:
            raise UsageError(
                f"{text!r} is not a device. Expected [USER@]HOST[:FOLDER], as in nvidia@orin or nvidia@[fe80::1]:apps/vlm; a port "
                "or anything else belongs into the ssh configuration."
            )
        name = found["host"].strip("[]")
        return cls(f"{found['user']}@{name}" if found["user"] else name, found["dir"] or FOLDER)

    @property
    def label(self) -> str:
        return self.destination if self.folder == FOLDER else f"{self.destination}:{self.folder}"


def printable(text: str) -> str:
    """What a device says, without what would steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


class Connection:
    """An agent on a device. A context manager: nothing happens before `__enter__`; when it ends, so does the agent.

    Args:
        config: an ssh configuration to use instead of the user's.
        stop: set by whoever wants it to end from another thread.
    """

    def __init__(self, host: Host, config: Path | None = None, stop: threading.Event | None = None) -> None:
        self.host, self._config, self._stop = host, config, stop or threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None
        self._buffer = b""
        self.folder = ""
        """The folder there, absolute."""

    def __enter__(self) -> Connection:
        if sys.platform == "win32":  # there `select` does not wait for pipes
            raise EnvironmentMismatch("Deploying works from Linux and macOS. On Windows run it in WSL.")
        command = ["ssh", *(word for option in OPTIONS for word in ("-o", option))]
        if self._config is not None:
            command += ["-F", str(self._config)]
        self._said = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                [*command, "--", self.host.destination, BOOTSTRAP],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, start_new_session=True, bufsize=0,
            )  # fmt: skip
            source = Path(agent.__file__).read_bytes()
            self._send(f"{len(source)}\n".encode() + source)
            self._greeting()
            self._send(json.dumps({"dir": self.host.folder}).encode() + b"\n")
            self.folder = str(self._answer(lambda text: None)["dir"])
        except FileNotFoundError as e:
            self.__exit__(None, None, None)
            raise EnvironmentMismatch("Deploying needs OpenSSH's `ssh`: `sudo apt install openssh-client`.") from e
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if (process := self._process) is not None:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
            try:
                process.wait(2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            self._process = None
        if self._said is not None:
            self._said.close()

    def ask(self, op: str, log: Log = lambda text: None, **arguments: Any) -> dict[str, Any]:
        """One request and its answer. Raises what the device says is wrong, or Lost."""
        self._send(json.dumps({"op": op, **arguments}).encode() + b"\n")
        return self._answer(log)

    def send(self, path: Path, entry: Mapping[str, Any], advance: Callable[[int], None]) -> None:
        """Send what is missing of a file: entry has its "sha256", its "bytes", and how many the device "have".

        Raises:
            VerificationError: it has changed here meanwhile.
        """
        offset, size = int(entry["have"]), int(entry["bytes"])
        waiting: deque[int] = deque()
        with path.open("rb") as file:
            file.seek(offset)
            while offset < size:
                content = file.read(min(CHUNK, size - offset))
                if not content:
                    raise VerificationError(f"{path} became shorter while it was sent. Pack the bundle again.")
                request = {"op": "put", "sha256": entry["sha256"], "offset": offset, "length": len(content)}
                self._send(json.dumps(request).encode() + b"\n")
                self._send(content)
                offset += len(content)
                waiting.append(len(content))
                if len(waiting) >= WINDOW:
                    self._answer(lambda text: None)
                    advance(waiting.popleft())
        while waiting:
            self._answer(lambda text: None)
            advance(waiting.popleft())

    def _send(self, content: bytes) -> None:
        process = self._running()
        assert process.stdin is not None
        view = memoryview(content)
        try:
            while view:
                view = view[process.stdin.write(view) or 0 :]
        except OSError as e:
            raise self._lost() from e

    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "not entered"
        return self._process

    def _more(self) -> None:
        process, began = self._running(), time.monotonic()
        assert process.stdout is not None
        while not select.select([process.stdout], [], [], 0.5)[0]:
            if self._stop.is_set():
                raise KeyboardInterrupt
            if time.monotonic() - began > SILENCE_S:
                raise Lost(f"{self.host.label} has said nothing for {SILENCE_S:.0f} s. Try again.")
        chunk = os.read(process.stdout.fileno(), 1 << 20)
        if not chunk:
            raise self._lost()
        self._buffer += chunk

    def _greeting(self) -> None:
        """Wait for the agent; what the login shell prints before it is not ours."""
        hello = b'{"hello": "' + agent.HELLO.encode() + b'"}\n'
        while hello not in self._buffer:
            if len(self._buffer) > LARGEST_GREETING:
                raise ExportError(f"{self.host.label} printed {LARGEST_GREETING // 1024} KiB, but no agent spoke.")
            self._more()
        self._buffer = self._buffer.split(hello, 1)[1]

    def _answer(self, log: Log) -> dict[str, Any]:
        while True:
            while b"\n" not in self._buffer:
                if len(self._buffer) > agent.LARGEST_LINE:
                    raise ExportError(f"{self.host.label} gave an answer that does not end.")
                self._more()
            line, self._buffer = self._buffer.split(b"\n", 1)
            try:
                found = json.loads(line)
                if "beat" in found:
                    log(printable(str(found["beat"])))
                    self._send(json.dumps(agent.ALIVE).encode() + b"\n")
                elif "ok" in found:
                    return dict(found["ok"])
                else:
                    raise self._refused(str(found["error"]), printable(str(found["message"])))
            except (ValueError, KeyError, TypeError) as e:
                raise ExportError(f"{self.host.label} gave an answer that cannot be read ({type(e).__name__}).") from e

    def _refused(self, kind: str, message: str) -> ExportError:
        name = self.host.label
        return {
            "locked": ExportError(f"{name}: {message}. Wait for it and run the same command again."),
            "full": ExportError(f"{name}: no room left: {message}. Free some and run the same command again."),
            "damaged": VerificationError(f"{name}: {message}. Deploy that bundle again."),
        }.get(kind, ExportError(f"{name}: {message}."))

    def _lost(self) -> ExportError:
        """What ssh itself said when it ended."""
        process = self._running()
        try:
            code: int | None = process.wait(5)
        except subprocess.TimeoutExpired:
            code = None
        assert self._said is not None
        self._said.seek(0)
        lines = [w.strip() for w in printable(self._said.read(64 * 1024).decode("utf-8", "replace")).splitlines()]
        words = " ".join(w for w in lines if w and not w.startswith("@"))[-600:]
        if code == 127:
            return EnvironmentMismatch(
                f"{self.host.label} has no python3, which deploying needs: `sudo apt install python3`."
            )
        if "host key" in words.lower():
            return ExportError(
                f"{self.host.label}: its host key is not the known one, so nothing was sent. ssh says: {words} Compare the key's "
                "fingerprint on the device itself, then connect once with `ssh` or edit known_hosts."
            )
        return Lost(f"{self.host.label}: the connection is gone. ssh says: {words or 'nothing'}")
