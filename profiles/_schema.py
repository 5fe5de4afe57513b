"""What a profile says, and the strict reader of its TOML.

A profile is a flat description of one target: no inheritance, no defaults for what decides a result. Every key a file
may hold is a field below; an unknown, missing or ill-typed one is an error that names file, section and key. A section
or key that may be left out means "not known": facts about a device without a source are not guessed.

What a vendor says of a device is the same for every stack and precision: it is in `devices/`, one file per device, which a
profile names, or in the profile's own section [device].

Profiles are found by file name in this folder; users pass a path to a TOML of their own instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import exporter.backends
import exporter.flavours
import exporter.quantize
import plugins
from exporter import _discover
from exporter._toml import read_toml
from exporter.errors import UsageError, nearest

FOLDER = Path(__file__).resolve().parent
DEVICES = FOLDER / "devices"

S = TypeVar("S")


def _number(low: float = 1, high: float = float("inf")) -> Any:
    """A required number in low..high."""
    return field(metadata={"low": low, "high": high})


def _known(low: float = 1) -> Any:
    """A number, at least `low`, or None where nobody has measured it."""
    return field(default=None, metadata={"low": low, "high": float("inf")})


@dataclass(frozen=True)
class Stack:
    """The software that builds and runs the engines.

    backend: a name from exporter/backends, "ort" (ONNX Runtime) or "trt". module: the Python module of a trt stack, else left out.
    tensorrt: oldest version the graphs must build on, "10.3"; newer ones are accepted. jetpack: likewise, on a Jetson.
    compute_capabilities: GPUs engines are built for, 87 for SM 8.7; left out: the device's. Empty for a CPU.
    flavour: a name from exporter/flavours, which rewrites the language model's graphs for this backend; None leaves them plain.
    plugins: names from plugins/, which take the place of subgraphs; module "tensorrt" only.
    """

    backend: str
    module: Literal["tensorrt", "tensorrt_rtx"] | None = None
    tensorrt: str | None = None
    jetpack: str | None = None
    compute_capabilities: tuple[int, ...] = ()
    flavour: str | None = None
    plugins: tuple[str, ...] = ()

    @property
    def builds_on_device(self) -> bool:
        """Full TensorRT builds for the GPU in the machine only, so graphs travel and the device makes the engine."""
        return self.module == "tensorrt"

    def accepts_tensorrt(self, version: str) -> bool:
        """Whether an installed TensorRT is new enough."""
        return self.tensorrt is None or newer(version, self.tensorrt)


@dataclass(frozen=True)
class Precision:
    """compute: type of activations and of weights left unquantised. weights: "int4" quantises the language model's in blocks, "int8"
    and "fp8" by output channel, "nvfp4" in blocks of 16.

    blocks: weights that share a scale, in order of preference; the first that divides a matrix's input axis is taken.
    quantizer: a name from exporter/quantize, which chooses the integers. error_max: a matrix whose output would change by more than
    this, squared and relative, stays as it is; None: none does. kv: "int8" keeps keys and values in the cache as integers with a scale
    per token and head. islands: "auto" makes tensors that come near float16's end on
    calibration data float32, with the nodes around them; goes with compute = "fp16".
    """

    compute: Literal["fp32", "fp16"]
    weights: Literal["none", "int4", "int8", "fp8", "nvfp4"]
    blocks: tuple[int, ...] = ()
    quantizer: str = "rtn"
    error_max: float | None = field(default=None, metadata={"low": 0.0, "high": 1.0})
    kv: Literal["none", "int8"] = "none"
    islands: Literal["none", "auto"] = "none"


@dataclass(frozen=True)
class Limits:
    """The largest shapes an engine serves.

    batch: samples. frames: images or clip frames per sample. text: prompt tokens per prefill, without visual ones.
    new_tokens: generated tokens. image: most of height and width in pixels that may be asked for.
    """

    batch: int = _number()
    frames: int = _number()
    text: int = _number()
    new_tokens: int = _number()
    image: tuple[int, int] = _number(14, 16384)


@dataclass(frozen=True)
class Memory:
    """The device's memory, as far as there is a source.

    total_mib: all of it. usable_mib: what programs find of it. largest_block_mib: largest allocation in one piece.
    """

    total_mib: int | None = _known()
    usable_mib: int | None = _known()
    largest_block_mib: int | None = _known()


@dataclass(frozen=True)
class Mode:
    """A power mode: the peaks a device reaches in it, dense, as far as there is a source.

    power_w: the budget. bandwidth_gb_s: of the memory, in 10^9 bytes. The others: 10^12 operations of matrix units a second,
    a multiply and an add counted as two, by the type that is multiplied.
    """

    power_w: float | None = _known()
    bandwidth_gb_s: float | None = _known()
    fp32_tflops: float | None = _known(0)
    fp16_tflops: float | None = _known(0)
    int8_tops: float | None = _known(0)
    fp8_tflops: float | None = _known(0)
    fp4_tflops: float | None = _known(0)


@dataclass(frozen=True)
class Device:
    """What is so whatever runs on it. title: the device, as people call it. compute_capability: 87 for SM 8.7; None: no GPU, or
    many. modes: power modes by the name the device's tool has for them; the first is the one to take."""

    title: str
    compute_capability: int | None = _known()
    memory: Memory = Memory()
    modes: dict[str, Mode] = field(default_factory=dict)


