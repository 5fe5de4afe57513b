"""Weights on their way from the checkpoint to the disk: bit by bit, once, and after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.checkpoint import Checkpoint
from exporter.errors import CheckpointError
from exporter.graphset import GraphSet
from exporter.job import Job
from exporter.journal import JOURNAL, DataFile
from exporter.pipeline import run_export
from exporter.plan import Plan, make_plan
from exporter.stages import _draw, _store
from exporter.stages._llm import draw_llm
from exporter.stages._modules import build_modules
from exporter.stages.export import export
from exporter.workspace import LOCK, PART, Workspace
from profiles import _schema
from tests.families import tiny

REDUCTIONS = ("visionzip:keep=8", "fastv:keep=4")

KILLED = """
import os, signal, sys
from pathlib import Path
from exporter.journal import DataFile
from exporter.job import Job
from exporter.pipeline import run_export
from exporter.workspace import Workspace

checkpoint, profile, out, pieces = sys.argv[1:]
write, left = DataFile._write, int(pieces)

def dying(self, name, offset, given):
    def until_then():
        global left
        for piece in given:
            if not left:
                self._file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            yield piece
    return write(self, name, offset, until_then())

DataFile._write = dying
with Workspace(Path(out)).locked() as work:
    run_export(Job(checkpoint, ("visionzip:keep=8", "fastv:keep=4"), profile), work)
"""
"""Exports, and dies in front of a piece of a tensor."""


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in float16, some of its values such as arithmetic would change."""
    folder = tmp_path_factory.mktemp("half")
    tiny.llava(folder)
    file = folder / "model.safetensors"
    tensors = {name: tensor.half() for name, tensor in load_file(file).items()}
    for tensor in tensors.values():
        bits = tensor.view(-1).view(torch.int16)
        bits[0], bits[1] = 0x0001, -0x8000  # the smallest subnormal, negative zero
    save_file(tensors, file, {"format": "pt"})
    return folder


def plan(folder: Path, profile: str, reductions: tuple[str, ...] = REDUCTIONS) -> Plan:
    return make_plan(Checkpoint(folder), reductions, _schema.load(profile))


@pytest.fixture(scope="module")
def exported(half: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path, GraphSet]:
    """In float16."""
    found, folder = plan(half, "rtx_fp16"), tmp_path_factory.mktemp("exported")
    return found, folder, export(found, folder)


