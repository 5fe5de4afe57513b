"""The strict reader: what it accepts, and word for word what it says about the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

import exporter.backends
from exporter import _discover
from exporter.errors import UsageError
from profiles import _schema

BACKENDS = ", ".join(_discover.names(exporter.backends))
GOOD = (_schema.FOLDER / "orin_nano_8gb_int4.toml").read_text()


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def refusal(path: Path | str) -> str:
    with pytest.raises(UsageError) as caught:
        _schema.load(path)
    return str(caught.value)


def test_the_orin_profile() -> None:
    profile = _schema.load("orin_nano_8gb_int4")
    assert profile.name == "orin_nano_8gb_int4"
    assert profile.stack == _schema.Stack("trt", "tensorrt", "10.3", "6.2", (87,)), "the device's compute capability"
    assert profile.stack.builds_on_device
    assert profile.precision == _schema.Precision("fp16", "int4", (128, 64))
    assert profile.memory == _schema.Memory(8192, 7619, 950)
    assert profile.mode_name == "MAXN_SUPER"
    assert profile.mode == _schema.Mode(25, 102, None, 16.7, 33.4)


def test_a_power_mode() -> None:
    slower = _schema.load("orin_nano_8gb_int4").in_mode("15W")
    assert (slower.mode.power_w, slower.mode.bandwidth_gb_s) == (15, 68)
    with pytest.raises(UsageError) as caught:
        slower.in_mode("15")
    assert str(caught.value) == (
        "Profile `orin_nano_8gb_int4`: unknown power mode '15'. Did you mean '15W'? Known: 15W, 25W, MAXN_SUPER."
    )


OWN = """[device]
title = "My board"
compute_capability = 87

[device.memory]
total_mib = 4096

[device.modes.fast]
bandwidth_gb_s = 50

