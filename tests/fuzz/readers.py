"""Files of others, whole, and who reads each: what fuzzing damages. A reader that is not here is not fuzzed."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
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
from profiles import _schema
from tests.fuzz.damage import HOPELESS, damaged, damaged_bytes, json_bytes, text_of
from tests.test_graphset import example


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


def graph_set() -> dict[str, Any]:
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


def with_header(value: Any) -> bytes:
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
    of_json("graphs", "graphs.json", graph_set(), _read_graphs),
    of_json("estimate", ESTIMATE, {"refusals": ["too large"]}, lambda f: refuse_what_does_not_fit(Workspace(f))),
    of_json("config", "config.json", CONFIG, _read_config, preprocessor__config_json=_small("preprocessor_config.json")),
    of_json("processor", "preprocessor_config.json", json.loads(_small("preprocessor_config.json")), _read_config, config_json=CONFIG),
    of_json("shards", "model.safetensors.index.json", {"weight_map": {"a.weight": "one.safetensors", "b": "one.safetensors"}}, _read_shards, one_safetensors=TENSORS, config_json=CONFIG),
    Reader("tensors", "model.safetensors", TENSORS, _read_shards, damaged(_header()).map(with_header) | damaged_bytes(TENSORS) | st.sampled_from(HOPELESS), {"config.json": text_of(CONFIG)}),
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
