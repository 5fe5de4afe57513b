"""README, CONTRIBUTING and docs: links lead somewhere, commands and specs exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import exporter.cli
from exporter import _discover, methods
from exporter.errors import ExportError
from graphs import _spec
from profiles import _schema

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_exist(page: Path) -> None:
    text = page.read_text()
    verbs = set(re.findall(r"(?:^|`)edgetrim ([a-z]\w*)", text, re.M))
    assert verbs <= set(_discover.names(exporter.cli))
    for spec in re.findall(r"--reduce ([\w:=,.]+)", text):
        _spec.parse(spec)
    for name in re.findall(r"--profile (\w+)", text):
        _schema.load(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    for line in re.findall(r"(?:^|`)make ([a-z][a-z -]*)", page.read_text(), re.M):
        assert set(line.split()) <= targets


def test_the_methods_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert page == methods.page(), "run: python -m exporter.methods > docs/methods.md"


def test_exit_codes_are_those_of_the_errors() -> None:
    documented = {int(c) for c in re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "cli.md").read_text(), re.M)}
    kinds = [ExportError, *ExportError.__subclasses__()]
    assert documented == {0, 130, *(k.exit_code for k in kinds)}
