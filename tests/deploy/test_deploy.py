"""Deploying to a real sshd: what arrives, what is live, and what is left when anything goes wrong at any point.
What runs there before the switch: test_there.py."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter import signature
from exporter.bundle import DEVICES, MANIFEST, SIGNATURE, Bundle, sha256
from exporter.cli import main
from exporter.deploy import deploy
from exporter.deploy.deploy import Request
from exporter.deploy.ssh import BOOTSTRAP, Connection, Host
from exporter.errors import EnvironmentMismatch, ExportError, UsageError, VerificationError
from tests.deploy.conftest import COPY, Device, Make, Proxy, copy, is_live, live, running, to

LARGE = bytes(random.Random(0).randbytes(3 * 2**20))


def test_a_bundle_goes_live(make: Make, device: Device) -> None:
    first = make("a", {"graphs/llm.data": LARGE, "graphs/empty": b""})
    found = copy(first, device)
    assert is_live(first, device)
    assert (found.before, found.missing_bytes) == (None, sum(p.stat().st_size for p in first.rglob("*") if p.is_file() and p.name != MANIFEST and DEVICES not in p.parts))  # fmt: skip
    assert os.readlink(live(device)) == f"releases/{found.live}"
    assert found.record is not None
    assert json.loads(found.record.read_text())["manifest"] == sha256(first / MANIFEST)
    Bundle.open(first)  # records of devices are no part of it


def test_only_what_is_new_is_sent_and_older_releases_share_the_rest(make: Make, device: Device) -> None:
    first = make("a", {"graphs/llm.data": LARGE, "graphs/x": b"one"})
    second = make("b", {"graphs/moved.data": LARGE, "graphs/x": b"two"})
    copy(first, device)
    found = copy(second, device)
    assert found.missing_bytes == 3
    assert is_live(second, device)
    assert (live(device) / "graphs/moved.data").stat().st_nlink == 2
    assert found.before is not None
    assert (device.home / "app/releases" / found.before / "graphs/llm.data").read_bytes() == LARGE


def test_the_same_again_sends_and_changes_nothing(make: Make, device: Device) -> None:
    first = make("a", {"graphs/llm.data": LARGE})
    before = copy(first, device)
    again = copy(first, device)
    assert (again.missing_bytes, again.live, again.before) == (0, before.live, before.live)
    assert len((device.home / "app/record/history.jsonl").read_text().splitlines()) == 1


def test_rollback_and_forward_again(make: Make, device: Device) -> None:
    first, second = make("a", {"graphs/x": b"one"}), make("b", {"graphs/x": b"two"})
    copy(first, device)
    copy(second, device)
    deploy.rollback(to(device), device.config)
    assert is_live(first, device)
    deploy.rollback(to(device), device.config)
    assert is_live(second, device)


def test_rollback_without_a_release_before(make: Make, device: Device) -> None:
    copy(make("a", {}), device)
    with pytest.raises(ExportError, match="no release was live"):
        deploy.rollback(to(device), device.config)


def test_rollback_to_a_damaged_release_is_refused(make: Make, device: Device) -> None:
    first, second = make("a", {"graphs/x": b"one"}), make("b", {"graphs/x": b"two"})
    old = copy(first, device).live
    copy(second, device)
    damaged = device.home / f"app/releases/{old}/graphs/x"
    damaged.chmod(0o644)
    damaged.write_bytes(b"0ne")
    with pytest.raises(VerificationError, match="graphs/x is not what its manifest says"):
        deploy.rollback(to(device), device.config)
    assert is_live(second, device)


@pytest.mark.slow
def test_old_releases_are_removed_but_never_the_live_one_and_the_one_before(make: Make, device: Device) -> None:
    bundles = [make(f"b{i}", {"graphs/x": str(i).encode()}) for i in range(3)]
    for bundle in bundles:
        copy(bundle, device)
    assert len(list((device.home / "app/releases").iterdir())) == 2
    deploy.rollback(to(device), device.config)
    assert is_live(bundles[1], device)


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 12))])
def test_a_connection_cut_anywhere_leaves_the_old_bundle_live_and_goes_on(
    make: Make, device: Device, seed: int
) -> None:
    """The proxy cuts after some bytes, on any message; then the same command brings only the rest."""
    old = make("old", {"graphs/llm.data": b"old"})
    new = make("new", {f"graphs/part{i}.data": random.Random(i).randbytes(4_300_000) for i in range(2)})
    copy(old, device)
    rng, whole = random.Random(seed), 8_600_000
    cut = rng.choice([rng.randrange(60_000), rng.randrange(60_000, whole)])
    with Proxy(device.port, cut) as proxy:
        with pytest.raises(
            ExportError, match=r"(What was live still is\. Run the same command again|connection is gone)"
        ):
            deploy.deploy(Bundle.open(new), to(device), Request(COPY, config=device.configure(proxy.port)))
    assert is_live(old, device)
    again = copy(new, device)
    assert is_live(new, device)
    if cut > 5_000_000:  # at least one chunk was answered before
        assert again.missing_bytes < whole - 4_000_000
    assert not (device.home / "app/incoming").exists()


def test_a_full_disk_leaves_the_old_bundle_live(make: Make, tmp_path: Path) -> None:
    """No process of this sshd may write a file longer than a mebibyte: the system's answer comes in the middle of a file."""
    old, new = make("old", {"graphs/x": b"old"}), make("new", {"graphs/llm.data": LARGE})
    with running(tmp_path / "sshd", limit_file_bytes=2**20) as device:
        copy(old, device)
        with pytest.raises(ExportError, match=r"no room left: .*Free some and run the same command again"):
            copy(new, device)
        assert is_live(old, device)


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_is_really_full(make: Make, device: Device) -> None:
    disk = device.home / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        old = make("old", {"graphs/x": b"old"})
        new = make("new", {"graphs/llm.data": random.Random(1).randbytes(5 * 2**20)})
        copy(old, device, "disk/app")
        with contextlib.suppress(OSError), (disk / "fill").open("wb", buffering=0) as fill:
            while shutil.disk_usage(disk).free > 3 * 2**20:
                fill.write(bytes(2**16))
        with pytest.raises(EnvironmentMismatch, match=r"free disk: \d MiB, expected ≥ 21 MiB"):
            copy(new, device, "disk/app")
        # And where it fills up only after preflight has looked:
        with Connection(to(device, "disk/app"), device.config) as there:
            there.ask("lock", who="test")
            release = deploy.release_name(Bundle.open(new), {}, COPY)
            with pytest.raises(ExportError, match="no room left"):
                deploy._send(Bundle.open(new), there, release, deploy._sent(Bundle.open(new)), lambda text: None)
        assert is_live(old, device, "disk/app")
        (disk / "fill").unlink()
        copy(new, device, "disk/app")
        assert is_live(new, device, "disk/app")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_wrong_host_key_is_refused_before_anything_is_sent(make: Make, device: Device) -> None:
    wrong = device.root / "wrong_hosts"
    key = (device.root / "user.pub").read_text().split()[:2]
    wrong.write_text(f"device {' '.join(key)}\n")
    for known in (wrong, device.root / "nobody"):  # another key, and none
        (device.root / "nobody").write_text("")
        with pytest.raises(ExportError, match=r"its host key is not the known one, so nothing was sent"):
            deploy.deploy(
                Bundle.open(make(known.name, {})),
                to(device),
                Request(COPY, config=device.configure(device.port, known)),
            )
    assert not (device.home / "app").exists()


