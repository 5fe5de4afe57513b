"""A real sshd on loopback as the device: its own keys and configuration, an unprivileged port, nothing of the user's is touched."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from exporter.bundle import DEVICES, MANIFEST, SCHEMA, Bundle, contents
from exporter.deploy import deploy
from exporter.deploy.deploy import Request
from exporter.deploy.ssh import Host
from exporter.job import Job
from exporter.workspace import Workspace

Make = Callable[..., Path]
COPY = "copy"
"""How far a deployment goes that runs nothing there."""
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


@dataclass(frozen=True)
class Device:
    """A running sshd. `home` is a folder for what is deployed; `config` what `--ssh-config` takes, the host is called `device`."""

    root: Path
    port: int
    config: Path
    home: Path

    def configure(self, port: int, known_hosts: Path | None = None) -> Path:
        """An ssh configuration that goes to another port (a proxy's), or knows other hosts."""
        path = self.root / f"config-{port}-{known_hosts.name if known_hosts else 'known'}"
        path.write_text(
            f"Host device other\n  HostName 127.0.0.1\n  HostKeyAlias device\n  Port {port}\n  User {getpass.getuser()}\n"
            f"  IdentityFile {self.root}/user\n  IdentitiesOnly yes\n  UserKnownHostsFile {known_hosts or self.root / 'known_hosts'}\n"
            "  GlobalKnownHostsFile /dev/null\n  KexAlgorithms curve25519-sha256\n"
        )
        return path


def _key(path: Path) -> str:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)], check=True)
    return " ".join(path.with_suffix(".pub").read_text().split()[:2])


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextlib.contextmanager
def running(root: Path, limit_file_bytes: int | None = None) -> Iterator[Device]:
    """sshd until the block ends. limit_file_bytes: the system lets no process under it write a longer file."""
    if SSHD is None or shutil.which("ssh") is None:
        pytest.skip("OpenSSH's sshd is not installed (`apt install openssh-server`)")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where sshd as root separates privileges
    root.mkdir(parents=True)
    (root / "authorized").write_text(_key(root / "user") + "\n")
    port = _free_port()
    (root / "known_hosts").write_text(f"device {_key(root / 'host')}\n")
    (root / "home").mkdir()
    (root / "bin").mkdir()  # a device's PATH: Python, no edgetrim
    (root / "bin/python3").symlink_to(getattr(sys, "_base_executable", sys.executable))
    (root / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {root}/host\nAuthorizedKeysFile {root}/authorized\nPidFile none\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n"
        f"MaxStartups 50\nSetEnv PATH={root}/bin:/usr/bin:/bin EDGETRIM_TEST_DEVICE={root}\n"
    )

    command = [SSHD, "-D", "-e", "-f", str(root / "sshd_config")]
    if limit_file_bytes is not None:
        command = ["sh", "-c", f'ulimit -f {limit_file_bytes // 512} && exec "$@"', "sh", *command]
    sockets = tempfile.mkdtemp(prefix="ssh-")  # a socket's path may have 107 characters only
    log = (root / "log").open("wb")
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if process.poll() is not None:
                pytest.skip(f"sshd does not run here: {(root / 'log').read_text()[-300:]}")
            time.sleep(0.05)
        config = Device(root, port, Path(), root / "home").configure(port)
        # Sessions share one connection, which spares a handshake each; tests that cut connections have a configuration of their own.
        config.write_text(
            f"{config.read_text()}  ControlMaster auto\n  ControlPath {sockets}/%C\n  ControlPersist 60\n"
        )
        yield Device(root, port, config, root / "home")
    finally:
        if (config := root / f"config-{port}-known").exists():
            subprocess.run(["ssh", "-F", str(config), "-O", "exit", "device"], capture_output=True, check=False)
        shutil.rmtree(sockets)
        process.terminate()
        process.wait()
        log.close()


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    with running(tmp_path_factory.mktemp("sshd") / "sshd") as device:
        yield device


@pytest.fixture
def device(sshd: Device, tmp_path: Path) -> Device:
    """The session's sshd with a home of this test's own."""
    home = tmp_path / "home"
    home.mkdir()
    return Device(sshd.root, sshd.port, sshd.config, home)


class Proxy:
    """Passes one connection on to a port and cuts it after so many bytes towards the server."""

    def __init__(self, port: int, cut_after: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.passed = 0
        self._upstream, self._left = port, cut_after
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.close()
        self._thread.join(5)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            client, _ = self._listener.accept()
            server = socket.create_connection(("127.0.0.1", self._upstream))
            back = threading.Thread(target=self._pump, args=(server, client), daemon=True)
            back.start()
            while self._left > 0 and (chunk := client.recv(min(65536, self._left))):
                server.sendall(chunk)
                self._left -= len(chunk)
                self.passed += len(chunk)
            for s in (client, server):
                with contextlib.suppress(OSError):
                    s.shutdown(socket.SHUT_RDWR)
                s.close()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(65536):
                sink.sendall(chunk)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes a bundle that deploys, though its graphs are bytes: `make("a", {"graphs/llm.data": b"…"})`."""
    from tests.runtime.tiny import export

    def bundle(name: str, files: dict[str, bytes]) -> Path:
        folder = tmp_path / name
        (folder / "graphs").mkdir(parents=True)
        export(folder / "graphs")
        for file, content in files.items():
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        Job("embedded", (), "cpu_fp32").save(Workspace(folder))
        manifest = {"schema": SCHEMA, "edgetrim": "0", "opset": 21, "versions": {}, "files": contents(folder)}
        (folder / MANIFEST).write_text(json.dumps(manifest))
        return folder

    return bundle


def to(device: Device, folder: str = "app") -> Host:
    return Host("device", str(device.home / folder))


def copy(folder: Path, device: Device, where: str = "app", **request: object) -> deploy.Outcome:
    return deploy.deploy(Bundle.open(folder), to(device, where), Request(COPY, config=device.config, **request))  # type: ignore[arg-type]


def live(device: Device, where: str = "app") -> Path:
    return device.home / where / "current"


def is_live(folder: Path, device: Device, where: str = "app") -> bool:
    """Whether the live release has just the files of that bundle, byte for byte."""
    there = live(device, where)
    return (there / MANIFEST).is_file() and {
        p.relative_to(there).as_posix(): p.read_bytes()
        for p in there.rglob("*")
        if p.is_file() and not p.name.startswith(".")
    } == {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.relative_to(folder).parts[0] != DEVICES
    }
