"""What cannot be is refused in words, before anything is traced or written."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import CheckpointError, ExportError, UsageError
from exporter.families._contract import Request, decoder_spec
from exporter.job import Job
from exporter.pipeline import run_export
from exporter.workspace import Workspace
from tests.families import tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """clip and siglip are LLaVA's; 16 visual tokens per image, or per step of Qwen's 112 × 112 pixels."""
    names = "clip", "siglip", "qwen2_5_vl", "video_llava", "internvl_chat", "fast_vlm"
    found = {name: tmp_path_factory.mktemp(name) for name in names}
    tiny.llava(found["clip"])
    tiny.llava(found["siglip"], "siglip_vision_model")
    tiny.qwen2_5_vl(found["qwen2_5_vl"])
    tiny.video_llava(found["video_llava"])
    tiny.internvl_chat(found["internvl_chat"])
    tiny.fast_vlm(found["fast_vlm"])
    return found


ONE, CLIP = Request(), Request(4)
SMALL, SMALL_CLIP = Request(1, (112, 112)), Request(4, (112, 112))

REFUSED: list[tuple[str, Request, tuple[str, ...], str]] = [
    # more than there is
    ("clip", ONE, ("uniform:keep=17",), r"`keep` must be in 1\.\.16.*found 17"),
    ("clip", ONE, ("visionzip:keep=18",), r"`keep` must be in 1\.\.17"),
    ("clip", ONE, ("visionzip:keep=6", "fastv:keep=7"), r"`keep` must be in 1\.\.6.*found 7"),
    ("qwen2_5_vl", SMALL, ("random:keep=17",), r"`keep` must be in 1\.\.16"),
    ("clip", ONE, ("fastv:layer=4",), r"`layer` must be in 1\.\.3, as the model has 4 decoder layers"),
    ("clip", CLIP, ("lftr:temporal=differential,keep_frames=5",), "keep_frames"),
    # a signal the model does not have
    ("siglip", ONE, ("lftr:spatial=topic,keep=4",), r"needs `cls`, but this model offers only .*`hidden`"),
    ("siglip", ONE, ("visionzip:keep=4,score=cls",), "needs .*`cls_attention`"),
    ("qwen2_5_vl", SMALL, ("lftr:spatial=topic,keep=4",), "needs `cls`"),
    ("clip", ONE, ("tome:keep=8", "visionzip:keep=4"), "does not fit llava: it needs .*attention"),
    ("clip", ONE, ("uniform:keep=8", "visionzip:keep=4"), "does not fit llava: it needs"),
    ("qwen2_5_vl", SMALL, ("tome:keep=8",), "merger needs the complete grid, so the tower cannot be shortened"),
    # class tokens that go on by themselves
    ("video_llava", CLIP, ("visionzip:keep=4,cls=on",), "passes class tokens on, which video_llava does anyway.*`cls` to off"),
    ("video_llava", CLIP, ("testa:keep=8,keep_frames=2",), "merges frames, and video_llava gives .* the class token of every one"),
    ("video_llava", CLIP, ("ldpv2",), "this model's projector gives row ends or class tokens, which a compressor does not have"),
    ("fast_vlm", ONE, ("tome:keep=2",), "its tower is made of convolutions, which need every patch"),
    ("fast_vlm", Request(1, (128, 100)), (), "must be multiples of 64"),
    # orders and pairs
    ("clip", ONE, ("lftr:spatial=text,keep=8", "random:keep=4"), r"random:keep=4 works on tower features.*Put it first"),
    ("clip", ONE, ("fastv", "fastv"), "given twice"),
    ("clip", ONE, ("tome:keep=8", "tome:keep=8"), "only one reduction can act inside the tower"),
    # the request
    ("clip", Request(0), (), "at least one frame"),
    ("clip", Request(99), (), r"allows \d+ frames, --frames asks for 99"),
    ("qwen2_5_vl", Request(1, (4004, 28)), (), r"allows images of 2048×2048, --image-size asks for 4004×28"),
    ("qwen2_5_vl", Request(3, (112, 112)), (), "merges 2 frames into one; pass a multiple"),
    ("qwen2_5_vl", Request(1, (100, 112)), (), r"100×112 does not fit: .* multiples of 28\. The nearest that fits is 112×112"),
    ("qwen2_5_vl", Request(1, (0, 28)), (), r"0×28 does not fit"),
    ("clip", Request(1, (112, 112)), (), "takes 56×56 images only"),
    # spelling
    ("clip", ONE, ("vizionzip:keep=4",), "Did you mean 'visionzip'"),
    ("clip", ONE, ("visionzip:kepe=4",), "has no knob `kepe`"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "request_", "specs", "message"), REFUSED, ids=["-".join([n, *s]) for n, _, s, _ in REFUSED]
)
def test_refusals_come_before_tracing(
    name: str, request_: Request, specs: tuple[str, ...], message: str, folders: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    def traced(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("traced")

    monkeypatch.setattr("torch.export.export", traced)
    monkeypatch.setattr("exporter.stages.export.build_modules", traced)
    job = Job(str(folders[name]), specs, "cpu_fp32", request_.frames, request_.image_size)
    with pytest.raises(UsageError, match=message):
        run_export(job, Workspace(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_family(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llavva"}')
    with pytest.raises(
        UsageError,
        match=r"model_type 'llavva', and there is no such family\. Known: .*\bllava, llava_llama, llava_next",
    ):
        tiny.plan(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_short_text_config_means_what_transformers_takes_it_for(kind: str) -> None:
    """llava-1.5-7b-hf gives little more than the model type; the rest is the default of the decoder's class."""
    import transformers

    short = {"model_type": kind, "rms_norm_eps": 1e-5, "vocab_size": 32064}
    full = transformers.AutoConfig.for_model(**short).to_dict()
    assert decoder_spec({"text_config": short}) == decoder_spec({"text_config": full})
    assert decoder_spec({"text_config": short}).hidden == 4096