def test_a_configuration_cannot_switch_host_keys_off(make: Make, device: Device) -> None:
    (device.root / "lax_hosts").write_text("")
    config = device.configure(device.port, device.root / "lax_hosts")
    config.write_text(config.read_text() + "  StrictHostKeyChecking no\n")
    with pytest.raises(ExportError, match="host key"):
        deploy.deploy(Bundle.open(make("a", {})), to(device), Request(COPY, config=config))


@pytest.mark.parametrize(
    "where", ["-r; $(touch pwned)", pytest.param('it\'s "quoted"\nü', marks=pytest.mark.slow)], ids=repr
)
def test_hostile_folder_names_are_only_names(make: Make, device: Device, where: str) -> None:
    folder = make(
        "a", {"graphs/-rf": b"1", "graphs/a b; touch pwned": b"2", "graphs/$(x)": b"3", "graphs/new\nline": b"4"}
    )
    copy(folder, device, where)
    assert is_live(folder, device, where)
    assert [p.name for p in device.home.iterdir()] == [where]
    assert not list(Path.home().glob("pwned"))


@pytest.mark.parametrize(
    "host", ["-oProxyCommand=touch pwned", "user@-x", "a;b", "a b", "$(a)", "-l@x", "", "a@b@c:d", "a\nb", "@x"]
)
def test_hostile_hosts_are_refused(host: str) -> None:
    with pytest.raises(UsageError, match="is not a device"):
        Host.parse(host)


