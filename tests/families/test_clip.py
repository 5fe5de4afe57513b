"""The CLIP checkpoint beside the model's: our text tower and the way into the shared space against transformers' CLIPModel,
questions against its tokenizer, and what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPTokenizer

from exporter.checkpoint import Checkpoint
from exporter.errors import CheckpointError, UsageError
from exporter.families._contract import Request
from exporter.plan import Plan
from exporter.runtime.question import QuestionTokenizer
from exporter.stages._modules import load_reference
from exporter.stages.export import export
from tests.families import tiny

SPEC = "trim:keep=4,text=clip"
LONG = "how many cats are on the mat, and how many of them sleep"
TEXTS = ["how many?", "is it red", "", LONG]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {
        n: tmp_path_factory.mktemp(n) for n in ("clip", "early", "wide", "shallow", "llava", "siglip", "qwen2_5_vl")
    }
    tiny.clip(found["clip"])
    tiny.clip(found["early"], early=True)
    tiny.clip(found["wide"], hidden=64)
    tiny.clip(found["shallow"], layers=1)
    tiny.llava(found["llava"])
    tiny.llava(found["siglip"], "siglip_vision_model")
    tiny.qwen2_5_vl(found["qwen2_5_vl"])
    return found


def planned(folders: dict[str, Path], clip: str | Path | None = "clip", model: str = "llava", spec: str = SPEC) -> Plan:
    size = (112, 112) if model == "qwen2_5_vl" else None
    folder = folders[clip] if isinstance(clip, str) else clip
    return tiny.plan(folders[model], (spec,), Request(2, size, folder and Checkpoint(folder)))


def question(plan: Plan) -> Any:
    tower = load_reference(plan).question
    assert tower is not None
    return tower


@torch.no_grad()
def of_text(folder: Path, ids: Any) -> torch.Tensor:
    return CLIPModel.from_pretrained(folder).eval().get_text_features(torch.as_tensor(ids)).pooler_output


@pytest.mark.parametrize("clip", ["clip", "early"])
def test_text_tower(clip: str, folders: dict[str, Path]) -> None:
    """Whatever is behind the end of text: padding, more text, a second end."""
    tower = question(planned(folders, clip))
    ids = np.random.default_rng(0).integers(0, 74, (4, tiny.QUESTION_TOKENS))
    ids[0, 7:], ids[1, 3], ids[2, [5, 9]], ids[3, -1] = 75, 75, 75, 75
    found = tower(torch.from_numpy(ids))
    torch.testing.assert_close(found, of_text(folders[clip], ids), atol=1e-5, rtol=1e-5)


def test_the_two_conventions_of_the_end_of_text(folders: dict[str, Path]) -> None:
    """Early configs: the highest id is the end, wherever 2 stands. Later ones: the token that the config names."""
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 74, (1, tiny.QUESTION_TOKENS)))
    ids[0, 3], ids[0, 7] = 2, 75
    changed = ids.clone()
    changed[0, 8:] = 1
    early = question(planned(folders, "early"))
    torch.testing.assert_close(early(ids), early(changed))
    torch.testing.assert_close(early(ids), of_text(folders["early"], ids), atol=1e-5, rtol=1e-5)
    changed[0, 5] = 1
    assert (early(ids) - early(changed)).abs().max() > 1e-2


def test_a_config_of_the_first_days(folders: dict[str, Path], tmp_path: Path) -> None:
    """text_config_dict, where there is one, counts more than text_config, its defaults included."""
    shutil.copytree(folders["early"], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    named = {k: v for k, v in config["text_config"].items() if k not in ("eos_token_id", "hidden_act")}
    config["text_config_dict"] = {**named, "eos_token_id": 75}
    config["text_config"]["num_attention_heads"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = QuestionTokenizer.load(tmp_path).encode(TEXTS)
    found = question(planned(folders, tmp_path))(torch.from_numpy(ids))
    torch.testing.assert_close(found, of_text(tmp_path, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", [-2, -1])
@torch.no_grad()
def test_patches_in_the_shared_space(layer: int, folders: dict[str, Path], tmp_path: Path) -> None:
    """With CLIP's own tower in the model: CLIP's last norm and projection of the patches; of the class token behind the
    last block they are CLIP's image features."""
    clip = CLIPModel.from_pretrained(folders["clip"]).eval()
    model: Any = tiny.llava(tmp_path)
    model.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    model.config.vision_feature_layer = layer
    model.save_pretrained(tmp_path)
    plan = planned({**folders, "llava": tmp_path})
    assert plan.taps == ("hidden", "aligned")
    tower: Any = load_reference(plan).vision
    pixels = torch.randn(3, 2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    theirs = clip.vision_model(pixels.flatten(0, 1), output_hidden_states=True).hidden_states[layer]
    expected = clip.visual_projection(clip.vision_model.post_layernorm(theirs))
    assert tower(pixels)[1].shape == (3, 2, 16, 24)
    torch.testing.assert_close(tower(pixels)[1].flatten(0, 1), expected[:, 1:], atol=1e-5, rtol=1e-5)
    if layer == -1:
        features = clip.get_image_features(pixels.flatten(0, 1)).pooler_output
        tap = tower.tap_aligned
        found = tap.visual_projection(tap.post_layernorm(theirs[:, 0]))
        torch.testing.assert_close(found, features, atol=1e-5, rtol=1e-5)


def test_questions_are_those_of_the_tokenizer(folders: dict[str, Path]) -> None:
    """A text that is too long loses its tail, never its end token."""
    ids = QuestionTokenizer.load(folders["clip"]).encode(TEXTS)
    theirs = CLIPTokenizer.from_pretrained(folders["clip"])
    expected = theirs(TEXTS, padding="max_length", truncation=True, max_length=tiny.QUESTION_TOKENS)["input_ids"]
    assert ids.dtype == np.int64
    assert ids.tolist() == expected
    assert ids[3, 0] == 74
    assert (ids == 75).any(1).all()
    assert len(theirs(LONG)["input_ids"]) > tiny.QUESTION_TOKENS


def test_padding_as_the_files_say(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["clip"], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": {"content": "?"}}))
    ids = QuestionTokenizer.load(tmp_path).encode(["a"])
    assert ids.tolist() == [[74, 37, 75, *[36] * (tiny.QUESTION_TOKENS - 3)]]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "[PAD]"}))
    with pytest.raises(CheckpointError, match=r"no padding token '\[PAD\]'"):
        QuestionTokenizer.load(tmp_path)