[device.modes."5 W"]
power_w = 5
"""


def test_a_device_of_ones_own(tmp_path: Path) -> None:
    text = GOOD.replace('device = "orin_nano_8gb"\n', 'power_mode = "5 W"\n') + "\n" + OWN
    profile = _schema.load(write(tmp_path, text))
    assert profile.device.title == "My board"
    assert profile.memory == _schema.Memory(4096)
    assert (profile.mode, profile.stack.compute_capabilities) == (_schema.Mode(5), (87,))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("total_mib = 4096", "total_gb = 4", "unknown key 'total_gb' in [device.memory]. Did you mean 'total_mib'? "
         "Known: largest_block_mib, total_mib, usable_mib."),
        ("power_w = 5", "power_w = 0", "[device.modes.5 W] power_w must be at least 1; found 0."),
        ('[device.modes."5 W"]', "[device.extra]", "unknown key 'extra' in [device]. "
         "Known: compute_capability, memory, modes, title."),
        ('[device.modes."5 W"]\npower_w', "[device.modes]\nslow", "'device.modes' must hold sections, [device.modes.NAME]; "
         "found {'fast': {'bandwidth_gb_s': 50}, 'slow': 5}."),
        ('title = "My board"\n', "", "key 'title' is missing in [device]. Compare profiles/cpu_fp32.toml."),
        ("[device.modes.fast]", "[device.modes.slow]", "unknown power_mode 'fast'. Known: 5 W, slow."),
    ],
)  # fmt: skip
def test_what_is_refused_of_a_device(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = GOOD.replace('device = "orin_nano_8gb"\n', 'power_mode = "fast"\n') + "\n" + OWN
    assert old in text
    assert refusal(write(tmp_path, text.replace(old, new, 1))) == f"Profile mine.toml: {message}"


def test_unknown_facts_stay_unknown() -> None:
    cpu = _schema.load("cpu_fp32")
    assert (cpu.memory, cpu.mode_name, cpu.mode) == (_schema.Memory(), None, _schema.Mode())
    assert not _schema.load("rtx_fp16").stack.builds_on_device


def test_a_users_file_is_a_profile_too(tmp_path: Path) -> None:
    assert _schema.load(write(tmp_path, GOOD)).name == "mine"
    assert _schema.load(str(write(tmp_path, GOOD))).limits.image == (672, 672)


@pytest.mark.parametrize(
    ("installed", "accepted"),
    [("10.3.0", True), ("10.3", True), ("10.16.1.11", True), ("11.4.0.106", True), ("10.2.9", False), ("8.6.1", False)],
)
def test_tensorrt_versions_compare_as_numbers(installed: str, accepted: bool) -> None:
    assert _schema.load("orin_nano_8gb_int4").stack.accepts_tensorrt(installed) is accepted


def test_an_unknown_name() -> None:
    assert refusal("orin_nano_8gb_fp4") == (
        "Unknown profile 'orin_nano_8gb_fp4'. Did you mean 'orin_nano_8gb_fp16'? "
        f"Known: {', '.join(_schema.names())}. A path to a .toml file works too."
    )


def test_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    assert refusal(path) == f"Profile {path} cannot be read: No such file or directory."


def test_not_toml(tmp_path: Path) -> None:
    path = write(tmp_path, "device = \n")
    assert refusal(path).startswith(f"Profile {path} is not valid TOML: Invalid value (at line 1, column 10)")


def test_not_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "is not valid TOML" in refusal(path)


def test_deeply_nested(tmp_path: Path) -> None:
    assert "is not valid TOML" in refusal(write(tmp_path, "a = " + "[" * 20000))


def test_not_a_profile(tmp_path: Path) -> None:
    path = write(tmp_path, "#" * 70000)
    assert refusal(path) == f"Profile {path} is longer than 64 KiB. That is not a profile."


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "batch = 1",
            "bach = 1",
            "unknown key 'bach' in [limits]. Did you mean 'batch'? Known: batch, frames, image, new_tokens, text.",
        ),
        (
            'device = "orin_nano_8gb"',
            'devise = "x"',
            "unknown key 'devise'. Did you mean 'device'? "
            "Known: description, device, gates, limits, power_mode, precision, stack.",
        ),
        (
            'device = "orin_nano_8gb"',
            'device = "orin_nano_8g"',
            "unknown device 'orin_nano_8g'. Did you mean 'orin_nano_8gb'? "
            f"Known: {', '.join(_schema.devices())}. Or describe your own in a section [device].",
        ),
        ("batch = 1\n", "", "key 'batch' is missing in [limits]. Compare profiles/cpu_fp32.toml."),
        ("batch = 1\n", 'batch = "one"\n', '[limits] batch must be a whole number; found "one".'),
        ("batch = 1\n", "batch = true\n", "[limits] batch must be a whole number; found true."),
        ("batch = 1\n", "batch = 1.5\n", "[limits] batch must be a whole number; found 1.5."),
        ("batch = 1\n", "batch = 0\n", "[limits] batch must be at least 1; found 0."),
        ("image = [672, 672]", "image = 448", "[limits] image must be two whole numbers, [height, width]; found 448."),
        ("image = [672, 672]", "image = [448, 7]", "[limits] image must be in 14..16384; found [448, 7]."),
        ('compute = "fp16"', 'compute = "fp8"', '[precision] compute must be "fp32" or "fp16"; found "fp8".'),
        (
            "blocks = [128, 64]",
            "",
            '[precision] `blocks` goes with weights = "int4", and only with it; [128, 64, 32] is usual.',
        ),
        ("blocks = [128, 64]", "blocks = [100]", "[precision] blocks may hold 16, 32, 64, 128 and 256; found [100]."),
        (
            "logits_cosine_min = 0.97",
            "logits_cosine_min = inf",
            "[gates] logits_cosine_min must be in 0..1; found inf.",
        ),
        ("logits_cosine_min = 0.97", "logits_cosine_min = 97", "[gates] logits_cosine_min must be in 0..1; found 97."),
        (
            'backend = "trt"',
            'backend = "rtr"',
            f"[stack] unknown backend 'rtr'. Did you mean 'trt'? Known: {BACKENDS}.",
        ),
        ('module = "tensorrt"\n', "", '[stack] backend "trt" needs `module` too.'),
        (
            'device = "orin_nano_8gb"',
            'device = "rtx"',
            '[stack] backend "trt" needs `compute_capabilities`, as in [87] for an Orin, or a device that has its own.',
        ),
        ('backend = "trt"', 'backend = "ort"', '[stack] `module` and `tensorrt` belong to backend "trt"; remove them.'),
        ('tensorrt = "10.3"', 'tensorrt = "ten"', '[stack] tensorrt must be a version such as "10.3"; found "ten".'),
        ('tensorrt = "10.3"', "tensorrt = 10.3", "[stack] tensorrt must be text that is not empty; found 10.3."),
        ("device = ", 'name = "orin"\ndevice = ', "`name` is the file's name; remove the key."),
    ],
)
def test_what_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    text = refusal(write(tmp_path, GOOD.replace(old, new, 1)))
    assert text.replace("mine.toml: ", "", 1).replace(f"{tmp_path}/", "") == f"Profile {message}"


def test_plugins_are_names_for_full_tensorrt(tmp_path: Path) -> None:
    orin = (_schema.FOLDER / "orin_nano_8gb_int4.toml").read_text()

    def chosen(text: str, plugins: str) -> Path:
        return write(tmp_path, text.replace("[precision]", f"plugins = {plugins}\n\n[precision]", 1))

    assert _schema.load(chosen(orin, '["token_select", "kv_compact"]')).stack.plugins == ("token_select", "kv_compact")
    assert "[stack] unknown plugin 'tokenselect'. Did you mean 'token_select'?" in refusal(
        chosen(orin, '["tokenselect"]')
    )
    assert "[stack] `plugins` names one twice." in refusal(chosen(orin, '["kv_compact", "kv_compact"]'))
    assert "[stack] plugins must be a list of names; found 3." in refusal(chosen(orin, "3"))
    rtx = (
        orin.replace('module = "tensorrt"', 'module = "tensorrt_rtx"')
        .replace('"10.3"', '"1.7"')
        .replace("[87]", "[86]")
    )
    assert '`plugins` needs module "tensorrt": TensorRT-RTX has no plugins.' in refusal(chosen(rtx, '["kv_compact"]'))
    cpu = (_schema.FOLDER / "cpu_fp32.toml").read_text()
    assert 'backend "ort" has none. Leave it out, the graphs work without.' in refusal(chosen(cpu, '["kv_compact"]'))


def test_a_missing_section(tmp_path: Path) -> None:
    text = GOOD.partition("[gates]")[0]
    assert refusal(write(tmp_path, text)) == (
        "Profile mine.toml: section 'gates' is missing. Compare profiles/cpu_fp32.toml."
    )


def test_a_key_where_a_section_belongs(tmp_path: Path) -> None:
    head = GOOD.partition("[gates]")[0]
    text = "gates = 3\n" + head
    assert refusal(write(tmp_path, text)) == "Profile mine.toml: 'gates' must be a section, [gates]; found 3."
