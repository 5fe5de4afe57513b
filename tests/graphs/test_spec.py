"""Specs as text: what parses, what is refused and with which words."""

from __future__ import annotations

import subprocess
import sys

import pytest

from graphs import _spec
from graphs._contract import ReductionError, Site
from graphs.divprune import DivPrune
from graphs.fastv import FastV
from graphs.lftr import Lftr
from graphs.restore import Restore
from graphs.tome import ToMe
from graphs.uniform import Uniform
from graphs.visionzip import VisionZip


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("fastv", FastV()),
        ("fastv:layer=3,keep_ratio=0.25", FastV(3, None, 0.25)),
        ("fastv:keep_ratio=1", FastV(keep_ratio=1.0)),
        ("visionzip:keep=64,order=raster,position=keep", VisionZip(keep=64, order="raster", position="keep")),
        ("visionzip:contextual=none,keep=8", VisionZip(keep=8)),
        ("tome:schedule=linear,keep=3", ToMe(3, schedule="linear")),
        ("tome:schedule=13", ToMe(schedule=(13,))),
        ("tome:schedule=13+12+11", ToMe(schedule=(13, 12, 11))),
        (
            "lftr:temporal=similarity,keep_frames=4,spatial=topic,keep=64,cls=on",
            Lftr("similarity", 4, "topic", 64, None, True),
        ),
        ("restore:keep=64+uniform", Restore(keep=64, selector=Uniform())),
        ("restore+divprune:per_step=4", Restore(selector=DivPrune(per_step=4))),
        (
            "restore:share=1,keep_ratio=0.5 + lftr:spatial=topic",
            Restore(None, 0.5, 1.0, selector=Lftr(spatial="topic")),
        ),
        (" lftr : spatial = text , keep = 4 , cls = false ", Lftr(spatial="text", keep=4)),
    ],
)
def test_parse_and_back(text: str, method: object) -> None:
    parsed = _spec.parse(text)
    assert parsed == method
    assert _spec.parse(_spec.format(parsed)) == parsed


def test_format_leaves_defaults_out() -> None:
    assert _spec.format(FastV()) == "fastv"
    assert _spec.format(Lftr("similarity", 4, cls=True)) == "lftr:temporal=similarity,keep_frames=4,cls=on"
    site = Site(24, 1, (4, 6), frozenset({"hidden", "keys"}), 3)
    fitted = ToMe(keep=14).fit(site)
    assert _spec.format(fitted) == "tome:position=compact,keep=14,schedule=4+3+3"
    assert _spec.parse(_spec.format(fitted)).fit(site) == fitted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vizionzip", "there is no reduction 'vizionzip'. Did you mean 'visionzip'? Known: "),
        ("zzz", "there is no reduction 'zzz'. Known: "),
        ("", "there is no reduction ''"),
        ("_spec", "there is no reduction '_spec'"),
        ("restore:keep=64", "restore wraps another reduction; write restore+NAME or restore:knob=value,…+NAME"),
        ("restore:keep=64+", "restore wraps another reduction"),
        ("restore:keep=64+zzz", "there is no reduction 'zzz'"),
        ("restore:selector=uniform+uniform", "restore has no knob `selector`"),
        ("fastv:", "'fastv:' ends after the colon"),
        ("fastv:layer", "'layer' in 'fastv:layer' is not of the form knob=value"),
        ("fastv:layer=", "'layer=' in 'fastv:layer=' is not of the form"),
        ("fastv:keep=3,,layer=2", "'' in 'fastv:keep=3,,layer=2' is not of the form"),
        (
            "fastv:layers=3",
            "fastv has no knob `layers`. Did you mean 'layer'? Knobs: position=auto, layer=2, keep=none, keep_ratio=none, rope=on.",
        ),
        ("fastv:layer=two", "`layer` of fastv takes a whole number; found 'two'"),
        ("fastv:layer=2.0", "`layer` of fastv takes a whole number; found '2.0'"),
        ("fastv:keep_ratio=nan", "`keep_ratio` of fastv takes a number or none; found 'nan'"),
        ("fastv:keep=3,keep=4", "`keep` is given twice"),
        ("visionzip:score=topic", "`score` of visionzip takes auto, cls or column; found 'topic'"),
        ("lftr:cls=1", "`cls` of lftr takes on or off; found '1'"),
        ("tome:schedule=1+x", "`schedule` of tome takes constant, linear or whole numbers joined by +; found '1+x'"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(ReductionError) as e:
        _spec.parse(text)
    assert message in str(e.value)


def test_describe() -> None:
    found = _spec.describe("fastv")
    assert (found.name, found.place, found.needs) == ("fastv", "in_llm", ("attention_row",))
    assert found.paper == "Chen et al. 2024, arXiv:2403.06764"
    assert found.summary == "Drop the visual tokens the last prompt token does not look at, inside the language model."
    assert [(k.name, k.default, k.takes) for k in found.knobs] == [
        ("position", "auto", "auto, keep or compact"),
        ("layer", "2", "a whole number"),
        ("keep", "none", "a whole number or none"),
        ("keep_ratio", "none", "a number or none"),
        ("rope", "on", "on or off"),
    ]


def test_methods_import_no_torch() -> None:
    """Listing, parsing and fitting must work on a machine without torch."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from graphs import _spec; from graphs._contract import Site\n"
        "for n in _spec.names(): _spec.describe(n); [_spec.parse(e) for e in _spec.examples(n)]\n"
        "site = Site(576, 8, (24, 24), frozenset('hidden cls keys cls_attention attention_row'.split()), 24)\n"
        "for s in ('visionzip:keep=64', 'tome:keep=64', 'fastv'): m = _spec.parse(s).fit(site); m.after(site)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