REFUSED = [
    ("wide", "llava", UsageError, "3 blocks of width 64; expected width 48 and at least the 2 blocks"),
    ("shallow", "llava", UsageError, "1 blocks of width 48; expected width 48 and at least the 2 blocks"),
    ("llava", "llava", UsageError, "model_type 'llava', expected 'clip'"),
    ("clip", "siglip", UsageError, "this llava model's tower is not CLIP's.* Leave --clip-model out"),
    ("clip", "qwen2_5_vl", UsageError, "this qwen2_5_vl model's tower is not CLIP's.* Leave --clip-model out"),
    (None, "llava", UsageError, "needs `aligned`, `aligned_text`.*if --clip-model names their CLIP"),
]


@pytest.mark.parametrize(("clip", "model", "error", "message"), REFUSED)
def test_what_does_not_fit(clip: str | None, model: str, error: Any, message: str, folders: Any) -> None:
    with pytest.raises(error, match=message):
        planned(folders, clip, model)


def test_other_refusals_do_not_speak_of_clip(folders: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="found 99") as caught:
        planned(folders, None, spec="trim:keep=99")
    assert "clip" not in str(caught.value).replace("clip-model", "")
    assert "--clip-model" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"text_config": {"vocab_size": "many"}}, "not that of a CLIP model"), ({"projection_dim": 25}, "has shape")],
)
def test_configs_that_do_not_fit(
    change: dict[str, Any], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["clip"], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in change.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load_reference(planned(folders, tmp_path))


def test_a_checkpoint_without_tokenizer_is_refused_before_tracing(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.stages.export.draw", lambda *_: pytest.fail("traced"))
    shutil.copytree(folders["clip"], tmp_path / "clip")
    (tmp_path / "clip" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"There is no .*tokenizer\.json"):
        export(planned(folders, tmp_path / "clip"), tmp_path)


def test_who_does_not_ask_does_not_get(folders: dict[str, Path], tmp_path: Path) -> None:
    """A CLIP checkpoint that no reduction needs leaves nothing in the export."""
    plan = planned(folders, spec="uniform:keep=4")
    assert {"aligned", "aligned_text"} <= plan.geometry.tower.signals
    assert plan.clip is None
    graphs = export(plan, tmp_path)
    assert "question" not in graphs.files
    assert (graphs.side, graphs.question_tokens) == ({}, 0)
    assert not list(tmp_path.rglob("*question*")) + list(tmp_path.rglob("clip"))
