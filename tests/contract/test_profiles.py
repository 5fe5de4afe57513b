"""Every profile that ships: it reads, it is consistent with its name, and its facts are possible."""

from __future__ import annotations

import pytest

from profiles import _schema

NAMES = _schema.names()
# What each Python module of TensorRT can build for: RTX 1.7 has neither Orin (87) nor Hopper (90).
RTX_TARGETS = {75, 80, 86, 89, 120, 121}


@pytest.fixture(params=NAMES)
def profile(request: pytest.FixtureRequest) -> _schema.Profile:
    return _schema.load(request.param)


def test_there_are_profiles() -> None:
    assert {"cpu_fp32", "orin_nano_8gb_int4"} <= set(NAMES)


def test_the_name_says_the_precision(profile: _schema.Profile) -> None:
    weights, compute = profile.precision.weights, profile.precision.compute
    assert profile.name.endswith(compute if weights == "none" else weights)


def test_the_file_says_where_its_figures_come_from(profile: _schema.Profile) -> None:
    text = (_schema.FOLDER / f"{profile.name}.toml").read_text()
    assert text.startswith("#")
    assert "\n[memory]\n#" in text or "\n[memory]" not in text


def test_the_target_exists_in_the_stack(profile: _schema.Profile) -> None:
    targets = set(profile.stack.compute_capabilities)
    if profile.stack.module == "tensorrt_rtx":
        assert targets <= RTX_TARGETS
    elif profile.stack.module == "tensorrt":
        assert len(targets) == 1, "full TensorRT builds for the GPU at hand"


def test_cpus_compute_in_fp32(profile: _schema.Profile) -> None:
    if profile.stack.backend == "ort" and not profile.stack.compute_capabilities:
        assert profile.precision.compute == "fp32", "ONNX Runtime's CPU runs FP16 no faster"


def test_no_block_is_larger_than_the_memory(profile: _schema.Profile) -> None:
    memory = profile.memory
    assert memory.largest_block_mib is None or (memory.total_mib or 0) > memory.largest_block_mib


def test_four_bits_are_not_held_to_more_than_full_precision() -> None:
    by_weights: dict[str, list[_schema.Gates]] = {"none": [], "int4": []}
    for name in NAMES:
        loaded = _schema.load(name)
        by_weights[loaded.precision.weights].append(loaded.gates)
    assert max(g.logits_cosine_min for g in by_weights["int4"]) <= min(g.logits_cosine_min for g in by_weights["none"])
