"""A bundle is exactly what its manifest says, or it is not opened."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.bundle import LARGEST_MANIFEST, MANIFEST, SCHEMA, Bundle, contents
from exporter.errors import UsageError, VerificationError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    (folder / "graphs").mkdir(parents=True)
    (folder / "graphs" / "vision.onnx").write_bytes(b"graph")
    (folder / "report.html").write_text("report")
    write(folder, {"schema": SCHEMA, "files": contents(folder)})
    return folder


def write(folder: Path, manifest: Any) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest))


def edit(folder: Path, change: Callable[[Any], Any]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    write(folder, manifest)


def test_a_whole_bundle_opens(folder: Path) -> None:
    (folder / ".lock").touch()  # dot-files belong to nobody
    assert sorted(Bundle.open(folder).manifest["files"]) == ["graphs/vision.onnx", "report.html"]


def changed_byte(folder: Path) -> None:
    (folder / "graphs" / "vision.onnx").write_bytes(b"grapH")


def longer(folder: Path) -> None:
    (folder / "graphs" / "vision.onnx").write_bytes(b"graph+")


def missing(folder: Path) -> None:
    (folder / "report.html").unlink()


def extra(folder: Path) -> None:
    (folder / "graphs" / "more.onnx").touch()


def link_instead_of_a_file(folder: Path) -> None:
    outside = folder.parent / "outside"
    (folder / "report.html").rename(outside)
    (folder / "report.html").symlink_to(outside)


def extra_link(folder: Path) -> None:
    (folder / "graphs" / "more").symlink_to(folder.parent / "nowhere")


def link_instead_of_a_folder(folder: Path) -> None:
    (folder / "graphs").rename(folder.parent / "graphs")
    (folder / "graphs").symlink_to(folder.parent / "graphs")


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (changed_byte, r"graphs/vision\.onnx was changed \(its hash differs\)"),
        (longer, r"graphs/vision\.onnx has 6 bytes, expected 5"),
        (missing, r"report\.html is missing"),
        (extra, r"graphs/more\.onnx is not in the manifest"),
        (link_instead_of_a_file, r"report\.html is missing"),
        (extra_link, "graphs/more is not in the manifest"),
        (link_instead_of_a_folder, "graphs is not in the manifest"),
    ],
)
def test_tampering_is_named(tamper: Callable[[Path], None], message: str, folder: Path) -> None:
    tamper(folder)
    with pytest.raises(VerificationError, match=f"is not what its manifest says: .*{message}"):
        Bundle.open(folder)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/hostname", "graphs/../../outside", "..\\outside", "C:/x", "a//b", ".", "a\0b"]
)
def test_a_manifest_may_not_name_what_lies_outside(name: str, folder: Path) -> None:
    outside = folder.parent / "outside"
    outside.write_text("x")
    edit(folder, lambda m: m["files"].update({name: {"sha256": "", "bytes": 1}}))
    with pytest.raises(VerificationError, match="names a file outside the bundle"):
        Bundle.open(folder)


@pytest.mark.parametrize(
    "manifest",
    ["text", [], {}, {"schema": SCHEMA}, {"schema": "one", "files": {}}, {"schema": SCHEMA, "files": ["a"]},
     {"schema": SCHEMA, "files": {"a": "b"}}],
)  # fmt: skip
def test_a_manifest_of_another_form(manifest: Any, folder: Path) -> None:
    write(folder, manifest)
    with pytest.raises(VerificationError, match=r"manifest\.json is damaged"):
        Bundle.open(folder)


def test_a_manifest_that_is_no_json(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(b"\xff{")
    with pytest.raises(VerificationError, match="is damaged"):
        Bundle.open(folder)


def test_a_newer_manifest(folder: Path) -> None:
    edit(folder, lambda m: m.update(schema=SCHEMA + 1))
    with pytest.raises(VerificationError, match=f"has schema {SCHEMA + 1}; this edgetrim reads {SCHEMA}"):
        Bundle.open(folder)


def test_an_enormous_manifest_is_not_read(folder: Path) -> None:
    os.truncate(folder / MANIFEST, LARGEST_MANIFEST + 1)
    with pytest.raises(VerificationError, match="larger than 16 MiB"):
        Bundle.open(folder)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no bundle"):
        Bundle.open(tmp_path)


def test_links_are_not_packed(folder: Path) -> None:
    extra_link(folder)
    with pytest.raises(VerificationError, match="is a link"):
        contents(folder)
