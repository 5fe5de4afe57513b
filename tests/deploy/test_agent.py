"""The helper that runs on the device: what it reads there, and that it trusts nobody."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from exporter.deploy import agent
from exporter.deploy.agent import Channel, Device, Refused, answer

SHA = hashlib.sha256(b"1").hexdigest()
RELEASE = f"{SHA}-{'0' * 8}"


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path / "app", Channel(os.open(os.devnull, os.O_RDONLY), os.open(os.devnull, os.O_WRONLY)))


def manifest(*names: str) -> str:
    return json.dumps({"files": {name: {"sha256": SHA, "bytes": 1} for name in names}})


def test_it_is_python_3_8() -> None:
    """JetPack 5 has that one; its preflight then says which Python edgetrim needs."""
    ast.parse(Path(agent.__file__).read_text(), feature_version=(3, 8))
    imported = {n.name if isinstance(n, ast.alias) else n.module for node in ast.walk(ast.parse(Path(agent.__file__).read_text()))
                for n in (node.names if isinstance(node, ast.Import) else [node] if isinstance(node, ast.ImportFrom) else [])}  # fmt: skip
    assert not {str(name).split(".")[0] for name in imported} & {"exporter", "numpy", "click"}


@pytest.mark.skipif(shutil.which("python3.8") is None, reason="there is no Python 3.8")
def test_python_3_8_runs_it() -> None:
    ran = subprocess.run(
        ["python3.8", agent.__file__], input=b'{"dir": "x"}\n{"op": "facts"}\n', capture_output=True, check=False
    )
    if b"python3.8: command not found" in ran.stderr:
        pytest.skip("python3.8 is a name without an interpreter")
    hello, opened, facts = map(json.loads, ran.stdout.splitlines())
    assert (hello["hello"], opened["ok"]["dir"]) == (agent.HELLO, str(Path.home() / "x"))
    assert facts["ok"]["python"].startswith("3.8.")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "a\0b"])
def test_names_that_lead_out_are_refused(device: Device, name: str) -> None:
    device.lock("test")
    for request in (
        {"op": "begin", "release": RELEASE, "manifest": manifest(name)},
        {"op": "look", "files": json.loads(manifest(name))["files"]},
    ):
        with pytest.raises(Refused, match="no file of a bundle"):
            answer(device, dict(request))


@pytest.mark.parametrize("release", ["../x", "x", "", f"{RELEASE}/../..", RELEASE.upper()])
@pytest.mark.parametrize("op", ["check", "evidence", "switch", "begin", "step"])
def test_releases_have_names_of_one_form(device: Device, op: str, release: str) -> None:
    device.lock("test")
    more: dict[str, dict[str, Any]] = {
        "switch": {"why": "x"}, "begin": {"manifest": manifest()}, "step": {"name": "build", "arguments": []},
    }  # fmt: skip
    with pytest.raises(Refused, match="is no release"):
        answer(device, {"op": op, "release": release, **more.get(op, {})})


@pytest.mark.parametrize("name", ["../x.whl", "-r.whl", "x.txt", "a b.whl", "a/b.whl"])
def test_wheels_have_names_of_wheels(device: Device, name: str) -> None:
    device.lock("test")
    with pytest.raises(Refused, match="is not the name of a wheel"):
        answer(device, {"op": "begin_wheels", "wheels": {name: {"sha256": SHA, "bytes": 1}}})


def test_nothing_changes_without_the_lock_and_only_known_things_are_done(device: Device) -> None:
    for op, locked in agent.NEEDS_LOCK.items():
        assert hasattr(device, op)
        if locked:
            with pytest.raises(Refused, match="needs the lock"):
                answer(device, {"op": op})
    for op in ("__init__", "_run", "channel", "", "base"):
        with pytest.raises(Refused, match="does not do"):
            answer(device, {"op": op})


def test_a_link_in_the_place_of_a_file_is_not_followed(device: Device, tmp_path: Path) -> None:
    """Neither as a file that is there, nor as one that is on its way."""
    device.lock("test")
    (tmp_path / "outside").write_bytes(b"1")
    tree = device.incoming / RELEASE
    tree.mkdir(parents=True)
    (tree / "a").symlink_to(tmp_path / "outside")
    assert answer(device, {"op": "begin", "release": RELEASE, "manifest": manifest("a")})["missing"]
    (device.incoming / "parts").mkdir()
    (device.incoming / "parts" / SHA).symlink_to(tmp_path / "victim")
    read, write = os.pipe()
    os.write(write, b"1")
    device.channel = Channel(read, write)
    with pytest.raises(OSError, match="symbolic links"):
        answer(device, {"op": "put", "sha256": SHA, "offset": 0, "length": 1})
    assert not (tmp_path / "victim").exists()


class Killed(BaseException):
    pass


def test_a_release_that_is_half_removed_is_none(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it removes: were it still a release, deploying it again would add nothing but what is sent to what is left of it."""
    old, new = f"{SHA}-{'1' * 8}", f"{SHA}-{'2' * 8}"
    device.lock("test")
    for release in (old, new):
        fake(device.releases / release, {"graphs/x": "1", "engines/y": "1", ".steps.json": "{}"})
        answer(device, {"op": "switch", "release": release, "why": "test"})

    def killed(path: str, ignore_errors: bool = False) -> None:
        for left in Path(path).rglob("y"):
            left.unlink()
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            answer(device, {"op": "clean", "keep": 1})
    assert [p.name for p in device.releases.iterdir()] == [new]
    assert answer(device, {"op": "clean", "keep": 1}) == {"removed": []}
    assert not device.incoming.exists()


