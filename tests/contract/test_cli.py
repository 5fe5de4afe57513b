"""Every verb: its help works, fast packages only, and says what the verb does."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import exporter.cli
from exporter import _discover

VERBS = _discover.names(exporter.cli)
HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "numpy", "rich", "PIL")
SCRIPT = """
import contextlib, io, json, sys
from exporter.cli import main
helps = {}
for verb in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main([verb, "--help"] if verb else ["--help"])
    loaded = [m for m in json.loads(sys.argv[2]) if m in sys.modules]
    helps[verb] = {"code": code, "text": out.getvalue(), "loaded": loaded}
print(json.dumps(helps))
"""


@pytest.fixture(scope="module")
def helps() -> dict[str, dict[str, object]]:
    """verb → exit code, text and heavy modules loaded after its `--help`; "" is the group's. One process for all."""
    arguments = [json.dumps(["", *VERBS]), json.dumps(HEAVY)]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, timeout=120, check=True
    )
    found: dict[str, dict[str, object]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help(helps: dict[str, dict[str, object]], verb: str) -> None:
    found = helps[verb]
    assert found["code"] == 0
    assert str(found["text"]).startswith(f"Usage: edgetrim {verb}".strip())
    assert found["loaded"] == []


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_explains_itself(helps: dict[str, dict[str, object]], verb: str) -> None:
    summary = next(line for line in str(helps[""]["text"]).splitlines() if line.split()[:1] == [verb])
    assert len(summary.split()) > 2, "the group's help needs a sentence on it"
    text = str(helps[verb]["text"])
    assert "--debug" in text
    assert "--json" in text, "every verb gives its result as data too"
