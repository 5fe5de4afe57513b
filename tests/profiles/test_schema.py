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
    assert profile.stack == _schema.Stack("trt", "tensorrt", "10.3", "6.2", (87,))
    assert profile.stack.builds_on_device
    assert profile.precision == _schema.Precision("fp16", "int4", (128, 64))
    assert profile.memory == _schema.Memory(8192, 102.0, 950)


def test_unknown_facts_stay_unknown() -> None:
    assert _schema.load("cpu_fp32").memory == _schema.Memory(None, None, None)
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
    assert refusal("orin_nano_8gb_int8") == (
        "Unknown profile 'orin_nano_8gb_int8'. Did you mean 'orin_nano_8gb_int4'? "
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
            'device = "Jetson Orin Nano 8 GB"',
            'devise = "x"',
            "unknown key 'devise'. Did you mean 'device'? "
            "Known: description, device, gates, limits, memory, precision, stack.",
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
            "compute_capabilities = [87]",
            "",
            '[stack] backend "trt" needs `compute_capabilities` too, as in [87] for an Orin.',
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
    head, _, rest = GOOD.partition("[memory]")
    text = "memory = 8192\n" + head + rest[rest.index("[gates]") :]
    assert refusal(write(tmp_path, text)) == "Profile mine.toml: 'memory' must be a section, [memory]; found 8192."
