"""`edgetrim verify`, signed packing, and packing twice."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest

import exporter
from exporter.bundle import MANIFEST, SIGNATURE, sha256
from tests.conftest import Said

Run = Callable[..., Said]
SCHEMA_FILE = Path(exporter.__file__).parent / "bundle.schema.json"


def test_a_whole_bundle(edgetrim: Run, finished: tuple[Path, int, str]) -> None:
    folder = finished[0]
    said = edgetrim("verify", folder)
    assert (said.code, said.err) == (0, "")
    first, second = said.out.splitlines()
    assert first.startswith(f"Bundle {folder}: ") and first.endswith(", every hash is right")
    assert second == f"Manifest: {sha256(folder / MANIFEST)}"
    assert json.loads(edgetrim("verify", folder, "--json").out)["signer"] is None


def test_a_changed_bundle(edgetrim: Run, tiny: Callable[..., Path]) -> None:
    folder = tiny({"graphs/a": b"1"})
    (folder / "graphs/a").write_bytes(b"2")
    assert edgetrim("verify", folder)[:2] == (6, "")


def test_the_manifest_is_of_its_schema(finished: tuple[Path, int, str]) -> None:
    schema = json.loads(SCHEMA_FILE.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    manifest = json.loads((finished[0] / MANIFEST).read_text())
    jsonschema.validate(manifest, schema)
    assert set(manifest) == set(schema["properties"])  # every key is explained
    for name in ("../x", "/x", "a/../b", "a//b", "", ".", "a\\b", "C:/x", "a/"):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**manifest, "files": {name: {"sha256": "0" * 64, "bytes": 1}}}, schema)
    for name in ("a", "...", "a/.b", "a b/c", "..a"):
        jsonschema.validate({**manifest, "files": {name: {"sha256": "0" * 64, "bytes": 1}}}, schema)


def test_packing_twice_gives_the_same_bytes(
    edgetrim: Run, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also elsewhere, at another time, and over a bundle that was packed before."""
    other = Path(shutil.copytree(bundle, tmp_path / "elsewhere"))
    (other / MANIFEST).unlink()
    (other / "report.html").unlink()
    monkeypatch.setattr("time.time", lambda: 2e9)
    assert edgetrim("pack", bundle).code == 0 and edgetrim("pack", other).code == 0
    first, second = ({p.relative_to(f): sha256(p) for p in f.rglob("*") if p.is_file()} for f in (bundle, other))
    assert first == second
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert edgetrim("pack", other).code == 0
    assert "01 January 1970" in (other / "report.html").read_text()


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH's ssh-keygen is not installed")
def test_a_signed_bundle(edgetrim: Run, bundle: Path, tmp_path: Path) -> None:
    key, signers = tmp_path / "key", tmp_path / "signers"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    signers.write_text(f"ci@example.org {key.with_suffix('.pub').read_text()}")
    assert edgetrim("pack", bundle, "--sign", key).code == 0
    assert edgetrim("verify", bundle, "--signers", signers).out.splitlines()[0].endswith("signed by ci@example.org")
    manifest = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps({**manifest, "checkpoint": "another"}))
    said = edgetrim("verify", bundle, "--signers", signers)
    assert (said.code, said.out) == (6, "")
    assert "is no signature of this manifest" in said.err
    assert edgetrim("pack", bundle).code == 0  # what is packed anew is not signed any more
    assert not (bundle / SIGNATURE).exists()
    assert edgetrim("verify", bundle, "--signers", signers).code == 6


def test_inspect_lists_the_largest_files(edgetrim: Run, finished: tuple[Path, int, str]) -> None:
    lines = edgetrim("inspect", finished[0]).out.splitlines()
    start = lines.index("Files, largest first")
    sizes = {p: p.stat().st_size for p in finished[0].rglob("*") if p.is_file() and p.name != MANIFEST}
    largest = max(sizes, key=lambda p: sizes[p]).relative_to(finished[0]).as_posix()
    assert lines[start + 4].split()[0] == largest
    assert lines[start + 12].split()[:2] == [str(len(sizes) - 8), "more"]