@dataclass(frozen=True)
class Gates:
    """What a bundle must reach. Fidelity compares with the same reduction run by PyTorch in FP32.

    logits_cosine_min: cosine of the logits, worst step. kept_index_overlap_min: share of kept tokens both agree on.
    token_agreement_min: share of greedy tokens both agree on. quality_drop_max: points of task accuracy, 0..100, that
    this precision may lose. reduction_drop_max: points that the reduction may, None if that is yours to judge. latency_slowdown_max: percent that a stage may take longer than the baseline, and what it is
    measured to: twice as much is found.
    """

    logits_cosine_min: float = _number(0, 1)
    kept_index_overlap_min: float = _number(0, 1)
    token_agreement_min: float = _number(0, 1)
    quality_drop_max: float = _number(0, 100)
    reduction_drop_max: float | None = _known(0)
    latency_slowdown_max: float = field(default=2.5, metadata={"low": 0.1, "high": 1000})


@dataclass(frozen=True)
class Profile:
    """One target. `name` is the file's stem."""

    name: str
    device: Device
    description: str
    stack: Stack
    precision: Precision
    limits: Limits
    gates: Gates
    power_mode: str | None = None

    @property
    def memory(self) -> Memory:
        return self.device.memory

    @property
    def mode_name(self) -> str | None:
        """Of the power mode that is reckoned with."""
        return self.power_mode or next(iter(self.device.modes), None)

    @property
    def mode(self) -> Mode:
        return self.device.modes[self.mode_name] if self.mode_name else Mode()

    def in_mode(self, power_mode: str) -> Profile:
        """The same in another power mode. Raises UsageError for one that the device has not."""
        if power_mode not in self.device.modes:
            raise UsageError(
                f"Profile `{self.name}`: unknown power mode '{power_mode}'. {nearest(power_mode, self.device.modes)}"
            )
        return replace(self, power_mode=power_mode)


def devices() -> list[str]:
    """Names of the devices that ship with EdgeTrim, sorted."""
    return sorted(p.stem for p in DEVICES.glob("*.toml"))


def names() -> list[str]:
    """Names of the profiles that ship with EdgeTrim, sorted."""
    return sorted(p.stem for p in FOLDER.glob("*.toml") if not p.name.startswith("_"))


def is_path(text: str) -> bool:
    """Whether it names a file, not a profile that ships with EdgeTrim: it has a folder, or the ending .toml."""
    path = Path(text)
    return path.suffix == ".toml" or path.name != text


def load(name_or_path: str | Path) -> Profile:
    """The profile of that name, or the one in that TOML file (anything with a folder or the ending .toml).

    Raises:
        UsageError: unknown name, or a file that is missing or does not say what a profile says.
    """
    text = str(name_or_path)
    if is_path(text):
        return _read(Path(text))
    known = names()
    if text not in known:
        raise UsageError(f"Unknown profile '{text}'. {nearest(text, known)} A path to a .toml file works too.")
    return _read(FOLDER / f"{text}.toml")


def quantizers() -> list[str]:
    """Names of those that choose INT4 weights; the others are called like the type that they make."""
    types = get_args(get_type_hints(Precision)["weights"])
    return [name for name in _discover.names(exporter.quantize) if name not in types]


def with_quantizer(profile: Profile, name: str) -> Profile:
    """The profile with another quantiser. Raises UsageError: there is no such one, or nothing to quantise."""
    known = quantizers()
    if name not in known:
        raise UsageError(f"Unknown quantizer '{name}'. {nearest(name, known)}")
    if profile.precision.weights != "int4":
        raise UsageError(
            f"--quantizer {name} chooses INT4 weights, and profile `{profile.name}` has none. Choose one with INT4, see "
            "`edgetrim list profiles`."
        )
    return replace(profile, precision=replace(profile.precision, quantizer=name))


