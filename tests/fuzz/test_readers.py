"""Whatever a file of others holds, its reader takes it or refuses it in words: no other error, no end in sight, nothing outside the folder."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporter.errors import ExportError
from graphs import _spec
from graphs._contract import ReductionError
from tests.fuzz.damage import OUTSIDE, damaged_bytes, text_of
from tests.fuzz.readers import ENGINE, IMAGE, JOB, PART, READERS, Reader, graph_set, with_header

HANG_S = 60
"""A reader that has not come back then never will: the files are a few kilobytes."""


class Opened:
    """Files that Python opens while a reader reads."""

    def __init__(self) -> None:
        self.watching = False
        self.outside: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.watching and event == "open" and isinstance(arguments[0], str):
            with contextlib.suppress(OSError, ValueError):
                if OUTSIDE in Path(os.path.realpath(arguments[0])).parts:
                    self.outside.append(arguments[0])


OPENED = Opened()


class Hung(BaseException):
    pass


@contextlib.contextmanager
def not_for_ever() -> Iterator[None]:
    def late(*_: object) -> None:
        raise Hung

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(HANG_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def laid_out(reader: Reader, data: bytes) -> Iterator[Path]:
    """A folder with the file and those beside it, a link out of it, and what lies outside."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as base:
        folder, outside = Path(base, "folder"), Path(base, OUTSIDE)
        outside.mkdir()
        (outside / "secret").write_bytes(IMAGE)
        folder.mkdir()
        if reader.linked:
            (folder / "link").symlink_to(outside)
        for name, content in {**reader.files, reader.file: data}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        yield folder


def check(reader: Reader, data: bytes) -> str:
    """Read it once; returns what was said, "" if it was taken."""
    with laid_out(reader, data) as folder:
        OPENED.outside.clear()
        OPENED.watching = True
        try:
            with not_for_ever():
                reader.read(folder)
            said = ""
        except (ExportError, ReductionError) as e:
            said = str(e)
            assert said.strip()
        finally:
            OPENED.watching = False
        assert not OPENED.outside
        assert (folder.parent / OUTSIDE / "secret").read_bytes() == IMAGE
        assert [p.name for p in folder.parent.iterdir() if p.name not in ("folder", OUTSIDE)] == []
        return said


def fuzz(reader: Reader, examples: int, seed: bool) -> None:
    @settings(
        max_examples=examples, derandomize=seed, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(reader.damage)
    def run(data: bytes) -> None:
        check(reader, data)

    run()


IDS = [reader.name for reader in READERS]


@pytest.mark.parametrize("reader", READERS, ids=IDS)
def test_what_is_whole_is_taken(reader: Reader) -> None:
    if reader.name in ("engines", "estimate", "journal"):
        return  # refuse, or hold nothing that matches: see their own tests
    assert check(reader, reader.whole) == ""


@pytest.mark.parametrize("reader", READERS, ids=IDS)
def test_damage_is_told_in_words(reader: Reader) -> None:
    fuzz(reader, 60, True)


def _external(location: str) -> bytes:
    """An ONNX file that wants weights from there."""
    entry = _field(1, b"location") + _field(2, location.encode())
    return _field(7, _field(5, _field(13, entry)))


def _field(number: int, content: bytes) -> bytes:
    size, head = len(content), bytearray([number << 3 | 2])
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    return bytes(head) + bytes([size]) + content


def _nested(depth: int) -> bytes:
    """A graph in an attribute of a node of a graph, and so on."""
    graph = b""
    for _ in range(depth):
        graph = _field(1, _field(5, _field(6, graph)))
    return _field(7, graph)


FOUND = {
    "manifest of a schema without end": ("manifest", b'{"schema": 1e999, "files": {}}'),
    "job with a profile outside": ("job", text_of(JOB | {"profile": "../outside/secret"})),
    "job with half an image size": ("job's plan", text_of(JOB | {"image_size": [56]})),
    "job with a reduction that is none": ("job's plan", text_of(JOB | {"reductions": [None]})),
    "engines in a table": ("engines", b'{"a": {}}'),
    "engine of another type": ("engines", text_of([ENGINE | {"file": None}])),
    "graphs.json, nested": ("graphs", b"[" * 100_000),
    "graphs without decode": ("graphs", text_of(graph_set() | {"files": {"vision": "a.onnx"}})),
    "graphs with text for a number": ("graphs", text_of(graph_set() | {"text": graph_set()["text"] | {"hidden": "8"}})),
    "estimate with a table": ("estimate", b'{"refusals": {"a": 1}}'),
    "config, nested": ("config", b'{"a":' * 100_000),
    "processor that is no text": ("processor", b"\xff\xfe{"),
    "tensors that end nowhere": (
        "tensors",
        with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, float("inf")]}}),
    ),
    "template with a zero byte": ("chat template", b"a\0b"),
    "template that divides by zero": ("chat template", b"{{ 1 / 0 }}"),
    "template that is no text": ("chat template", b"\xff\xfe{"),
    "templates in a list of numbers": ("tokenizer's config", b'{"chat_template": [1]}'),
    "journal with text for a place": (
        "journal",
        b'{"made_from": ["origin"]}\n' + text_of(PART) + b"\n" + text_of(PART | {"offset": "0"}),
    ),
    "journal before the beginning": ("journal", b'{"made_from": ["origin"]}\n' + text_of(PART | {"offset": -4})),
    "answers, nested": ("answers", b"[" * 100_000),
    "record, nested": ("device's record", b"[" * 100_000),
    "cached facts, nested": ("engine cache", b"[" * 100_000),
    "recording that is no archive": ("recording", b"PK"),
    "table with a header that does not end": ("embedding", b"\x93NUMPY\x01\0\x0c\0{'descr': ((\n\n"),
    "graph, nested": ("graph", _nested(2000)),
    "graph with a number without end": ("graph", b"\x3a" + b"\xff" * 1_000_000),
    "graph with weights outside": ("graph", _external("../outside/secret")),
    "graph with weights behind a link": ("graph", _external("link/secret")),
    "baseline of a schema without end": ("baseline", b'{"schema": 1e999}'),
    "question with a name too long": ("questions", text_of({"image": "x" * 5000, "question": "a", "answer": "b"})),
}
"""What fuzzing found: damage that was a traceback, endless or outside."""


