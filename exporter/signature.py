"""A detached signature of a manifest, by OpenSSH's `ssh-keygen -Y`: a key of the kind people have, a list of whom to trust.

The manifest holds the hash of every file, so its signature is that of the bundle.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from exporter.errors import EnvironmentMismatch, UsageError, VerificationError

NAMESPACE = "edgetrim-bundle"
"""What the signature is for: one that was made for anything else is none for a bundle."""
LARGEST = 64 * 1024


def sign(manifest: Path, key: Path, signature: Path) -> None:
    """Sign with a private key, or with a public one whose private half the agent holds. Written beside, then renamed.

    Raises:
        UsageError: the key cannot be used. EnvironmentMismatch: there is no ssh-keygen.
    """
    if not key.is_file():
        raise UsageError(f"There is no key {key}. `ssh-keygen -t ed25519` makes one.")
    with tempfile.TemporaryDirectory(prefix=".signing-", dir=manifest.parent) as scratch:
        copy = Path(scratch, "manifest")
        copy.write_bytes(manifest.read_bytes())
        done = _keygen("-Y", "sign", "-q", "-n", NAMESPACE, "-f", str(key.resolve()), str(copy))
        if done.returncode:
            raise UsageError(f"{manifest} could not be signed with {key}: {_words(done)}")
        os.replace(f"{copy}.sig", signature)


def verify(manifest: bytes, signature: Path, signers: Path) -> str:
    """Who signed.

    Args:
        manifest: its bytes. signers: OpenSSH's list of allowed signers, a line each: `name[,name] ssh-ed25519 AAAA…`.
    Raises:
        VerificationError: nobody on the list signed these bytes. UsageError: there is no list.
    """
    if not signers.is_file():
        raise UsageError(f"There is no list of signers {signers}. A line of it: `name ssh-ed25519 AAAA…`.")
    if not signature.is_file() or signature.is_symlink() or signature.stat().st_size > LARGEST:
        raise VerificationError(f"There is no signature {signature}. `edgetrim pack --sign KEY` makes one.")
    found = _keygen("-Y", "find-principals", "-s", str(signature), "-f", str(signers))
    name = found.stdout.decode("utf-8", "replace").splitlines()[0] if found.returncode == 0 and found.stdout else None
    if name is None:
        raise VerificationError(f"{signature} was made by nobody in {signers}: {_words(found)}")
    checked = _keygen(
        "-Y", "verify", "-n", NAMESPACE, "-I", name, "-s", str(signature), "-f", str(signers), content=manifest
    )  # fmt: skip
    if checked.returncode:
        raise VerificationError(f"{signature} is no signature of this manifest: {_words(checked)}")
    return name


def _keygen(*arguments: str, content: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(["ssh-keygen", *arguments], input=content, capture_output=True, timeout=120, check=False)
    except FileNotFoundError as e:
        raise EnvironmentMismatch("Signatures need OpenSSH's ssh-keygen: `sudo apt install openssh-client`.") from e
    except subprocess.TimeoutExpired as e:
        raise UsageError("ssh-keygen waited for two minutes. Is the key's passphrase known to the agent?") from e


def _words(done: subprocess.CompletedProcess[bytes]) -> str:
    text = " ".join((done.stderr or done.stdout).decode("utf-8", "replace").split())
    return f"{text[-300:].rstrip('.') or f'exit code {done.returncode}'}."
