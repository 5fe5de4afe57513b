"""`edgetrim chat` over a model whose visual tokens depend on the question; what it does for any model: test_verbs.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.runtime.step import Stepping
from tests.conftest import Said

Run = Callable[..., Said]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from exporter.cli import main

    folder = tmp_path_factory.mktemp("chat") / "out"
    assert main(["export", "embedded", "-r", "fastv:keep=16", "-p", "cpu_fp32", "-o", str(folder)]) == 0
    return folder


def test_a_guided_conversation_says_once_that_it_starts_anew(
    edgetrim: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = iter(["How many sevens are there?", "How many ones are there?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    notes: list[str] = []
    monkeypatch.setattr("exporter.cli._output.Output.note", lambda self, text: notes.append(text))
    said = edgetrim("chat", folder)
    assert (said.code, len(said.out.splitlines())) == (0, 2)
    assert [note for note in notes if note.endswith("every turn runs the conversation anew.")] == notes[1:]
    assert len(notes) == 2


def test_beams(edgetrim: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    step = Stepping.__call__

    def watched(self: Stepping, tokens: list[int]) -> object:
        widths.append(len(tokens))
        return step(self, tokens)

    monkeypatch.setattr(Stepping, "__call__", watched)
    for beams, expected in ((1, {1}), (3, {3})):
        widths.clear()
        said = edgetrim("chat", folder, "--beams", str(beams), "--json")
        assert said.code == 0, said.err
        (turn,) = json.loads(said.out)["turns"]
        assert turn["answer"] and len(turn["timings_ms"]["decode_ms"]) == len(widths)
        assert set(widths) == expected
    assert edgetrim("chat", folder, "--beams", "0").code == 2
