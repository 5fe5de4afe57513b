"""`edgetrim tune --ray` on a Ray of this machine's own finds what one process finds."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_tune import ARGUMENTS
from tests.conftest import Said

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'edgetrim[ray]'"
    ),
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]


def untimed(record: dict[str, Any]) -> dict[str, Any]:
    """Without what no two runs share."""
    entries = [{**entry, "measured": None} for entry in record["entries"]]
    return {k: v for k, v in record.items() if k not in ("front", "page", "winner")} | {"entries": entries}


def journal(folder: Path) -> dict[str, Any]:
    """Key → value, whatever order they came in; without times."""
    lines = [json.loads(line) for line in (folder / "tune.jsonl").read_text().splitlines()[1:]]
    return {line["key"]: line["value"] for line in lines if not line["key"].startswith("times ")}


def test_ray_finds_what_one_process_finds(
    edgetrim: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray leaves a token in the home folder
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    found = {}
    for name, how in (("one", []), ("ray", ["--ray"])):
        said = edgetrim(*ARGUMENTS, "--budget", "memory=100000", "-o", tmp_path / name, *how)
        assert said.code == 0, said.err
        found[name] = json.loads(said.out)
    assert not ray.is_initialized(), "a Ray of our own ends with the search"
    assert untimed(found["ray"]) == untimed(found["one"])
    assert journal(tmp_path / "ray") == journal(tmp_path / "one")
    # With a budget of memory the one that answers best wins: times have no say in it.
    assert found["ray"]["winner"]["reductions"] == found["one"]["winner"]["reductions"]
    assert sorted(p.name for p in (tmp_path / "ray").iterdir()) == ["tune.html", "tune.jsonl", "winner.json"]