def with_kv(profile: Profile, kv: Literal["none", "int8"]) -> Profile:
    """The profile with another type of keys and values in the cache."""
    return replace(profile, precision=replace(profile.precision, kv=kv))


def with_islands(profile: Profile, islands: Literal["none", "auto"]) -> Profile:
    """The profile with or without a search for overflows. Raises UsageError: there is nothing that could overflow."""
    if islands == "auto" and profile.precision.compute != "fp16":
        raise UsageError(
            f"--islands auto is for FP16, and profile `{profile.name}` computes in {profile.precision.compute.upper()}. Leave it out, or "
            "choose one with FP16, see `edgetrim list profiles`."
        )
    return replace(profile, precision=replace(profile.precision, islands=islands))


def _read(path: Path) -> Profile:
    table = read_toml(path, "profile")
    if "name" in table:
        raise UsageError(f"Profile {path}: `name` is the file's name; remove the key.")
    if isinstance(device := table.get("device"), str):
        if device not in devices():
            raise UsageError(
                f"Profile {path.name}: unknown device '{device}'. {nearest(device, devices())} "
                "Or describe your own in a section [device]."
            )
        table["device"] = read_toml(DEVICES / f"{device}.toml", "profile")
    profile = _section(Profile, {"name": path.stem, **table}, path.name, "")
    if not profile.stack.compute_capabilities and profile.device.compute_capability is not None:
        own = replace(profile.stack, compute_capabilities=(profile.device.compute_capability,))
        profile = replace(profile, stack=own)
    _check(profile, path.name)
    return profile


def _section(kind: type[S], table: dict[str, Any], file: str, section: str) -> S:
    """A dataclass from a TOML table."""
    hints = get_type_hints(kind)
    known: dict[str, Field[Any]] = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    where = f" in [{section}]" if section else ""
    offered = [k for k in known if section or k != "name"]
    for key in table:
        if key not in known:
            raise UsageError(f"Profile {file}: unknown key '{key}'{where}. {nearest(key, offered)}")
    values = {}
    for key, f in known.items():
        if key in table:
            values[key] = _value(hints[key], table[key], f, file, section, key)
        elif f.default is MISSING and f.default_factory is MISSING:
            word = "section" if isinstance(hints[key], type) and hasattr(hints[key], "__dataclass_fields__") else "key"
            raise UsageError(f"Profile {file}: {word} '{key}' is missing{where}. Compare profiles/cpu_fp32.toml.")
    return kind(**values)


def _value(hint: Any, value: Any, f: Field[Any], file: str, section: str, key: str) -> Any:
    """One checked value of a section's key."""
    where = f"[{section}] {key}" if section else key
    inner = f"{section}.{key}" if section else key
    if hasattr(hint, "__dataclass_fields__"):
        if not isinstance(value, dict):
            raise UsageError(f"Profile {file}: '{inner}' must be a section, [{inner}]; found {_shown(value)}.")
        return _section(hint, value, file, inner)
    if get_origin(hint) is dict:
        kind = get_args(hint)[1]
        if not isinstance(value, dict) or not all(isinstance(v, dict) for v in value.values()):
            raise UsageError(f"Profile {file}: '{inner}' must hold sections, [{inner}.NAME]; found {_shown(value)}.")
        return {name: _section(kind, table, file, f"{inner}.{name}") for name, table in value.items()}
    hint = next((a for a in get_args(hint) if a is not type(None)), hint) if type(None) in get_args(hint) else hint
    expected, fits = _expectation(hint)
    if not fits(value):
        raise UsageError(f"Profile {file}: {where} must be {expected}; found {_shown(value)}.")
    low, high = f.metadata.get("low"), f.metadata.get("high")
    numbers = value if isinstance(value, list) else [value]
    if low is not None and not all(low <= n <= high for n in numbers):
        bounds = f"at least {low:g}" if high == float("inf") else f"in {low:g}..{high:g}"
        raise UsageError(f"Profile {file}: {where} must be {bounds}; found {_shown(value)}.")
    return tuple(value) if isinstance(value, list) else float(value) if hint is float else value