@pytest.mark.parametrize(
    ("text", "destination", "folder"),
    [("orin", "orin", "edgetrim"), ("me@orin.lab", "me@orin.lab", "edgetrim"), ("me@10.0.0.7:a b:c", "me@10.0.0.7", "a b:c"),
     ("me@[fe80::1%eth0]:x", "me@fe80::1%eth0", "x"), ("[::1]", "::1", "edgetrim"), ("orin:-rf", "orin", "-rf")],
)  # fmt: skip
def test_hosts(text: str, destination: str, folder: str) -> None:
    assert Host.parse(text) == Host(destination, folder)


def test_two_at_once_one_is_refused_and_a_dead_one_holds_nothing(make: Make, device: Device) -> None:
    folder = make("a", {"graphs/x": b"1"})
    with Connection(to(device), device.config) as first:
        first.ask("lock", who="ada@laptop")
        with pytest.raises(ExportError, match=r"ada@laptop, since \S+, process \d+ is changing .*Wait for it"):
            copy(folder, device)
        assert first._process is not None
        first._process.kill()  # as a laptop that goes away
    for _ in range(50):  # the agent there ends when it reads the end of its input
        with contextlib.suppress(ExportError):
            copy(folder, device)
            break
        time.sleep(0.1)
    assert is_live(folder, device)


@pytest.mark.slow
def test_many_at_once_leave_one_whole_bundle(make: Make, device: Device) -> None:
    bundles = [make(f"b{i}", {"graphs/x": bytes([i]) * 200_000}) for i in range(4)]
    found: list[object] = []

    def one(folder: Path) -> None:
        try:
            found.append(copy(folder, device))
        except ExportError as e:
            assert "is changing" in str(e)  # noqa: PT017 - in a thread
            found.append(e)

    threads = [threading.Thread(target=one, args=(b,)) for b in bundles]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 4
    assert sum(is_live(b, device) for b in bundles) == 1


def test_a_file_damaged_on_the_device_is_sent_again(make: Make, device: Device) -> None:
    """Older releases are not trusted: what is linked from them is hashed like what was sent."""
    first, second = make("a", {"graphs/llm.data": LARGE}), make("b", {"graphs/llm.data": LARGE, "graphs/x": b"1"})
    copy(first, device)
    there = live(device) / "graphs/llm.data"
    there.chmod(0o644)
    with there.open("r+b") as file:
        file.write(b"damaged")
    copy(second, device)
    assert is_live(second, device)


def test_a_foreign_current_is_not_touched(make: Make, device: Device) -> None:
    (device.home / "app/current").mkdir(parents=True)
    with pytest.raises(ExportError, match=r"current is no link of edgetrim's; move it away"):
        copy(make("a", {}), device)
    assert (device.home / "app/current").is_dir()


def test_a_changed_bundle_is_not_deployed(
    make: Make, device: Device, edgetrim: Callable[..., tuple[int, str, str]]
) -> None:
    folder = make("a", {"graphs/x": b"1"})
    (folder / "graphs/x").write_bytes(b"2")
    code, out, err = edgetrim("deploy", folder, "--to", "device", "--ssh-config", device.config)
    assert (code, out) == (6, "")
    assert "graphs/x was changed" in err


