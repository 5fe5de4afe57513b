"""What edgetrim runs on a device before a bundle goes live there: in which order, what its failures mean, and when it ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.bundle import Bundle
from exporter.deploy import deploy
from exporter.deploy.deploy import Request
from exporter.deploy.ssh import Connection, Lost
from exporter.errors import EnvironmentMismatch, ExportError, GateError, LatencyError
from tests.deploy.conftest import Device, Make, copy, is_live, live, to

STAND_IN = """#!{python}
import json, pathlib, sys
if sys.argv[1] == "--version": print("edgetrim, version 9.9")
else:
    verb, folder = sys.argv[1], pathlib.Path(sys.argv[-1])
    with (folder.parents[1] / "calls").open("a") as f: f.write(verb + ("-against" if "--against" in sys.argv else "") + "\\n")
    if "--against" in sys.argv and (folder.parents[1] / "slow").exists():
        assert (pathlib.Path(sys.argv[sys.argv.index("--against") + 1]) / "manifest.json").is_file()
        sys.stderr.write("Error: prefill is slower.\\n"); sys.exit(4)
    if (folder.parents[1] / f"fail-{{verb}}").exists():
        sys.stderr.write("Error: Too far off.\\n"); sys.exit(3)
    if verb == "bench":
        (folder / "evidence").mkdir(exist_ok=True)
        (folder / "evidence/latency.json").write_text(json.dumps(
            {{"variants": {{"engine_reduced": {{"ttft": {{"median_ms": 12.5}}}}}}}}))
        (folder / "evidence/layers.json").write_text(json.dumps({{"engines": {{"decode": [{{"name": "/lm_head"}}]}}}}))