def initializers(folder: Path, file: str) -> dict[str, npt.NDArray[Any]]:
    graph = onnx.load(folder / file).graph
    return {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_float16_is_copied_bit_by_bit(half: Path, exported: tuple[Plan, Path, GraphSet]) -> None:
    """Every weight of every graph has the bits that it has in the checkpoint; a Linear's are transposed."""
    found, folder, graphs = exported
    theirs = {
        found.family.canonical(name): t.view(torch.int16).numpy()
        for name, t in load_file(half / "model.safetensors").items()
    }
    prefix = {"vision": "vision.", "prefill": "text.", "decode": "text."}
    seen = 0
    for role, name in prefix.items():
        for key, array in initializers(folder, graphs.files[role]).items():
            stored = theirs.get("head.weight" if key == "lm_head.weight" else name + key)
            if stored is not None:
                ours, linear = array.view(np.int16), array.ndim == 2 and not key.endswith("position_embedding.weight")
                assert (ours == (stored.T if linear else stored)).all(), key
                seen += 1
    assert seen > 60
    embedding = np.load(folder / "embedding.npy").view(np.int16)
    assert (embedding == theirs["text.embed_tokens.weight"]).all()


@pytest.mark.parametrize("shape", [(5,), (3, 4), (700, 300), (2, 3, 4, 5)])
@pytest.mark.parametrize("transposed", [False, True])
def test_slices_are_the_tensor(shape: tuple[int, ...], transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_store, "SLICE", 4096)
    tensor = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    given = tensor.mT if transposed and len(shape) > 1 else tensor
    pieces = list(_store.slices(given))
    assert torch.equal(torch.cat(pieces), given)
    assert all(piece.is_contiguous() for piece in pieces)
    if shape == (700, 300):
        assert len(pieces) > 4


def test_slices_of_what_lies_as_it_is_wanted_are_no_copies() -> None:
    tensor = torch.zeros(3000, 1000)
    pieces = list(_store.slices(tensor))
    assert len(pieces) > 1
    assert [p.data_ptr() for p in pieces] == [p.data_ptr() for p in tensor.split(len(pieces[0]))]


def test_weights_are_written_once(exported: tuple[Plan, Path, GraphSet]) -> None:
    """Prefill and decode are two graphs with the same weights."""
    _, folder, graphs = exported
    assert graphs.prefill_apart
    where = []
    for role in ("prefill", "decode"):
        model = onnx.load(folder / graphs.files[role], load_external_data=False)
        external = {
            t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data
        }
        where.append({name: entry for name, entry in external.items() if entry["location"] == "llm.data"})
    assert where[0] == where[1]
    sizes = [int(entry["length"]) for entry in where[0].values()]
    assert (folder / "llm.data").stat().st_size < sum(sizes) + _store.ALIGN * len(sizes)


def test_a_missing_tensor_is_told_before_anything_is_traced(
    half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = load_file(half / "model.safetensors")
    del tensors[next(name for name in tensors if "layers.2.mlp.up_proj" in name)]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((half / "config.json").read_bytes())
    monkeypatch.setattr("exporter.stages.export.draw", lambda *given: pytest.fail("traced"))
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"has no tensor for `text\.layers\.2\.mlp\.up_proj\.weight`"):
        export(plan(tmp_path, "rtx_fp16"), tmp_path / "out")


def test_tensors_are_mapped_one_at_a_time(half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a tensor is written, no page of another one is mapped any more: they would count as memory in use."""
    if not sys.platform.startswith("linux"):
        pytest.skip("/proc tells what is mapped")
    mapped, write = [], DataFile._write

    def counting(self: DataFile, name: str, *rest: Any) -> Any:
        mapped.append(Path("/proc/self/maps").read_text().count(str(half / "model.safetensors")))
        return write(self, name, *rest)

    monkeypatch.setattr(DataFile, "_write", counting)
    export(plan(half, "rtx_fp16"), tmp_path)
    assert len(mapped) > 50
    assert set(mapped) == {0}


# --- killed -----------------------------------------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch, dies_at: int = -1) -> list[tuple[str, str]]:
    """(file, tensor) of all that is written from now on; asking for the n-th piece of all is an error."""
    written: list[tuple[str, str]] = []
    write, left = DataFile._write, dies_at

    def counting(self: DataFile, name: str, offset: int, pieces: Iterable[memoryview]) -> Any:
        def until_then() -> Iterator[memoryview]:
            nonlocal left
            for piece in pieces:
                if not left:
                    raise Dead
                left -= 1
                yield piece

        written.append((self.path.name, name))
        return write(self, name, offset, until_then())

    monkeypatch.setattr(DataFile, "_write", counting)
    return written


class Dead(BaseException):
    pass


def finished(folder: Path) -> list[tuple[str, str]]:
    lines = map(json.loads, (folder / JOURNAL).read_text().splitlines()[1:])
    return [(line["file"], line["name"]) for line in lines]


@pytest.mark.parametrize("profile", ["rtx_fp16", "rtx_int4"])
def test_what_was_finished_is_not_written_again(
    profile: str, half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever it ended, and as often as it did: the same bytes as without."""
    found = plan(half, profile)
    for name in ("undisturbed", "disturbed"):
        (tmp_path / name).mkdir()
    with monkeypatch.context() as patch:
        everything = counted(patch)
        export(found, tmp_path / "undisturbed")
    folder, done = tmp_path / "disturbed", list[tuple[str, str]]()
    for dies_at in (0, 1, 20, 40, -1):
        with monkeypatch.context() as patch:
            written = counted(patch, dies_at)
            with pytest.raises(Dead) if dies_at >= 0 else nullcontext():
                export(found, folder)
        assert written[0] == everything[len(done)]
        assert not set(written) & set(done)
        done = finished(folder) if dies_at >= 0 else []
    assert contents(folder) == contents(tmp_path / "undisturbed")


def test_killed_and_started_again(half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL in the middle of the language model, by the pipeline, in a process with other hashes: the result is the same, and
    nothing is left."""
    job, work = Job(str(half), REDUCTIONS, "rtx_fp16"), Workspace(tmp_path / "out")
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILLED, job.checkpoint, job.profile, str(work.folder), "60"]
    assert subprocess.run(command, env=environment, timeout=120, check=False).returncode == -signal.SIGKILL
    assert [p.name for p in work.folder.iterdir() if p.name != LOCK] == [f"{PART}graphs"]
    kept = finished(work.folder / f"{PART}graphs")
    assert len(kept) > 30
    undisturbed = Workspace(tmp_path / "undisturbed")
    undisturbed.folder.mkdir()
    run_export(job, undisturbed)
    again = counted(monkeypatch)
    with work.locked():
        run_export(job, work)
    assert again
    assert not set(again) & set(kept)
    assert contents(work.folder) == contents(undisturbed.folder)


def test_from_a_changed_checkpoint_nothing_is_kept(half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other weights of the same shapes, in a file of the same size."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(half, folder)
    for name in ("out", "anew"):
        (tmp_path / name).mkdir()
    with monkeypatch.context() as patch:
        counted(patch, 40)
        with pytest.raises(Dead):
            export(plan(folder, "rtx_fp16"), tmp_path / "out")
    weights = folder / "model.safetensors"
    save_file({name: -tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    for name in ("out", "anew"):
        export(plan(folder, "rtx_fp16"), tmp_path / name)
    assert contents(tmp_path / "out") == contents(tmp_path / "anew")


# --- depth and width --------------------------------------------------------------------------------------------------


def test_what_is_traced_grows_neither_with_depth_nor_with_width(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many programs of as many nodes for a deeper or wider model: time in torch's exporter depends on neither. What is drawn of
    them is linear in depth: every layer has as many nodes."""
    sizes: list[int] = []
    export_program = torch.export.export

    def counting(*given: Any, **named: Any) -> Any:
        program = export_program(*given, **named)
        sizes.append(len(program.graph.nodes))
        return program

    def drawn(name: str, **text: int) -> tuple[list[int], list[int]]:
        """What is traced in a process that has not traced anything yet, and the nodes of every layer."""
        monkeypatch.setattr(_draw, "_traced", {})
        sizes.clear()
        tiny.llava(tmp_path / name, **text)
        found = plan(tmp_path / name, "cpu_fp32", ())
        graph = draw_llm(found, build_modules(found).decode, torch.float32).graph
        layers = Counter(node.name.split("/")[1] for node in graph if node.name.startswith("layers/"))
        return list(sizes), list(layers.values())

    monkeypatch.setattr(torch.export, "export", counting)
    traced, layers = drawn("small")
    assert len(layers) == 4
    assert len(traced) < 8
    assert drawn("deep", num_hidden_layers=20) == (traced, layers[:1] * 20)
    assert drawn("wide", hidden_size=256, intermediate_size=640) == (traced, layers)
