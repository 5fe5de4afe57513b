"""A file in the folder is the name; an underscore hides it; a wrong name gets the nearest."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from exporter import _discover
from exporter.errors import UsageError


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A package with two tools, one shared file and one that must not be imported by listing."""
    folder = tmp_path / "sample_tools"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "hammer.py").write_text("TOOL = 'hammer'\n")
    (folder / "wrench.py").write_text("raise AssertionError('imported')\n")
    (folder / "_shared.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    package = __import__("sample_tools")
    yield package
    for name in [n for n in sys.modules if n.partition(".")[0] == "sample_tools"]:
        del sys.modules[name]


def test_names_are_the_files_and_nothing_is_imported(tools: ModuleType) -> None:
    assert _discover.names(tools) == ["hammer", "wrench"]


def test_load_imports_the_file(tools: ModuleType) -> None:
    assert _discover.load(tools, "tool", "hammer").TOOL == "hammer"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hamer", "Unknown tool 'hamer'. Did you mean 'hammer'? Known: hammer, wrench."),
        ("_shared", "Unknown tool '_shared'. Known: hammer, wrench."),
        ("../hammer", "Unknown tool '../hammer'. Did you mean 'hammer'? Known: hammer, wrench."),
    ],
)
def test_an_unknown_name(tools: ModuleType, name: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        _discover.load(tools, "tool", name)
    assert str(caught.value) == message
