"""Whatever a file of others holds, its reader takes it or refuses it in words: no other error, no end in sight, nothing outside the folder."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.numpy import save as safetensors

from exporter import baselines, embedded, journal
from exporter.backends._contract import EngineRecord, Layer
from exporter.backends._engine_cache import EngineCache
from exporter.backends._onnx_file import OnnxFile, external_files
from exporter.baselines import Baseline, Session, Spread
from exporter.bundle import MANIFEST, SCHEMA, Bundle, contents
from exporter.checkpoint import Checkpoint
from exporter.cli import _results, inspect
from exporter.deploy import deploy, fleet
from exporter.engines import checked_engine, engine_records
from exporter.errors import ExportError
from exporter.graphset import GraphSet
from exporter.job import Job
from exporter.pipeline import ESTIMATE, refuse_what_does_not_fit
from exporter.plan import make_plan
from exporter.report._data import Layers, ReportData
from exporter.runtime.generate import embedding
from exporter.runtime.prompt import Prompt
from exporter.stages import _answers, _recorded, _task
from exporter.tune import journal as search_journal
from exporter.tune.found import Cost, Refused
from exporter.workspace import Workspace
from graphs import _spec
from graphs._contract import ReductionError
from profiles import _schema
from tests.fuzz.damage import HOPELESS, OUTSIDE, damaged, damaged_bytes, json_bytes, text_of
from tests.test_graphset import example

HANG_S = 60
"""A reader that has not come back then never will: the files are a few kilobytes."""


@dataclass(frozen=True)
class Reader:
    """A file of others and who reads it. files: the rest of a folder that is whole. read: is given the folder."""

    name: str
    file: str
    whole: bytes
    read: Callable[[Path], object]
    damage: st.SearchStrategy[bytes]
    files: dict[str, bytes]
    linked: bool = True
    """Whether a link out of the folder lies in it; a bundle is refused for that alone."""


def of_json(name: str, file: str, value: Any, read: Callable[[Path], object], **files: bytes | Any) -> Reader:
    return Reader(name, file, text_of(value), read, json_bytes(value), _others(files))


def of_lines(name: str, file: str, values: list[Any], read: Callable[[Path], object], **files: bytes | Any) -> Reader:
    whole = b"".join(text_of(value) + b"\n" for value in values)
    broken = (
        damaged(values).filter(lambda v: isinstance(v, list)).map(lambda v: b"\n".join(text_of(line) for line in v))
    )
    return Reader(name, file, whole, read, broken | damaged_bytes(whole) | st.sampled_from(HOPELESS), _others(files))


def of_bytes(name: str, file: str, whole: bytes, read: Callable[[Path], object], **files: bytes | Any) -> Reader:
    return Reader(name, file, whole, read, damaged_bytes(whole) | st.sampled_from(HOPELESS), _others(files))


def _others(files: dict[str, Any]) -> dict[str, bytes]:
    """By file name, with `__` for what a keyword cannot hold: `graphs__a_onnx` is graphs/a.onnx."""
    return {
        name.replace("__", "/").replace("_", "."): data if isinstance(data, bytes) else text_of(data)
        for name, data in files.items()
    }


# --- what is read --------------------------------------------------------------------------------------------------------


def _bundle() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "job.json").write_bytes(b"{}")
        Path(folder, "graphs").mkdir()
        Path(folder, "graphs", "a.onnx").write_bytes(b"graph")
        return {
            "schema": SCHEMA,
            "edgetrim": "0",
            "opset": 21,
            "versions": {"numpy": "2"},
            "files": contents(Path(folder)),
        }


JOB = {
    "checkpoint": "embedded",
    "reductions": ["visionzip:keep=32"],
    "profile": "cpu_int4",
    "frames": 1,
    "image_size": None,
    "clip": None,
}
ENGINE = asdict(EngineRecord(("vision",), "vision.engine", "0" * 64, 7, 1.5, 100.0, "trt", {"module": "tensorrt_rtx"}))
CONFIG = json.loads((embedded.CHECKPOINT / "config.json").read_text())
TENSORS = safetensors({"a.weight": np.zeros((2, 3), np.float32), "b": np.ones(4, np.float16)})
BASELINE = asdict(
    Baseline("orin", {"checkpoint": "a", "reductions": "b"}).with_session(
        "c", Session("2026-01-01T00:00:00Z", "0", {"load": 0.1}, {"ttft": Spread((1.0, 2.0), 3.0, 8)})
    )
)
PROFILE = (_schema.FOLDER / "orin_nano_8gb_int4.toml").read_bytes()
PART = asdict(journal.Part("weights.data", "one", 0, 4, "0" * 64))
IMAGE = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\1\0\0\0\1\x08\2\0\0\0\x90wS\xde\0\0\0\x0cIDATx\x9cc\xf8\xff\xff?\0\5\xfe\2\xfe\xdc\xccY\xe7\0\0\0\0IEND\xaeB`\x82"


def _graphs() -> dict[str, Any]:
    return asdict(example()) | {
        "reductions": [
            {
                "name": "visionzip",
                "place": "before_llm",
                "spec": "visionzip:keep=2",
                "before": 4,
                "after": 2,
                "knobs": {"keep": 2},
                "paper": "",
            }
        ]
    }


def _read_graphs(folder: Path) -> None:
    found = GraphSet.load(folder)
    assert set(found.roles()) <= set(found.files.values())
    assert all(isinstance(n, int) for n in (found.text.width, found.images, found.visual.total, *found.text.kept))


def _read_engines(folder: Path) -> None:
    for record in engine_records(Workspace(folder)):
        checked_engine(folder, record)


def _read_shards(folder: Path) -> None:
    found = Checkpoint(folder)
    found.stored()
    found.fingerprint()
    for name in found._where:
        found.tensor(name)


def _read_config(folder: Path) -> None:
    found = Checkpoint(folder)
    found.quantized  # noqa: B018
    make_plan(found, [], _schema.load("cpu_int4"))


def _read_prompt(folder: Path) -> None:
    found = Prompt.load(folder)
    found.encode(found.question("what?"))


def _read_questions(folder: Path) -> None:
    for question in _task.from_file(folder / "questions.jsonl", 1):
        assert question.score(question.answer) >= 0


def _read_journal(folder: Path) -> None:
    with journal.DataFile(folder / "weights.data", journal.Journal(folder, ["origin"])) as file:
        assert file.part("one", [memoryview(b"1234")]).size == 4
        file.part("two", [memoryview(b"56")], 4)
    assert (folder / "weights.data").read_bytes() == b"123456"


def _read_search(folder: Path) -> None:
    found = search_journal.Journal(folder / "tune.jsonl", {"checkpoint": "a"})
    for key in list(found.known):
        cost = found.read(key, Cost)
        assert isinstance(cost, Refused) or cost.memory_mib >= 0
    search_journal.Journal(folder / "tune.jsonl", {"checkpoint": "a"})


def _read_baseline(folder: Path) -> None:
    found = baselines.load(folder / "b.json")
    found.path(folder)
    json.dumps(asdict(found))


def _read_onnx(folder: Path) -> None:
    OnnxFile(folder / "a.onnx")
    for path in external_files(folder / "a.onnx").values():
        path.read_bytes()


def _inspect(folder: Path) -> None:
    _, parts = inspect._graph(folder / "a.onnx", 2)
    Console(file=io.StringIO()).print(*parts)


def _show(name: str) -> Callable[[Path], object]:
    """As `inspect` shows it."""

    def read(folder: Path) -> None:
        _, parts = _results.evidence(Workspace(folder), name, getattr(_results, name))
        Console(file=io.StringIO()).print(*parts)

    return read


def _read_embedding(folder: Path) -> None:
    embedding(folder, example())[:1].sum()


def _recording() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        sample = {
            "pixel_values": np.zeros((1, 1, 3, 2, 2), np.float32),
            "prompt": np.arange(4),
            "logits": np.zeros((2, 5), np.float32),
        }
        _recorded.save([sample], path := Path(folder, "a.npz"))
        return path.read_bytes()


def _table() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        np.save(path := Path(folder, "a.npy"), np.zeros((16, 8), np.float32))
        return path.read_bytes()


def _onnx() -> bytes:
    from onnx import TensorProto, helper

    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="weights.data")
    inner = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["z"])],
        "inner",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [2])],
    )
    nodes = [
        helper.make_node("Add", ["x", "w"], ["y"], name="scope/add"),
        helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in "xy"]
    return bytes(helper.make_model(helper.make_graph(nodes, "g", ports[:1], ports[1:], [weight])).SerializeToString())


def _header() -> dict[str, Any]:
    return dict(json.loads(TENSORS[8 : 8 + int.from_bytes(TENSORS[:8], "little")]))


def _with_header(value: Any) -> bytes:
    header = text_of(value)
    return len(header).to_bytes(8, "little") + header + bytes(64)


def _small(name: str) -> bytes:
    return (embedded.CHECKPOINT / name).read_bytes()


TOKENIZER = {"tokenizer_json": _small("tokenizer.json"), "tokenizer__config_json": _small("tokenizer_config.json")}
LAYERS = Layers("ort", 4, {"vision": [Layer("a/b", "Add", ("a",), "float [1]", "CPU", 0.5)]})
REPORT = asdict(ReportData("t", "c", "llava", "cpu", "ort", "fp32", "here", "now", 5, 4, 2, [], layers=LAYERS))
CACHED = {"sha256": "0" * 64, "facts": {"build_s": 1.0}}
RECORD = {
    "schema": deploy.RECORD_SCHEMA,
    "host": "a",
    "utc": "b",
    "facts": {},
    "latency": {"variants": {"x": {"ttft": {"median_ms": 1.0}}}},
}

VALIDATION = {
    "executed": "ONNX Runtime", "questions": 4, "notes": ["a"], "gates": [{"words": "b"}], "regressions": {"causes": {"reduction": 1}},
    "fidelity": [{"stage": "vision", "cosine": 1.0, "max_abs": 0.1, "agreement": None, "gate": "", "passed": True}],
    "quality": [{"label": "engine", "scores": {"cell": [1.0, 2]}}],
}  # fmt: skip
COST = asdict(Cost(64, 32, 900.0, 5.0, 50.0, 60.5, ""))
SEARCH = [{"made_from": {"checkpoint": "a"}}, {"key": "one", "value": COST}, {"key": "two", "value": {"left_out": "a"}}]
LATENCY = {
    "executed": "ONNX Runtime", "rounds": 3, "machine": {"processor": "a", "cores": 2, "load": 0.5},
    "variants": {name: {"ttft": {"median_ms": 2.0}} for name in ("engine_reduced", "engine_unreduced")},
}  # fmt: skip

READERS = [
    Reader("manifest", MANIFEST, text_of(_bundle()), lambda f: Bundle.open(f).bytes, json_bytes(_bundle()), {"job.json": b"{}", "graphs/a.onnx": b"graph"}, False),
    of_json("job", "job.json", JOB, lambda f: Job.read(Workspace(f)).loaded_profile()),
    of_json("job's plan", "job.json", JOB, lambda f: Job.read(Workspace(f)).plan(weights=False)),
    of_json("engines", "engines/engines.json", [ENGINE], _read_engines, engines__vision_engine=b"engine!"),
    of_json("graphs", "graphs.json", _graphs(), _read_graphs),
    of_json("estimate", ESTIMATE, {"refusals": ["too large"]}, lambda f: refuse_what_does_not_fit(Workspace(f))),
    of_json("config", "config.json", CONFIG, _read_config, preprocessor__config_json=_small("preprocessor_config.json")),
    of_json("processor", "preprocessor_config.json", json.loads(_small("preprocessor_config.json")), _read_config, config_json=CONFIG),
    of_json("shards", "model.safetensors.index.json", {"weight_map": {"a.weight": "one.safetensors", "b": "one.safetensors"}}, _read_shards, one_safetensors=TENSORS, config_json=CONFIG),
    Reader("tensors", "model.safetensors", TENSORS, _read_shards, damaged(_header()).map(_with_header) | damaged_bytes(TENSORS) | st.sampled_from(HOPELESS), {"config.json": text_of(CONFIG)}),
    of_json("tokenizer", "tokenizer.json", json.loads(_small("tokenizer.json")), _read_prompt),
    of_json("tokenizer's config", "tokenizer_config.json", json.loads(_small("tokenizer_config.json")), _read_prompt, tokenizer_json=_small("tokenizer.json")),
    of_bytes("chat template", "chat_template.jinja", _small("chat_template.jinja"), _read_prompt, tokenizer_json=_small("tokenizer.json")),
    of_bytes("profile", "own.toml", PROFILE, lambda f: _schema.load(f / "own.toml")),
    of_bytes("fleet", "fleet.toml", b'hosts = ["user@one", "two:folder"]\n', lambda f: fleet.read(f / "fleet.toml")),
    of_lines("questions", "questions.jsonl", [{"image": "a.png", "question": "How many?", "answer": 2, "metric": "numeric"}], _read_questions, a_png=IMAGE),
    of_lines("journal", ".journal", [{"made_from": ["origin"]}, PART, PART | {"name": "two", "offset": 4, "size": 2}], _read_journal, weights_data=b"123456"),
    of_lines("answers", "answers.jsonl", [{"question": "a", "answer": "b"}], lambda f: _answers.Answers(f / "answers.jsonl")),
    of_lines("search", "tune.jsonl", SEARCH, _read_search),
    of_json("baseline", "b.json", {"schema": baselines.SCHEMA, **BASELINE}, _read_baseline),
    of_bytes("graph", "a.onnx", _onnx(), _read_onnx, weights_data=b"12345678"),
    of_bytes("graph that is inspected", "a.onnx", _onnx(), _inspect),
    of_json("validation", "evidence/validation.json", VALIDATION, _show("validation")),
    of_json("latency", "evidence/latency.json", LATENCY, _show("latency")),
    of_json("engine cache", "k.json", CACHED, lambda f: EngineCache(f).fetch("k", f / "engine"), k_engine=b"engine!"),
    of_json("report", "report.json", REPORT, lambda f: ReportData.from_json((f / "report.json").read_text(errors="replace"))),
    of_json("device's record", "devices/a.json", RECORD, lambda f: [deploy.medians(r) for r in deploy.records(f)]),
    of_bytes("recording", "a.npz", _recording(), lambda f: _recorded.load(f / "a.npz")),
    of_bytes("embedding", "embedding.npy", _table(), _read_embedding),
]  # fmt: skip


# --- what must hold ------------------------------------------------------------------------------------------------------


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
    "graphs without decode": ("graphs", text_of(_graphs() | {"files": {"vision": "a.onnx"}})),
    "graphs with text for a number": ("graphs", text_of(_graphs() | {"text": _graphs()["text"] | {"hidden": "8"}})),
    "estimate with a table": ("estimate", b'{"refusals": {"a": 1}}'),
    "config, nested": ("config", b'{"a":' * 100_000),
    "processor that is no text": ("processor", b"\xff\xfe{"),
    "tensors that end nowhere": (
        "tensors",
        _with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, float("inf")]}}),
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
