"""Signatures: OpenSSH's own tool makes and checks them; what was changed, renamed or signed by others does not pass."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from exporter import signature
from exporter.errors import UsageError, VerificationError

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH's ssh-keygen is not installed")


def key(folder: Path, name: str) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(folder / name)], check=True)
    return folder / name


@pytest.fixture
def signed(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A manifest, its signature by `ada`, and a list of signers with her."""
    ada = key(tmp_path, "ada")
    manifest, made, signers = tmp_path / "manifest.json", tmp_path / "manifest.json.sig", tmp_path / "signers"
    manifest.write_text("{}")
    signature.sign(manifest, ada, made)
    signers.write_text(f"ada@example.org {ada.with_suffix('.pub').read_text()}")
    return manifest, made, signers


def test_the_signer_is_named(signed: tuple[Path, Path, Path]) -> None:
    manifest, made, signers = signed
    assert signature.verify(manifest.read_bytes(), made, signers) == "ada@example.org"
    assert {p.name for p in manifest.parent.iterdir()} == {
        "ada",
        "ada.pub",
        "manifest.json",
        "manifest.json.sig",
        "signers",
    }


def test_another_manifest(signed: tuple[Path, Path, Path]) -> None:
    with pytest.raises(VerificationError, match="no signature of this manifest"):
        signature.verify(b"{} ", *signed[1:])


def test_another_signer(signed: tuple[Path, Path, Path], tmp_path: Path) -> None:
    manifest, made, signers = signed
    signers.write_text(f"eve@example.org {key(tmp_path, 'eve').with_suffix('.pub').read_text()}")
    with pytest.raises(VerificationError, match="made by nobody in"):
        signature.verify(manifest.read_bytes(), made, signers)


def test_a_signature_for_something_else(signed: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """The same key, the same bytes, another purpose."""
    manifest, made, signers = signed
    made.unlink()
    subprocess.run(
        ["ssh-keygen", "-q", "-Y", "sign", "-n", "file", "-f", tmp_path / "ada", manifest],
        check=True,
        capture_output=True,
    )
    with pytest.raises(VerificationError, match="no signature of this manifest"):
        signature.verify(manifest.read_bytes(), made, signers)


def test_no_signature_no_signers_no_key(signed: tuple[Path, Path, Path], tmp_path: Path) -> None:
    manifest, made, signers = signed
    with pytest.raises(VerificationError, match="There is no signature"):
        signature.verify(b"{}", tmp_path / "none", signers)
    with pytest.raises(UsageError, match="There is no list of signers"):
        signature.verify(b"{}", made, tmp_path / "none")
    with pytest.raises(UsageError, match="There is no key"):
        signature.sign(manifest, tmp_path / "none", made)
    with pytest.raises(UsageError, match="could not be signed"):
        signature.sign(manifest, signers, made)
