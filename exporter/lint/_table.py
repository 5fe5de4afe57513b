"""Tables: what one version of a parser and builder takes, refuses or gets wrong, each entry with its source.

A file has

[[operators]]
    `names` that the parser can import; `domain`, if it is not ONNX's own. What no such entry names is rejected.
[[types]]
    `types` that each of `operators` takes in its first input, or in that of number `input`.
[[rule]]
    A node of `operators` for which all conditions in `when` hold (`exporter.lint._conditions`) gets the `verdict`; `what` says why,
    `fix` what to do.
[[function]]
    The same for local functions.

and with every entry its `source`. Anything else in it is an error.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from exporter.errors import ExportError, nearest
from exporter.lint import _conditions
from plugins._contract import DOMAIN
from profiles._schema import Stack

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).resolve().parent

TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
"""Modules as people call them."""

Verdict = Literal["rejected", "miscompiled", "slow"]
"""rejected: not parsed, or not built. miscompiled: built without a word, but another graph. slow: right, at a price."""


@dataclass(frozen=True)
class Rule:
    """when: functions that take what a condition takes first, and say whether it holds."""

    operators: tuple[str, ...]
    when: tuple[Callable[..., bool], ...]
    verdict: Verdict
    what: str
    fix: str
    source: str


@dataclass(frozen=True)
class Types:
    """What the input of that number may be, in TensorRT's names."""

    input: int
    names: frozenset[str]
    source: str


@dataclass(frozen=True)
class Table:
    """One file. `operators`: (domain, name) → source of it."""

    module: str
    version: str
    operators: Mapping[tuple[str, str], str]
    types: Mapping[str, Types]
    rules: Mapping[str, tuple[Rule, ...]]
    functions: tuple[Rule, ...]

    @property
    def name(self) -> str:
        return f"{TITLES.get(self.module, self.module)} {self.version}"


def names() -> list[str]:
    """Names of all tables, `tensorrt-10.3`, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def table_for(stack: Stack) -> Table | None:
    """The table of a profile's stack: of its module the newest that is not newer than the profile's version, else the oldest; with the
    profile's plugins. None if there is none of its module."""
    found = sorted((_release(name), name) for name in names() if name.split("-")[0] == stack.module)
    if not found or stack.tensorrt is None:
        return None
    oldest, *newer = found
    fitting = [name for version, name in newer if version <= _release(f"-{stack.tensorrt}")]
    table = load([oldest[1], *fitting][-1])
    plugins = {(DOMAIN, name): f"plugins/{name}.py" for name in stack.plugins}
    return replace(table, operators={**table.operators, **plugins})


@cache
def load(name: str) -> Table:
    """The table in `<name>.toml`. Raises ExportError where it does not say what a table says."""
    return read(FOLDER / f"{name}.toml")


def read(path: Path) -> Table:
    """A table from a file. Raises as `load`."""
    reader = _Reader(path.name)
    with path.open("rb") as file:
        raw = tomllib.load(file)
    module, _, version = path.stem.partition("-")
    parts = {key: reader.entries(raw, key) for key in ("operators", "types", "rule", "function")}
    reader.no_others(raw, parts, "the file")
    operators = {(domain, name): source for e in parts["operators"] for domain, name, source in reader.importers(e)}
    types: dict[str, Types] = {}
    for entry in parts["types"]:
        for name, taken in reader.types(entry).items():
            reader.check(name not in types, f"[[types]] names {name} twice")
            types[name] = taken
    rules: dict[str, list[Rule]] = {}
    for entry in parts["rule"]:
        rule = reader.rule(entry, ("node", "opset"))
        for name in rule.operators:
            rules.setdefault(name, []).append(rule)
    for name in (*types, *rules):
        known = any(name == other for _, other in operators)
        reader.check(known, f"{name} has types or rules, but no [[operators]] names it")
    functions = tuple(reader.rule(entry, ("function", "model")) for entry in parts["function"])
    return Table(module, version, operators, types, {k: tuple(v) for k, v in rules.items()}, functions)


def _release(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.partition("-")[2].split("."))


