"""What every family must do, walked over whatever lies in exporter/families/: a new file is picked up by itself."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import exporter.families
from exporter import _discover
from exporter.checkpoint import Checkpoint
from exporter.errors import UsageError
from exporter.families._contract import Family, Geometry, Request
from exporter.nn.decoder import Decoder
from exporter.weights import sources
from graphs import _spec
from tests.families import tiny

NAMES = _discover.names(exporter.families)
REQUESTS = (Request(), Request(1, (112, 112)))


@pytest.fixture(params=NAMES)
def family(request: pytest.FixtureRequest) -> Family:
    found = _discover.load(exporter.families, "family", request.param).FAMILY
    assert isinstance(found, Family)
    return found


@pytest.fixture
def checkpoint(family: Family, tmp_path: Path) -> Checkpoint:
    """The family's tiny checkpoint."""
    build = getattr(tiny, family.model_type, None)
    assert build is not None, (
        f"tests/families/tiny.py has no builder `{family.model_type}(folder)`: add one that saves a tiny random checkpoint "
        "of this family, and compare it with its Hugging Face model in tests/families/test_parity.py"
    )
    build(tmp_path)
    return Checkpoint(tmp_path, family.canonical)


@pytest.mark.parametrize("name", NAMES)
def test_listing_families_needs_no_torch(name: str) -> None:
    code = (
        f"import sys; from exporter.families.{name} import FAMILY as f; assert f.model_type == {name!r}, f.model_type; "
        "assert f.summary and len(f.summary) < 120; heavy = {'torch', 'transformers', 'onnx'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_its_document_says_what_it_covers(family: Family) -> None:
    assert (sys.modules[type(family).__module__].__doc__ or "").strip().endswith(".")


def test_every_tensor_has_one_canonical_name(family: Family, checkpoint: Checkpoint) -> None:
    """And there it stays: canonical names are their own."""
    keys = [key for path in checkpoint.shards for key in load_file(path)]
    names = [family.canonical(key) for key in keys]
    assert len(set(names)) == len(keys)
    assert {name.partition(".")[0] for name in names} <= {"vision", "projector", "text", "head"}
    assert [family.canonical(name) for name in names] == names


def test_modules_find_their_weights(family: Family, checkpoint: Checkpoint) -> None:
    """All parameters are in the checkpoint, in the right shape; none of its tensors is forgotten without a reason."""
    geometry = geometry_of(family, checkpoint)
    with torch.device("meta"):
        modules = [
            (family.vision(checkpoint, geometry, ("hidden",), None), "vision"),
            (family.projector(checkpoint, geometry), "projector"),
            (Decoder(family.decoder(checkpoint)), "text"),
        ]
    used = {"text.embed_tokens.weight"}
    for module, prefix in modules:
        for source in sources(module, prefix).values() if module is not None else ():
            assert tuple(source.read(checkpoint).shape) == source.shape
            used |= {part.name for part in getattr(source, "parts", (source,))}
    if geometry.compressor:
        compressor = _spec.parse(geometry.compressor).fit(geometry.tower)
        for name, shape in compressor.trained(geometry.tower).items():
            assert checkpoint.stored()[f"projector.{name}"].shape == shape
            used.add(f"projector.{name}")
    forgotten = {n for n in checkpoint._where if n not in used and n.startswith(("text.", "head.", "projector."))}
    assert not forgotten


def test_the_published_config_is_one_of_this_family(family: Family) -> None:
    """Of whatever size the family takes when none is asked for."""
    published = Checkpoint.of_config(family.published).named(family.canonical)
    assert published.config["model_type"].replace("-", "_") == family.model_type
    check_geometry(family.geometry(published, Request()))


def test_geometry_is_consistent(family: Family, checkpoint: Checkpoint) -> None:
    check_geometry(geometry_of(family, checkpoint))


def check_geometry(g: Geometry) -> None:
    assert g.grid[0] * g.grid[1] == g.tower.tokens
    assert (len(g.ids) - g.fixed) * g.placeholders == g.tower.total
    assert len(set(g.ids)) == len(g.ids)
    assert g.frames % g.image.parts == 0
    assert bool(g.mark) == bool(g.written)
    assert all(len(i) == g.position_axes for i in g.ids)
    assert g.span > max(max(i) for i in g.ids)
    assert (0 <= g.image_token < g.vocab) is not bool(g.spliced)
    assert {"hidden", "text", "text_mask"} <= g.tower.signals
    assert isinstance(g.in_tower, str) or g.in_tower.depth > 0
    assert all(0 <= token < g.vocab for token in g.eos)


def geometry_of(family: Family, checkpoint: Checkpoint) -> Geometry:
    """With the first of the requests that the family takes."""
    for request in REQUESTS:
        with contextlib.suppress(UsageError):
            return family.geometry(checkpoint, request)
    raise AssertionError(f"{family.model_type} takes none of {REQUESTS}")
