"""JUnit XML, the form that Jenkins, GitLab, Azure and GitHub's actions agree on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree as xml

from exporter.ci._case import Case

NO_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 cannot hold."""


def document(title: str, cases: Sequence[Case]) -> str:
    """One suite. What could not be decided is skipped."""
    count = {outcome: sum(c.outcome == outcome for c in cases) for outcome in ("failed", "undecided")}
    suite = xml.Element(
        "testsuite", name=title, tests=str(len(cases)), failures=str(count["failed"]), errors="0",
        skipped=str(count["undecided"]),
    )  # fmt: skip
    for case in cases:
        entry = xml.SubElement(suite, "testcase", classname=f"{title}.{case.group}", name=case.name)
        message = NO_XML.sub("\ufffd", case.message)
        if case.outcome == "failed":
            xml.SubElement(entry, "failure", message=message, type=case.group).text = message
        elif case.outcome == "undecided":
            xml.SubElement(entry, "skipped", message=message)
        else:
            xml.SubElement(entry, "system-out").text = message
    root = xml.Element("testsuites")
    root.append(suite)
    xml.indent(root)
    return "<?xml version='1.0' encoding='utf-8'?>\n" + xml.tostring(root, encoding="unicode") + "\n"
