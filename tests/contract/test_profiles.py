"""Every profile that ships: it reads, it is consistent with its name, and its facts are possible."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict

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


def test_the_file_says_what_it_is(profile: _schema.Profile) -> None:
    assert (_schema.FOLDER / f"{profile.name}.toml").read_text().startswith("#")


@pytest.mark.parametrize("name", _schema.devices())
def test_a_device_says_where_its_figures_come_from(name: str) -> None:
    text = (_schema.DEVICES / f"{name}.toml").read_text()
    assert text.startswith("#")
    assert "data sheet" in text or "whitepaper" in text or "[m" not in text


def test_every_device_has_a_profile() -> None:
    named = {re.search(r'^device = "(\w+)"$', path.read_text(), re.M) for path in _schema.FOLDER.glob("*.toml")}
    assert {found[1] for found in named if found} == set(_schema.devices())


def test_profiles_of_a_device_are_named_after_it(profile: _schema.Profile) -> None:
    text = (_schema.FOLDER / f"{profile.name}.toml").read_text()
    found = re.search(r'^device = "(\w+)"$', text, re.M)
    assert found, "a shipped profile names a device, it does not describe one"
    assert profile.name.startswith(found[1])


def test_engines_of_a_device_are_for_its_gpu(profile: _schema.Profile) -> None:
    own = profile.device.compute_capability
    assert own is None or profile.stack.compute_capabilities == (own,)


@pytest.mark.parametrize("device", [name for name in _schema.devices() if name not in ("cpu", "rtx")])
def test_a_device_has_a_profile_of_every_type_of_weights_that_its_gpu_has(device: str) -> None:
    """FP8 and NVFP4 where it multiplies FP8 and FP4; INT8 where there is no FP8 to take instead. And of every JetPack all of them."""
    found = defaultdict(set)
    for loaded in map(_schema.load, NAMES):
        if f'device = "{device}"' in (_schema.FOLDER / f"{loaded.name}.toml").read_text():
            found[loaded.stack.jetpack].add(loaded.precision.weights)
            gpu = loaded.device.compute_capability or 0
    wanted = {"none", "int4", *(["fp8"] if gpu >= 89 else ["int8"]), *(["nvfp4"] if gpu >= 100 else [])}
    assert all(types == wanted for types in found.values()), found
    jetpacks = {"orin_n": {"6.2", "7.2"}, "agx_or": {"6.2", "7.2", "7.2.2"}, "thor": {"7.2", "7.2.2"}}
    assert set(found) == jetpacks.get(device[:6], {None})


def test_peaks_fall_with_the_width_of_a_type(profile: _schema.Profile) -> None:
    """Dense figures of tensor cores: the narrower type is at least as fast, and no more than 4.5 times."""
    for mode in profile.device.modes.values():
        known = [p for p in (mode.fp32_tflops, mode.fp16_tflops, mode.int8_tops, mode.fp4_tflops) if p is not None]
        assert all(a <= b <= 4.5 * a for a, b in itertools.pairwise(known)), mode


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
    sizes = [n for n in (memory.largest_block_mib, memory.usable_mib, memory.total_mib) if n is not None]
    assert sizes == sorted(sizes)


def test_four_bits_are_not_held_to_more_than_full_precision() -> None:
    by_weights: dict[str, list[_schema.Gates]] = defaultdict(list)
    for name in NAMES:
        loaded = _schema.load(name)
        by_weights[loaded.precision.weights].append(loaded.gates)
    four = [*by_weights["int4"], *by_weights["nvfp4"]]
    assert max(g.logits_cosine_min for g in four) <= min(g.logits_cosine_min for g in by_weights["none"])