class _Reader:
    """Checks one file as it is read."""

    def __init__(self, file: str) -> None:
        self.file = file

    def check(self, holds: bool, text: str) -> None:
        if not holds:
            raise ExportError(f"{self.file}: {text}.")

    def no_others(self, entry: Mapping[str, Any], known: Iterable[str], where: str) -> None:
        for key in entry:
            self.check(key in known, f"unknown key '{key}' in {where}; {nearest(key, known).rstrip('.')}")

    def entries(self, raw: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
        found = raw.get(key, [])
        self.check(
            isinstance(found, list) and all(isinstance(e, dict) for e in found), f"[[{key}]] must be a list of tables"
        )
        return list(found)

    def value(self, entry: Mapping[str, Any], key: str, kind: str, where: str) -> Any:
        self.check(key in entry, f"{where} has no '{key}': {dict(entry)}")
        self.check(_fits(entry[key], kind), f"'{key}' of {where} is {entry[key]!r}")
        return entry[key]

    def importers(self, entry: Mapping[str, Any]) -> list[tuple[str, str, str]]:
        self.no_others(entry, ("names", "domain", "source"), "[[operators]]")
        domain = self.value({"domain": "", **entry}, "domain", "str", "[[operators]]")
        source = self.value(entry, "source", "text", "[[operators]]")
        return [(domain, name, source) for name in self.value(entry, "names", "list[str]", "[[operators]]")]

    def types(self, entry: Mapping[str, Any]) -> dict[str, Types]:
        self.no_others(entry, ("operators", "types", "input", "source"), "[[types]]")
        number = self.value({"input": 0, **entry}, "input", "int", "[[types]]")
        taken = frozenset(self.value(entry, "types", "list[str]", "[[types]]"))
        source = self.value(entry, "source", "text", "[[types]]")
        return dict.fromkeys(self.value(entry, "operators", "list[str]", "[[types]]"), Types(number, taken, source))

    def rule(self, entry: Mapping[str, Any], subject: tuple[str, str]) -> Rule:
        """subject: the first two parameters of the conditions that may be used."""
        where = "[[rule]]" if subject[0] == "node" else "[[function]]"
        named = ("operators",) if subject[0] == "node" else ()
        self.no_others(entry, (*named, "when", "verdict", "what", "fix", "source"), where)
        verdict = self.value(entry, "verdict", "text", where)
        self.check(
            verdict in get_args(Verdict), f"verdict '{verdict}'; {nearest(verdict, get_args(Verdict)).rstrip('.')}"
        )
        when = self.value({"when": {}, **entry}, "when", "dict", where)
        what, fix, source = (self.value(entry, key, "text", where) for key in ("what", "fix", "source"))
        operators = tuple(self.value(entry, "operators", "list[str]", where)) if named else ()
        held = tuple(self.condition(name, settings, subject) for name, settings in when.items())
        return Rule(operators, held, verdict, what, fix, source)

    def condition(self, name: str, settings: Any, subject: tuple[str, str]) -> Callable[..., bool]:
        offered = _offered(subject)
        self.check(name in offered, f"unknown condition '{name}'; {nearest(name, offered).rstrip('.')}")
        function = offered[name]
        wanted = dict(list(inspect.signature(function).parameters.items())[2:])
        same = isinstance(settings, dict) and settings.keys() == wanted.keys()
        self.check(same, f"condition '{name}' takes {list(wanted)}; found {settings}")
        for key, value in settings.items():
            kind = str(wanted[key].annotation)
            self.check(_fits(value, kind), f"'{key}' of condition '{name}' must be {kind}; found {value!r}")
        return lambda node, context: function(node, context, **settings)


@cache
def _offered(subject: tuple[str, str]) -> dict[str, Callable[..., bool]]:
    """The conditions whose first parameters are these."""
    functions = {k: v for k, v in vars(_conditions).items() if inspect.isfunction(v) and not k.startswith("_")}
    return {k: v for k, v in functions.items() if tuple(inspect.signature(v).parameters)[:2] == subject}


def _fits(value: Any, kind: str) -> bool:
    """kind: as in an annotation, or "text", which is not empty."""
    if kind in ("str", "text"):
        return isinstance(value, str) and (kind == "str" or bool(value.strip()))
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if kind == "dict":
        return isinstance(value, dict)
    scalars = (int, float, str) if kind == "list[int | float | str]" else (str,)
    return isinstance(value, list) and bool(value) and all(isinstance(v, scalars) for v in value)