@pytest.mark.parametrize("found", FOUND)
def test_what_was_found_stays_mended(found: str) -> None:
    name, data = FOUND[found]
    check(READERS[IDS.index(name)], data)


BOUNDED = ("search", "manifest", "job", "engines", "graphs", "estimate", "config", "processor", "shards", "tokenizer's config", "profile", "fleet", "baseline", "device's record", "engine cache")  # fmt: skip


@pytest.mark.parametrize("name", BOUNDED)
def test_a_file_without_end_is_not_read_to_its_end(name: str) -> None:
    """A terabyte of nothing: whoever reads it whole runs out of memory."""
    reader = READERS[IDS.index(name)]
    with laid_out(reader, b"") as folder:
        try:
            os.truncate(folder / reader.file, 2**40)
        except OSError:
            pytest.skip("this file system has no such files")
        with contextlib.suppress(ExportError), not_for_ever():
            reader.read(folder)


# --- reduction specs -----------------------------------------------------------------------------------------------------


def _specs() -> st.SearchStrategy[str]:
    method = st.sampled_from(_spec.names())
    knob = st.sampled_from(
        sorted({knob.name for name in _spec.names() for knob in _spec.describe(name).knobs})
    ) | st.text(max_size=5)
    value = st.sampled_from(
        ["1", "0", "-1", "0.5", "1e999", "nan", "none", "on", "1+2", "9" * 30, "../outside/secret", "\0"]
    ) | st.text(max_size=5)
    item = st.tuples(knob, value).map("=".join)
    one = st.tuples(method, st.lists(item, max_size=3).map(",".join)).map(lambda p: f"{p[0]}:{p[1]}" if p[1] else p[0])
    examples = st.sampled_from([spec for name in _spec.names() for spec in _spec.examples(name)])
    broken = examples.flatmap(lambda spec: damaged_bytes(spec.encode())).map(lambda raw: raw.decode(errors="replace"))
    return st.lists(one, min_size=1, max_size=3).map("+".join) | examples | broken | st.text(max_size=20)


def _check_spec(text: str) -> None:
    with not_for_ever():
        try:
            found = _spec.parse(text)
        except ReductionError:
            return
        assert _spec.parse(_spec.format(found)) == found


def test_a_spec_is_read_or_refused_and_written_as_it_was_read() -> None:
    settings(max_examples=300, derandomize=True, database=None, deadline=None)(given(_specs())(_check_spec))()


@pytest.mark.slow
def test_more_specs() -> None:
    settings(max_examples=10_000, database=None, deadline=None)(given(_specs())(_check_spec))()


@pytest.mark.parametrize("text", ["restore:keep=64+" * 3000, "a" * 10**6, "visionzip:" + "keep=1," * 10**5])
def test_a_spec_of_any_length_is_refused_in_words(text: str) -> None:
    with pytest.raises(ReductionError):
        _spec.parse(text)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS, ids=IDS)
def test_more_damage_is_told_in_words(reader: Reader) -> None:
    fuzz(reader, int(os.environ.get("EDGETRIM_FUZZ", "2000")), False)
