"""What fits and what does not: every reason is told, and only reasons."""

from __future__ import annotations

from typing import Any

import pytest

from exporter.deploy import preflight
from exporter.deploy.preflight import Need
from profiles import _schema

ORIN: dict[str, Any] = {
    "model": "NVIDIA Jetson Orin Nano", "machine": "aarch64", "system": "Ubuntu 22.04.5 LTS", "python": "3.10.12", "jetpack": "6.2",
    "tensorrt": "10.3.0.30", "driver": "540.4.0", "power_mode": "MAXN_SUPER", "memory_total_mib": 7620, "memory_available_mib": 6000,
    "swap_free_mib": 0, "unfragmented_mib": 900, "disk_free_mib": 20_000, "edgetrim": "0.1.0",
}  # fmt: skip
LOOK = {"missing_bytes": 2**30, "live": None, "writable": True}
NEED = Need(1024, 2048, 5000, True)


def reasons(
    facts: dict[str, Any] | None = None, need: Need = NEED, profile: str = "orin_nano_8gb_int4", **look: Any
) -> list[str]:
    rows = preflight.check({**ORIN, **(facts or {})}, {**LOOK, **look}, _schema.load(profile), need)
    return preflight.reasons(rows)


def test_an_orin_fits() -> None:
    assert reasons() == []


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"jetpack": "5.1.3"}, "JetPack: 5.1.3, expected ≥ 6.2"),
        ({"jetpack": None}, "JetPack: none found, expected ≥ 6.2"),
        ({"tensorrt": "8.6.2"}, "TensorRT: 8.6.2, expected ≥ 10.3"),
        ({"tensorrt": None}, "TensorRT: none found, expected ≥ 10.3"),
        ({"python": "3.8.10"}, "Python: 3.8.10, expected ≥ 3.10"),
        ({"memory_total_mib": 3900}, "memory: 3.8 GiB, expected ≥ 6.8 GiB"),
        ({"memory_available_mib": 3000}, "free memory: 2.9 GiB and 0 MiB of swap, expected ≥ 4.9 GiB"),
        ({"disk_free_mib": 100}, "free disk: 100 MiB, expected ≥ 2.0 GiB"),
        ({"edgetrim": None}, "edgetrim: not installed, expected installed"),
    ],
)
def test_each_reason(facts: dict[str, Any], reason: str) -> None:
    assert reasons(facts) == [reason]


def test_all_reasons_at_once() -> None:
    assert len(reasons({"jetpack": "5.1", "tensorrt": None, "disk_free_mib": 1, "edgetrim": None}, writable=False)) == 5


def test_newer_is_fine_and_swap_counts() -> None:
    assert reasons({"jetpack": "7.2", "tensorrt": "10.16.1", "python": "3.12.3"}) == []
    assert reasons({"memory_available_mib": 3000, "swap_free_mib": 2500}) == []


def test_where_nothing_is_run_only_room_matters() -> None:
    bare = dict.fromkeys(ORIN) | {"disk_free_mib": 20_000}
    assert reasons(bare, Need(1024, 2048, 0, False), "cpu_fp32") == []


def test_what_steers_a_terminal_is_not_shown() -> None:
    rows = preflight.check({**ORIN, "model": "Orin\x1b[2J"}, LOOK, _schema.load("cpu_fp32"), NEED)
    assert rows[0].found == "Orin\N{REPLACEMENT CHARACTER}[2J"


def test_the_power_mode_to_take_is_told() -> None:
    rows = preflight.check(ORIN, LOOK, _schema.load("orin_nano_8gb_int4"), NEED)
    (row,) = [r for r in rows if r.what == "power mode"]
    assert (row.found, row.fits) == ("MAXN_SUPER", None)
    assert row.expected in _schema.load("orin_nano_8gb_int4").device.modes