def test_an_environment_that_is_half_installed_is_made_anew(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip takes a package for installed of which a killed one has written the metadata first."""
    device.lock("test")
    tool = device.base / "venv/bin/edgetrim"
    ran: list[list[str]] = []

    def run(self: Device, command: list[str], fails: bool) -> dict[str, Any]:
        ran.append(command)
        tool.parent.mkdir(exist_ok=True)
        tool.touch(0o755)
        if fails:
            raise Killed
        return {"code": 0, "out": "", "err": ""}

    monkeypatch.setattr(Device, "_run", lambda self, command: run(self, command, "pip" in command))
    with pytest.raises(Killed):
        answer(device, {"op": "install"})
    assert tool.exists()
    assert agent.edgetrim(device.base) != [str(tool)]
    left = device.base / "venv/left"
    left.touch()
    monkeypatch.setattr(Device, "_run", lambda self, command: run(self, command, False))
    answer(device, {"op": "install"})
    assert not left.exists()
    assert agent.edgetrim(device.base) == [str(tool)]
    assert ran[0][1:3] == ["-m", "venv"]


def fake(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_facts_of_a_jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files and words as JetPack 6.2 has them."""
    root = fake(
        tmp_path / "root",
        {
            "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: …\n",
            "etc/os-release": 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 22.04.5 LTS"\n',
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
            "proc/meminfo": "MemTotal:        7802920 kB\nMemFree:          200000 kB\nMemAvailable:    5242880 kB\nSwapFree: 1048576 kB\n",
            "proc/buddyinfo": "Node 0, zone      DMA      1 0 0 0 0 0 0 0 0 1 3\nNode 0, zone   Normal      9 9 9 9 9 9 9 9 9 9 5\n",
            "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build  (buildbrain@x)\n",
        },
    )
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name, script in {
        "dpkg-query": 'case "$4" in nvidia-jetpack) echo 6.2+b77;; libnvinfer10) echo 10.3.0.30-1+cuda12.5;; *) exit 1;; esac',
        "nvpmodel": "echo 'NV Power Mode: MAXN_SUPER'; echo 2",
    }.items():
        (bin_ / name).write_text(f"#!/bin/sh\n{script}\n")
        (bin_ / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    found = agent.facts(tmp_path / "not" / "there", root)
    assert found | {"host": "", "machine": "", "python": "", "disk_free_mib": 0} == {
        "host": "", "machine": "", "python": "", "system": "Ubuntu 22.04.5 LTS",
        "model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        "l4t": "36.4.3", "jetpack": "6.2", "tensorrt": "10.3.0.30", "driver": "540.4.0", "power_mode": "MAXN_SUPER",
        "memory_total_mib": 7802920 // 1024, "memory_available_mib": 5120, "swap_free_mib": 1024,
        "unfragmented_mib": 8 * 4, "disk_free_mib": 0, "edgetrim": None,
    }  # fmt: skip


def test_facts_where_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    found = agent.facts(tmp_path, tmp_path)
    told = {name for name, value in found.items() if value is not None}
    assert told == {"host", "machine", "python", "disk_free_mib"}


@pytest.mark.parametrize(
    ("l4t", "jetpack"), [("36.4.0", "6.1"), ("36.4.3", "6.2"), ("36.4.7", "6.2"), ("35.5.0", "5.1.3"), ("99.1", None)]
)
def test_jetpack_of_l4t(l4t: str, jetpack: str | None) -> None:
    assert agent._jetpack(l4t) == jetpack
