"""Decoding hands keys and values from step to step as they are: no copy, no way over the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from exporter.backends.ort import OnnxRuntimeRunner
from tests.families import tiny
from tests.stages.conftest import Engine, Export


def test_keys_and_values_are_never_brought_to_the_host(
    exported: Export, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = exported("llava", ("fastv",))
    generator = engine(case)
    asked = tiny.question(case.graphs)
    visual = generator.reduce(generator.vision(asked.pixels))
    returned: dict[str, Any] = {}
    compared = 0
    run, to_host = OnnxRuntimeRunner.run, OnnxRuntimeRunner.numpy

    def watched(self: OnnxRuntimeRunner, feeds: Any) -> dict[str, Any]:
        nonlocal compared
        for name, value in feeds.items():
            if name.startswith("past_") and returned:
                assert value is returned["present" + name[4:]], f"{name} is not what the last step returned"
                compared += 1
        found = run(self, feeds)
        returned.update(found)
        return found

    def refuse(self: OnnxRuntimeRunner, value: Any) -> Any:
        host = to_host(self, value)
        assert host.ndim < 4, "keys or values were brought to the host"
        return host

    monkeypatch.setattr(OnnxRuntimeRunner, "run", watched)
    monkeypatch.setattr(OnnxRuntimeRunner, "numpy", refuse)
    prefilled = generator.prefill(visual, [asked.prompt])
    for token in (11, 12, 13):
        generator.step(prefilled.cache, np.array([token]))
    assert compared == 3 * (2 * case.graphs.text.layers + 2)
