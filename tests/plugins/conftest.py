"""The kernels, compiled for the CPU once."""

from __future__ import annotations

import pytest

from plugins._library import Library
from tests.plugins import host


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return host.build(tmp_path_factory)