BROKEN: list[tuple[str, dict[str, Any], str]] = [
    ("clip", {"text_config": {"model_type": "mamba"}}, "Decoder 'mamba' is not supported. Supported: gemma, .*llama"),
    ("clip", {"vision_config": {"model_type": "dino"}}, "Vision tower 'dino' is not supported"),
    ("clip", {"vision_config": None}, r"config\.json is not that of a llava model"),
    (
        "clip",
        {"text_config": {"model_type": "qwen2"}},
        r"config\.json is not that of a llava model .*num_hidden_layers",
    ),
    ("clip", {"vision_feature_layer": [-2, -3]}, "several feature layers"),
    ("clip", {"vision_feature_layer": 7}, "outside the tower's 3 blocks"),
    ("clip", {"vision_feature_select_strategy": "full"}, "'full' with 'clip_vision_model' is not supported"),
    ("internvl_chat", {"ps_version": "v1"}, "'v1', which transposes tiles, is not supported"),
    ("internvl_chat", {"force_image_size": 112}, "force_image_size 112 with positions for 56"),
    ("internvl_chat", {"llm_config": {"model_type": "internlm2"}}, "Decoder 'internlm2' is not supported"),
    (
        "fast_vlm",
        {"vision_config": {"architecture": "resnet50"}},
        "Vision tower 'resnet50' is not supported. Supported: fastvit_mci3",
    ),
    ("fast_vlm", {"vision_config": {"architecture": "fastvit_mci3"}}, "training form .*Merge them first"),
    ("qwen2_5_vl", {"vision_config": {}}, r"config\.json is not that of a qwen2_5_vl model"),
    ("qwen2_5_vl", {"text_config": {"model_type": "qwen2_5_vl_text"}}, "no mrope_section"),
]


@pytest.mark.parametrize(("name", "change", "message"), BROKEN)
def test_configs_that_do_not_fit(name: str, change: dict[str, Any], message: str, folders: Any, tmp_path: Path) -> None:
    config = json.loads((folders[name] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message):
        tiny.plan(tmp_path, (), SMALL if name == "qwen2_5_vl" else ONE)


def test_rotary_types_we_do_not_have(folders: Any, tmp_path: Path) -> None:
    config = json.loads((folders["clip"] / "config.json").read_text())
    config["text_config"]["rope_parameters"] = {"rope_type": "yarn", "factor": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="Rotary type 'yarn' is not supported"):
        tiny.plan(tmp_path)


def test_a_failing_export_leaves_what_was_there(folders: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def fail(*args: Any) -> None:
        raise CheckpointError("no")

    monkeypatch.setattr("exporter.stages.export.draw", fail)
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs" / "before").touch()
    with pytest.raises(ExportError, match="no"):
        run_export(Job(str(folders["clip"]), (), "cpu_fp32"), Workspace(tmp_path))
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == ["graphs", "graphs/before"]


@pytest.mark.parametrize(
    ("name", "request_", "specs", "counts", "policy"),
    [
        ("clip", ONE, (), [16], "keep"),
        ("clip", ONE, ("visionzip:keep=6",), [16, 6], "compact"),
        ("clip", ONE, ("visionzip:keep=6,position=keep",), [16, 6], "keep"),
        (
            "clip",
            CLIP,
            ("lftr:temporal=differential,keep_frames=2,spatial=topic,keep=4", "fastv:keep=3"),
            [64, 8, 3],
            "compact",
        ),
        ("clip", ONE, ("fastv:keep=3", "tome:keep=8"), [16, 8, 3], "compact"),
        ("qwen2_5_vl", SMALL_CLIP, ("uniform:keep=4",), [32, 8], "keep"),
        ("qwen2_5_vl", SMALL, ("visionzip:keep=4",), [16, 4], "keep"),
    ],
)
def test_counts_follow_the_places(
    name: str, request_: Request, specs: tuple[str, ...], counts: list[int], policy: str, folders: Any
) -> None:
    """In the order in which they act, whatever the order they were given in."""
    plan = tiny.plan(folders[name], specs, request_)
    steps = [(s.before, s.after) for s in plan.steps]
    assert steps == list(itertools.pairwise(counts))
    assert plan.policy == policy
    assert plan.kept == [s.after for s in plan.steps if s.method.place != "in_llm"][-1] if steps else 16
    assert [s.summary.split(" tokens ")[0] for s in plan.steps] == [
        f"{s.name}: {s.before} → {s.after}" for s in plan.steps
    ]
    for record, step in zip(plan.record(), plan.steps, strict=True):
        assert record["before"] == step.before
        assert json.loads(json.dumps(record)) is not None