"""


@pytest.fixture
def stand_in(device: Device) -> Path:
    """An `edgetrim` on the device that only notes its calls; the real one is tested in test_real.py."""

    tool = device.home / "app/venv/bin/edgetrim"
    tool.parent.mkdir(parents=True)
    tool.write_text(STAND_IN.format(python=sys.executable))
    tool.chmod(0o755)
    return device.home / "app"


def whole(folder: Path, device: Device) -> deploy.Outcome:
    return deploy.deploy(Bundle.open(folder), to(device), Request(config=device.config))


def test_everything_is_checked_there_before_the_switch_and_recorded(make: Make, device: Device, stand_in: Path) -> None:
    folder = make("a", {})
    found = whole(folder, device)
    assert (stand_in / "calls").read_text().split() == ["build", "validate", "bench", "pack"]
    assert found.data["facts"]["edgetrim"] == "9.9"
    assert list(found.data["steps"]) == ["build", "validate", "bench", "pack"]
    assert found.data["layers"] == {"engines": {"decode": [{"name": "/lm_head"}]}}
    assert found.compared == []
    assert whole(folder, device).compared == [("ttft", 12.5, 12.5)]
    assert (stand_in / "calls").read_text().split() == ["build", "validate", "bench", "pack"]  # nothing again


def test_what_is_slower_than_the_live_bundle_does_not_go_live(make: Make, device: Device, stand_in: Path) -> None:
    old, new = make("a", {"graphs/x": b"1"}), make("b", {"graphs/x": b"2"})
    request = Request(not_slower=True, config=device.config)
    deploy.deploy(Bundle.open(old), to(device), request)  # nothing is live yet to compare with
    assert "bench-against" not in (stand_in / "calls").read_text()
    (stand_in / "slow").touch()
    with pytest.raises(LatencyError, match=r"`edgetrim bench` there failed with exit code 4.*prefill is slower"):
        deploy.deploy(Bundle.open(new), to(device), request)
    assert (live(device) / "graphs/x").read_bytes() == b"1"
    (stand_in / "slow").unlink()
    deploy.deploy(Bundle.open(new), to(device), request)
    assert (live(device) / "graphs/x").read_bytes() == b"2"
    assert (stand_in / "calls").read_text().split()[-2:] == ["bench-against", "bench-against"]


def test_inspect_lists_the_devices(
    make: Make, device: Device, stand_in: Path, edgetrim: Callable[..., tuple[int, str, str]]
) -> None:
    folder = make("a", {})
    whole(folder, device)
    code, out, err = edgetrim("inspect", folder)
    assert (code, err) == (0, "")
    line = out.rstrip().splitlines()[-1]
    assert line.split()[0].startswith("device:") and line.split()[-2:] == ["12.5", "ms"]


def test_a_gate_that_fails_there_leaves_the_old_bundle_live_and_goes_on_behind_what_was_done(
    make: Make, device: Device, stand_in: Path
) -> None:
    old, new = make("a", {"graphs/x": b"1"}), make("b", {"graphs/x": b"2"})
    copy(old, device)
    (stand_in / "fail-validate").touch()
    with pytest.raises(GateError, match=r"`edgetrim validate` there failed with exit code 3.*Too far off\."):
        whole(new, device)
    assert is_live(old, device)
    (stand_in / "fail-validate").unlink()
    whole(new, device)
    assert (live(device) / "graphs/x").read_bytes() == b"2"
    assert (stand_in / "calls").read_text().split() == ["build", "validate", "validate", "bench", "pack"]


def test_a_command_there_does_not_outlive_the_connection(make: Make, device: Device, stand_in: Path) -> None:
    (stand_in / "venv/bin/edgetrim").write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit\necho $$ > \'' + str(stand_in) + "/pid'\nexec sleep 100\n"
    )
    stop = threading.Event()

    def cut() -> None:
        while not (stand_in / "pid").exists() or not (stand_in / "pid").read_text().strip():
            time.sleep(0.05)
        stop.set()

    thread = threading.Thread(target=cut)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        deploy.deploy(Bundle.open(make("a", {})), to(device), Request(config=device.config), stop=stop)
    thread.join()
    pid = int((stand_in / "pid").read_text())
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            break
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_command_there_does_not_outlive_an_agent_that_is_killed(make: Make, device: Device, stand_in: Path) -> None:
    """As the system does when memory runs out: nobody is left to end what it ran."""
    (stand_in / "venv/bin/edgetrim").write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit\necho $PPID $$ > \''
        + str(stand_in)
        + "/pids'\nexec sleep 100\n"
    )

    def kill() -> None:
        while not (stand_in / "pids").exists() or "\n" not in (stand_in / "pids").read_text():
            time.sleep(0.05)
        os.kill(int((stand_in / "pids").read_text().split()[0]), signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(Lost, match=r"Run the same command again"):
        deploy.deploy(Bundle.open(make("a", {})), to(device), Request(config=device.config))
    thread.join()
    pid = int((stand_in / "pids").read_text().split()[1])
    for _ in range(50):
        if not Path(f"/proc/{pid}").exists():
            break
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()


def test_a_device_without_edgetrim_is_told_how_to_get_it(
    make: Make, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Connection.ask

    def without(self: Connection, op: str, *arguments: object, **more: object) -> object:
        found = asked(self, op, *arguments, **more)  # type: ignore[arg-type]
        return {**found, "edgetrim": None, "python": "3.8.10"} if op == "facts" else found

    monkeypatch.setattr(Connection, "ask", without)
    with pytest.raises(EnvironmentMismatch) as refused:
        whole(make("a", {}), device)
    text = str(refused.value)
    assert "Python: 3.8.10, expected ≥ 3.10" in text
    assert "edgetrim: not installed, expected installed" in text
    assert "`--install WHEEL`" in text
    assert not (device.home / "app").exists()


def small_wheel(folder: Path) -> Path:
    """A wheel whose `edgetrim` says a version and does nothing; its record of hashes is left empty, as pip allows."""
    path = folder / "edgetrim-7.5-py3-none-any.whl"
    info = "edgetrim-7.5.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "small.py",
            "import sys\ndef main():\n    if sys.argv[1:] == ['--version']: print('edgetrim, version 7.5')\n",
        )
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: edgetrim\nVersion: 7.5\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/entry_points.txt", "[console_scripts]\nedgetrim = small:main\n")
        archive.writestr(f"{info}/RECORD", "".join(f"{n},,\n" for n in [*archive.namelist(), f"{info}/RECORD"]))
    return path


@pytest.mark.slow
def test_edgetrim_is_installed_there_from_a_wheel(make: Make, device: Device, tmp_path: Path) -> None:
    folder = make("a", {})
    request = Request(config=device.config, wheels=(small_wheel(tmp_path),))
    try:
        found = deploy.deploy(Bundle.open(folder), to(device), request)
    except ExportError as e:
        if "ensurepip" in str(e):
            pytest.skip("Python's venv is not complete here (`apt install python3-venv`)")
        raise
    assert found.data["facts"]["edgetrim"] == "7.5"
    assert list(found.data["steps"]) == ["build", "validate", "bench", "pack"]
    assert (device.home / "app/venv/bin/edgetrim").is_file()
    broken = tmp_path / "broken-1-py3-none-any.whl"
    broken.write_bytes(b"PK")
    with pytest.raises(ExportError, match=r"pip install .*failed"):
        deploy.deploy(Bundle.open(folder), to(device), Request(config=device.config, wheels=(broken,)))
