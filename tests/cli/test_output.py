"""Results on stdout, the rest on stderr; data that JSON knows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from exporter.cli._output import Output, plain, table


@dataclass(frozen=True)
class Sample:
    kept: np.int64
    where: Path


def test_plain_data() -> None:
    data = {"a": Sample(np.int64(3), Path("x/y")), 1: (np.float32(0.5), float("nan")), "s": {2, 1}, "v": np.arange(2)}
    assert plain(data) == {"a": {"kept": 3, "where": "x/y"}, "1": [0.5, None], "s": [1, 2], "v": [0, 1]}


def test_json_instead_of_tables(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=True).result({"latency_ms": 1.5}, table("Latency", ("stage",), [("vision",)]))
    out, err = capsys.readouterr()
    assert json.loads(out) == {"latency_ms": 1.5}
    assert err == ""


def test_a_table_and_text(capsys: pytest.CaptureFixture[str]) -> None:
    Output().result({}, table("Latency", ("stage", ">ms"), [("vision", 12.5), ("[decode]", None)]), "done [really]")
    out, _ = capsys.readouterr()
    assert out.splitlines() == [
        "Latency",
        "",
        " stage        ms",
        " ───────────────",
        " vision     12.5",
        " [decode]      –",
        "",
        "done [really]",
    ]


def test_long_lines_stay_whole(capsys: pytest.CaptureFixture[str]) -> None:
    Output().result({}, "word " * 100)
    assert capsys.readouterr().out == ("word " * 100).rstrip() + "\n"


def test_quiet_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output()
    output.note("exporting")
    with output.stage("Export") as log:
        log("tracing vision")
    assert capsys.readouterr() == ("", "")


def test_warnings_are_always_said(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=True).warn("Fallback to the CPU.")
    assert capsys.readouterr() == ("", "Warning: Fallback to the CPU.\n")
