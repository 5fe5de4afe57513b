"""Tiny models exported once and asked by many tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import PreTrainedModel

from exporter.backends.ort import OnnxRuntime
from exporter.checkpoint import Checkpoint
from exporter.families._contract import Request
from exporter.graphset import GraphSet
from exporter.lint import _table
from exporter.lint._check import Finding, findings, read
from exporter.plan import Plan
from exporter.runtime.generate import Generator, embedding
from exporter.stages._reference import reference
from exporter.stages.export import export
from profiles._schema import with_kv
from tests.families import tiny

SIZES = {"llava": None, "qwen2_5_vl": (140, 112)}
"""Image size of a family; Qwen's windows are cut by the border."""


@dataclass(frozen=True)
class Exported:
    plan: Plan
    folder: Path
    graphs: GraphSet

    def theirs(self) -> Generator:
        """The PyTorch reference. Its answers have no end."""
        runners, graphs, table = reference(self.plan)
        return Generator(runners, tiny.endless(graphs), table)


def plain(plan: Plan) -> Plan:
    """Without the profile's flavour: tests/flavours compares that with the plain graphs."""
    stack = replace(plan.profile.stack, flavour=None)
    return replace(plan, profile=replace(plan.profile, stack=stack))


def objections(graph: Path) -> list[Finding]:
    """What any target has against a graph."""
    model = read(graph)
    return [found for name in _table.names() for found in findings(graph.name, model, _table.load(name))]


AXES = {"qwen2_5_vl": (140, 112), "qwen3_vl": (140, 112)}
"""Families whose decoder has positions of three axes; Qwen3-VL adds planes behind layers, too. Their image size."""
DECODERS = (*tiny.DECODERS, *AXES)
"""Every type of decoder: LLaVA's with it, or that of a family which has its own."""


def decoder_of(decoder: str, folder: Path) -> PreTrainedModel:
    """A model with such a decoder, saved."""
    found: PreTrainedModel = getattr(tiny, decoder)(folder) if decoder in AXES else tiny.llava(folder, decoder=decoder)
    return found


def some(always: bool, *values: str) -> Any:
    """One case of a test with many."""
    return pytest.param(*values, id="-".join(values), marks=() if always else pytest.mark.slow)


def in_turn(names: Iterable[str], fits: Callable[[str, str], bool] = lambda name, decoder: True) -> list[Any]:
    """(name, decoder, what answers): the modules of every name with one decoder in turn; the graphs, with all of them, are slow."""
    found = []
    for number, name in enumerate(names):
        fitting = [decoder for decoder in DECODERS if fits(name, decoder)]
        found.append(some(True, name, fitting[(3 * number + 2) % len(fitting)], "modules"))
        found += [some(False, name, decoder, "graphs") for decoder in fitting]
    return found


Export = Callable[..., Exported]
Decoded = Callable[[str, str, str], tuple[Plan, Generator]]
Kv = Literal["none", "int8"]
Engine = Callable[..., Generator]


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, and lose a lot on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family → folder of its tiny checkpoint."""
    folders = {}
    for family in SIZES:
        folders[family] = tmp_path_factory.mktemp(family)
        getattr(tiny, family)(folders[family])
    return folders


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the CLIP that the tiny LLaVA's tower could have come from."""
    folder = tmp_path_factory.mktemp("clip")
    tiny.clip(folder)
    return folder


@pytest.fixture(scope="session")
def exported(checkpoints: dict[str, Path], clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """exported(family, reductions, frames=1, profile="cpu_fp32", kv="none"): plain graphs, exported once per session."""
    done: dict[tuple[str, tuple[str, ...], int, str, str], Exported] = {}

    def run(
        family: str, reductions: tuple[str, ...] = (), frames: int = 1, profile: str = "cpu_fp32", kv: Kv = "none"
    ) -> Exported:
        key = family, reductions, frames, profile, kv
        if key not in done:
            request = Request(frames, SIZES[family], Checkpoint(clip) if family == "llava" else None)
            plan = plain(tiny.plan(checkpoints[family], reductions, request, profile))
            plan = replace(plan, profile=with_kv(plan.profile, kv))
            folder = tmp_path_factory.mktemp("graphs")
            done[key] = Exported(plan, folder, export(plan, folder))
        return done[key]

    return run


@pytest.fixture(scope="session")
def saved() -> dict[str, Path]:
    """Decoder → folder of a model with it, as far as they were asked for."""
    return {}


@pytest.fixture
def decoded(saved: dict[str, Path], engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Decoded:
    """decoded(decoder, reduction, "modules" or "graphs"): a plan, and what answers without end: PyTorch's modules, or their plain
    graphs in ONNX Runtime."""

    def run(decoder: str, spec: str, what: str) -> tuple[Plan, Generator]:
        if decoder not in saved:
            saved[decoder] = tmp_path_factory.mktemp(decoder)
            decoder_of(decoder, saved[decoder])
        plan = plain(tiny.plan(saved[decoder], (spec,), Request(image_size=AXES.get(decoder))))
        if what == "modules":
            runners, graphs, table = reference(plan)
            return plan, Generator(runners, tiny.endless(graphs), table)
        folder = tmp_path_factory.mktemp("graphs")
        return plan, engine(Exported(plan, folder, export(plan, folder)))

    return run


@pytest.fixture
def engine() -> Iterator[Engine]:
    """engine(exported): a generator over ONNX Runtime whose answers have no end; exact, also for INT4 weights."""
    with ExitStack() as stack:

        def run(found: Exported) -> Generator:
            backend, runners = OnnxRuntime(threads=1, accuracy_level=0), {}
            for file, roles in found.graphs.roles().items():
                runners |= dict.fromkeys(roles, stack.enter_context(backend.runner(found.folder / file)))
            return Generator(runners, tiny.endless(found.graphs), embedding(found.folder, found.graphs))

        yield run
