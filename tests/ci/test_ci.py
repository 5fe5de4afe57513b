"""What CI systems are told: read back by a parser, or as GitHub's documentation says."""

from __future__ import annotations

from xml.etree import ElementTree as xml

import pytest

import exporter.ci
from exporter import _discover
from exporter.ci import _junit, github
from exporter.ci._case import Case

CASES = [
    Case("latency", "prefill", "failed", 'slower: +7 % <of "all">\x00'),
    Case("latency", "decode", "undecided", "cannot tell"),
    Case("quality", "engine", "passed", "0.5 points"),
]


def test_junit() -> None:
    (suite,) = xml.fromstring(_junit.document("cpu_int4", CASES))
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped"), suite.get("errors")) == (
        "3",
        "1",
        "1",
        "0",
    )
    told = [(c.get("classname"), c.get("name"), [child.tag for child in c]) for c in suite]
    assert told == [
        ("cpu_int4.latency", "prefill", ["failure"]),
        ("cpu_int4.latency", "decode", ["skipped"]),
        ("cpu_int4.quality", "engine", ["system-out"]),
    ]
    assert suite[0][0].get("message") == 'slower: +7 % <of "all">\ufffd'


def test_github() -> None:
    """Workflow commands: %, CR and LF of the data, and also : and , of a property."""
    case = Case("latency", "a, b: c", "failed", "5 %\nslower")
    assert github.annotation(case) == "::error title=EdgeTrim latency%3A a%2C b%3A c::5 %25%0Aslower"
    assert github.annotation(CASES[1]).startswith("::warning title=")


@pytest.mark.parametrize("name", _discover.names(exporter.ci))
def test_every_format_tells_a_case_in_a_line(name: str) -> None:
    form = _discover.load(exporter.ci, "format of annotations", name)
    for case in CASES:
        assert len(form.annotation(case).splitlines()) == 1