def _expectation(hint: Any) -> tuple[str, Callable[[Any], bool]]:
    """What a type takes, in words, and the check."""
    if get_origin(hint) is Literal:
        options = get_args(hint)
        return " or ".join(f'"{o}"' for o in options), lambda v: isinstance(v, str) and v in options
    if get_origin(hint) is tuple:
        if get_args(hint) == (str, ...):
            return "a list of names", lambda v: isinstance(v, list) and all(isinstance(n, str) for n in v)
        if get_args(hint)[-1] is Ellipsis:
            return "a list of whole numbers", lambda v: isinstance(v, list) and all(_whole(n) for n in v)
        return (
            "two whole numbers, [height, width]",
            lambda v: isinstance(v, list) and len(v) == 2 and all(_whole(n) for n in v),
        )
    if hint is int:
        return "a whole number", _whole
    if hint is float:
        return "a number", lambda v: _whole(v) or isinstance(v, float)
    assert hint is str, hint
    return "text that is not empty", lambda v: isinstance(v, str) and bool(v.strip())


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _check(profile: Profile, file: str) -> None:
    """What no single key can tell."""

    def fail(text: str) -> UsageError:
        return UsageError(f"Profile {file}: {text}")

    stack, precision = profile.stack, profile.precision
    known = _discover.names(exporter.backends)
    if stack.backend not in known:
        raise fail(f"[stack] unknown backend '{stack.backend}'. {nearest(stack.backend, known)}")
    if stack.backend == "trt":
        for key in ("module", "tensorrt"):
            if getattr(stack, key) is None:
                raise fail(f'[stack] backend "trt" needs `{key}` too.')
        if not stack.compute_capabilities:
            raise fail(
                '[stack] backend "trt" needs `compute_capabilities`, as in [87] for an Orin, or a device that has its own.'
            )
    elif stack.module or stack.tensorrt:
        raise fail('[stack] `module` and `tensorrt` belong to backend "trt"; remove them.')
    if profile.power_mode is not None and profile.power_mode not in profile.device.modes:
        known = list(profile.device.modes)
        raise fail(f"unknown power_mode '{profile.power_mode}'. {nearest(profile.power_mode, known)}")
    if stack.flavour is not None:
        flavours = _discover.names(exporter.flavours)
        if stack.flavour not in flavours:
            raise fail(f"[stack] unknown flavour '{stack.flavour}'. {nearest(stack.flavour, flavours)}")
    known = _discover.names(plugins)
    for name in stack.plugins:
        if name not in known:
            raise fail(f"[stack] unknown plugin '{name}'. {nearest(name, known)}")
    if len(set(stack.plugins)) < len(stack.plugins):
        raise fail("[stack] `plugins` names one twice.")
    if stack.plugins and stack.module != "tensorrt":
        runs = (
            "TensorRT-RTX has no plugins" if stack.module == "tensorrt_rtx" else f'backend "{stack.backend}" has none'
        )
        raise fail(f'[stack] `plugins` needs module "tensorrt": {runs}. Leave it out, the graphs work without.')
    for key in ("tensorrt", "jetpack"):
        text = getattr(stack, key)
        if text is not None and not all(part.isdecimal() for part in text.split(".")):
            raise fail(f'[stack] {key} must be a version such as "10.3"; found "{text}".')
    if (precision.weights == "int4") != bool(precision.blocks):
        raise fail('[precision] `blocks` goes with weights = "int4", and only with it; [128, 64, 32] is usual.')
    if precision.quantizer not in quantizers():
        raise fail(
            f"[precision] unknown quantizer '{precision.quantizer}'. {nearest(precision.quantizer, quantizers())}"
        )
    if precision.weights == "fp8" and (precision.compute != "fp16" or min(stack.compute_capabilities, default=0) < 89):
        raise fail(
            '[precision] weights = "fp8" goes with compute = "fp16" and GPUs from SM 8.9 on, `compute_capabilities` 89.'
        )
    if precision.weights == "nvfp4" and (
        precision.compute != "fp16" or stack.backend != "trt" or min(stack.compute_capabilities, default=0) < 100
    ):
        raise fail(
            '[precision] weights = "nvfp4" goes with compute = "fp16", backend "trt" and GPUs from SM 10.0 on, '
            "`compute_capabilities` 100."
        )
    if precision.weights != "int4" and (precision.quantizer != "rtn" or precision.error_max is not None):
        raise fail('[precision] `quantizer` and `error_max` go with weights = "int4".')
    if precision.islands != "none" and precision.compute != "fp16":
        raise fail('[precision] `islands` goes with compute = "fp16".')
    if any(b not in (16, 32, 64, 128, 256) for b in precision.blocks):
        raise fail(f"[precision] blocks may hold 16, 32, 64, 128 and 256; found {list(precision.blocks)}.")


def newer(version: str, oldest: str) -> bool:
    """Whether a version is at least `oldest`: "10.16" is newer than "10.3"."""
    return _release(version) >= _release(oldest)


def _release(version: str) -> tuple[int, ...]:
    """ "10.16.1.11" → (10, 16, 1, 11); stops at the first part that is no number."""
    parts: list[int] = []
    for part in version.split("."):
        if not part.isdecimal():
            break
        parts.append(int(part))
    return tuple(parts)