def test_an_unsigned_bundle_is_not_deployed_where_a_signature_is_asked_for(
    make: Make, device: Device, tmp_path: Path, edgetrim: Callable[..., tuple[int, str, str]]
) -> None:
    (tmp_path / "signers").write_text(f"ci {(device.root / 'user.pub').read_text()}")
    folder = make("a", {})
    arguments = (
        "deploy",
        folder,
        "--to",
        f"device:{device.home}/app",
        "--ssh-config",
        device.config,
        "--through",
        COPY,
    )
    code, out, err = edgetrim(*arguments, "--signers", tmp_path / "signers")
    assert (code, out) == (6, "") and "There is no signature" in err
    signature.sign(folder / MANIFEST, device.root / "user", folder / SIGNATURE)
    assert edgetrim(*arguments, "--signers", tmp_path / "signers")[0] == 0
    assert live(device).exists() and not (live(device) / SIGNATURE).exists()


def test_answers_of_another_form_are_the_devices_fault(
    make: Make, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Connection, "ask", lambda *_, **__: {"missing_bytes": "x"})
    with pytest.raises(ExportError, match="gave an answer that cannot be read"):
        copy(make("a", {}), device)


def test_a_login_shell_that_talks_does_no_harm(make: Make, device: Device) -> None:
    """Output of a shell's start files comes before the agent's."""
    assert "'" + BOOTSTRAP.split("'")[1] + "'" == BOOTSTRAP[BOOTSTRAP.index("'") :]  # one quoted word: any shell's
    with Connection(to(device), device.config) as there:
        there._buffer = b'{"not": "ours"}\nwelcome' + b'\n{"hello": "edgetrim-agent 1"}\nrest'
        there._greeting()
        assert there._buffer == b"rest"


def test_a_fleet_goes_on_when_one_fails(
    make: Make, device: Device, tmp_path: Path, edgetrim: Callable[..., tuple[int, str, str]]
) -> None:
    fleet = tmp_path / "fleet.toml"
    hosts = [f"device:{device.home}/one", "nowhere:app", f"device:{device.home}/two"]
    fleet.write_text(f"hosts = {json.dumps(hosts)}\n")
    folder = make("a", {"graphs/x": b"1"})
    code, out, err = edgetrim(
        "deploy", folder, "--fleet", fleet, "--ssh-config", device.config, "--through", COPY, "--jobs", "2", "--json"
    )
    assert code == 1
    assert [d["ok"] for d in json.loads(out)] == [True, False, True]
    assert "1 of 3 devices failed" in err
    assert "nowhere" in err
    assert is_live(folder, device, "one") and is_live(folder, device, "two")


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "must say hosts"), ("hosts = []", "must say hosts"), ("hosts = [1]", "must say hosts"), ("host = ['a']", "unknown key 'host'"),
     ("hosts = ['-x']", "is not a device"), ("hosts =", "not valid TOML")],
)  # fmt: skip
def test_fleet_files_of_another_form(text: str, message: str, tmp_path: Path) -> None:
    from exporter.deploy import fleet

    (tmp_path / "fleet.toml").write_text(text)
    with pytest.raises(UsageError, match=message):
        fleet.read(tmp_path / "fleet.toml")


def test_no_device(make: Make, edgetrim: Callable[..., tuple[int, str, str]]) -> None:
    assert edgetrim("deploy", make("a", {}))[::2] == (
        2, "Error: Which device? `--to USER@HOST`, or `--fleet FILE.toml` for many.\n"
    )  # fmt: skip


def test_the_dry_run_changes_nothing(make: Make, device: Device, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make("a", {"graphs/x": b"1"})
    assert main(["deploy", str(folder), "--to", f"device:{device.home}/app", "--ssh-config", str(device.config), "--dry-run", "--through", COPY]) == 0  # fmt: skip
    assert "free disk" in capsys.readouterr().out
    assert list(device.home.iterdir()) == []
    assert not (folder / DEVICES).exists()
