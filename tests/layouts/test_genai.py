"""onnxruntime-genai answers as our own runtime does, with the files that the layout `genai` writes."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from exporter.embedded import digits
from exporter.families._contract import Request
from exporter.graphset import GraphSet
from exporter.layouts._write import made, write
from exporter.stages.export import export
from tests.conftest import needs_genai
from tests.families import tiny
from tests.stages.conftest import Engine, Exported, engine, plain  # noqa: F401

NEW, VOCAB = 12, 96
CHAT = "<|user|><image>{}<|assistant|>"
"""Of the embedded model."""
FILES = ("genai_config.json", "genai_vision.onnx", "genai_embedding.onnx", "genai_decoder.onnx")
KEEP, COMPACT = "uniform:keep_ratio=0.75,position=keep", "uniform:keep_ratio=0.75,position=compact"
CASES: dict[str, tuple[str, Request, tuple[str, ...]]] = {
    "gaps": ("llava", Request(1), (KEEP,)),
    "no gaps": ("llava", Request(1), (COMPACT,)),
    "CLS shares a place": ("llava", Request(1), ("visionzip:keep=6,cls=on,position=keep",)),
    "M-RoPE": ("qwen2_5_vl", Request(1, (140, 112)), (KEEP,)),
    "DeepStack": ("qwen3_vl", Request(1, (112, 84)), (KEEP,)),
    "tiles": ("llava_next", Request(1, (112, 56)), (KEEP,)),
    "prompt seen ahead": ("paligemma", Request(1), (KEEP,)),
    "images seen ahead, windows": ("gemma3", Request(2), ()),
    "learned positions": ("blip_2", Request(1), (COMPACT,)),
    "no image token": ("mobilevlm", Request(2), ()),
    "two images in one block": ("mobilevlm", Request(2), ("uniform:keep_ratio=0.75,space=llm,position=compact",)),
}
QUICK = {"gaps", "CLS shares a place", "M-RoPE", "prompt seen ahead", "images seen ahead, windows"}


@pytest.fixture(scope="module")
def og() -> Any:
    found = importlib.import_module("onnxruntime_genai")
    found.disable_telemetry_events()
    return found


def expanded(prompt: Sequence[int], graphs: GraphSet) -> list[int]:
    """As many image tokens as there are visual ones; in one block at the first, where they are renumbered."""
    visual, found, left = graphs.visual, list[int](), graphs.visual.kept
    share = visual.kept if visual.policy == "compact" else visual.kept // visual.placeholders
    for token in prompt:
        count = min(share, left) if token == graphs.text.image_token else 1
        found += [token] * count
        left -= count if token == graphs.text.image_token else 0
    return found


def answer(og: Any, model: Any, prompt: Sequence[int], pixels: Any, visual: int) -> list[int]:
    """What genai says: NEW tokens, or less."""
    inputs = og.NamedTensors()
    inputs["pixel_values"] = pixels
    inputs["num_image_tokens"] = np.array([visual], np.int64)
    inputs["input_ids"] = np.array([prompt], np.int32)
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + NEW)
    generator = og.Generator(model, parameters)
    generator.set_inputs(inputs)
    while not generator.is_done():
        generator.generate_next_token()
    found: list[int] = generator.get_sequence(0)[len(prompt) :].tolist()
    return found


@pytest.mark.parametrize("flavour", ["plain", "ort"])
@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in CASES])
@needs_genai
def test_genai_answers_as_we_do(case: str, flavour: str, og: Any, tmp_path: Path, engine: Engine) -> None:  # noqa: F811
    family, request, reductions = CASES[case]
    getattr(tiny, family)(tmp_path)
    plan = tiny.plan(tmp_path, reductions, request)
    folder = tmp_path / "graphs"
    folder.mkdir()
    plan = plan if flavour == "ort" else plain(plan)
    found = Exported(plan, folder, export(plan, folder))
    asked = [tiny.question(found.graphs, seed, text) for seed, text in ((0, (11, 12, 13)), (1, (14, 15)))]
    ours = [engine(found).generate(q.pixels, [q.prompt], NEW).tokens[0] for q in asked]
    never = next(token for token in range(VOCAB) if not any(token in answer for answer in ours))
    endless = replace(found.graphs, text=replace(found.graphs.text, eos=[never]))
    write(made("genai", endless, folder, plan.profile), folder)
    model = og.Model(str(folder))
    prompts = [expanded(q.prompt, found.graphs) for q in asked]
    theirs = [answer(og, model, p, q.pixels, endless.visual.kept) for p, q in zip(prompts, asked, strict=True)]
    assert theirs == ours


EXAMPLES = (("cpu_fp32", ()), ("cpu_int4", ("visionzip:keep=32",)))
FURTHER = (("cpu_int4", ()), ("cpu_fp32", ("visionzip:keep=32",)), ("cpu_int8", ("visionzip:keep=32,position=keep",)))


@pytest.mark.parametrize(
    ("profile", "reductions"), [*EXAMPLES, *(pytest.param(*f, marks=pytest.mark.slow) for f in FURTHER)]
)
@needs_genai
def test_the_documented_example(
    profile: str,
    reductions: tuple[str, ...],
    og: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    edgetrim: Any,
) -> None:
    """As a user goes: export, pack, then the page's program; it answers as `chat` does."""
    folder, picture = tmp_path / "out", tmp_path / "mosaic.png"
    asked = digits.held_out("cell", 1, seed=3)[0]
    Image.fromarray(asked.frames[0]).save(picture)
    specs = [part for spec in reductions for part in ("--reduce", spec)]
    assert edgetrim("export", "embedded", *specs, "--profile", profile, "-o", folder).code == 0
    said = edgetrim("pack", folder, "--layout", "genai", "--json")
    assert said.code == 0
    assert set(FILES) <= {Path(name).name for name in json.loads(said.out)["manifest"]["files"]}
    assert edgetrim("verify", folder).code == 0
    assert edgetrim("build", folder).code == 0
    expected = edgetrim("chat", folder, "--image", picture, asked.question).out.split()[0]

    page = (Path(__file__).parents[2] / "docs" / "bundle.md").read_text()
    program = page.partition("```python\n")[2].partition("```")[0]
    given = f"folder, picture, prompt = {str(folder / 'graphs')!r}, {str(picture)!r}, {CHAT.format(asked.question)!r}\n"
    program, count = re.subn(r"^folder, picture, prompt = .*\n", lambda _: given, program, flags=re.M)
    assert count == 1
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == [expected], done.stderr


def test_without_genai(tmp_path: Path, engine: Engine) -> None:  # noqa: F811
    """Its loop over the three graphs written out here, names and sizes as genai_config.json says: for machines that lack it."""
    tiny.llava(tmp_path)
    folder = tmp_path / "graphs"
    folder.mkdir()
    plan = tiny.plan(tmp_path, (KEEP,), Request(1))
    found = Exported(plan, folder, export(plan, folder))
    write(made("genai", found.graphs, folder, plan.profile), folder)
    asked = tiny.question(found.graphs)
    ours = engine(found).generate(asked.pixels, [asked.prompt], NEW).tokens[0]
    assert ByHand(folder).answer(expanded(asked.prompt, found.graphs), asked.pixels) == ours


class ByHand:
    """What genai does with a model of one prompt (src/models/multi_modal.cpp)."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "genai_config.json").read_text())["model"]
        self.sessions = {
            part: onnxruntime.InferenceSession(
                folder / self.config[part]["filename"], providers=["CPUExecutionProvider"]
            )
            for part in ("vision", "embedding", "decoder")
        }

    def run(self, part: str, outputs: Sequence[str] | None, feeds: dict[str, Any]) -> list[Any]:
        found: list[Any] = self.sessions[part].run(outputs, feeds)
        return found

    def answer(self, prompt: Sequence[int], pixels: Any) -> list[int]:
        vision, embedding, decoder = (self.config[part] for part in ("vision", "embedding", "decoder"))
        layers, width = range(decoder["num_hidden_layers"]), decoder["hidden_size"]
        pasts = [decoder["inputs"][f"past_{kind}_names"] % i for i in layers for kind in ("key", "value")]
        presents = [decoder["outputs"][f"present_{kind}_names"] % i for i in layers for kind in ("key", "value")]
        shape = (1, decoder["num_key_value_heads"], 0, decoder["head_size"])
        cache = dict.fromkeys(pasts, np.empty(shape, np.float32))
        named = vision["outputs"]["image_features"]
        features = np.empty((0, width), np.float32)
        if pixels is not None:
            (features,) = self.run("vision", [named], {vision["inputs"]["pixel_values"]: pixels})
            assert features.shape == (vision["num_visual_tokens"], width)
        new, total, said = list(prompt), 0, list[int]()
        while len(said) < NEW:
            seen = {embedding["inputs"]["input_ids"]: np.array([new], np.int64)}
            seen |= {embedding["inputs"]["image_features"]: features}
            (embeds,) = self.run("embedding", [embedding["outputs"]["inputs_embeds"]], seen)
            assert embeds.shape == (1, len(new), width)
            places = np.arange(total, total + len(new))[None]
            total += len(new)
            feeds = {"inputs_embeds": embeds, "attention_mask": np.ones((1, total), np.int64), "position_ids": places}
            feeds = {decoder["inputs"][name]: value for name, value in feeds.items()} | cache
            logits, *grown = self.run("decoder", [decoder["outputs"]["logits"], *presents], feeds)
            assert logits.shape == (1, 1, self.config["vocab_size"])
            cache = dict(zip(pasts, grown, strict=True))
            said.append(int(logits[0, 0].argmax()))
            new, features = said[-1:], np.empty((0, width), np.float32)
        return said


@pytest.mark.slow
@needs_genai
def test_further_turns_and_text_alone(og: Any, tmp_path: Path, engine: Engine) -> None:  # noqa: F811
    """genai's own generation on these graphs: what it feeds them beside a first prompt and single tokens."""
    tiny.llava(tmp_path)
    folder = tmp_path / "graphs"
    folder.mkdir()
    plan = tiny.plan(tmp_path, (KEEP,), Request(1))
    found = Exported(plan, folder, export(plan, folder))
    ours, asked, again = engine(found), tiny.question(found.graphs), [17, 18, 19]
    first = ours.generate(asked.pixels, [asked.prompt], 2)
    end = ours.generate(asked.pixels, [asked.prompt], 3).tokens[0][-1]
    assert end not in first.tokens[0]
    logits = ours.extend(first.cache, [again])
    prompt = expanded(asked.prompt, found.graphs)

    graphs = replace(found.graphs, text=replace(found.graphs.text, eos=[end]))
    write(made("genai", graphs, folder, plan.profile), folder)
    model = og.Model(str(folder))
    inputs = og.NamedTensors()
    inputs["pixel_values"], inputs["num_image_tokens"] = asked.pixels, np.array([found.graphs.visual.kept], np.int64)
    inputs["input_ids"] = np.array([prompt], np.int32)
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + 12)
    generator = og.Generator(model, parameters)
    generator.set_inputs(inputs)
    while not generator.is_done():
        generator.generate_next_token()
    assert generator.get_sequence(0)[len(prompt) :].tolist() == first.tokens[0]
    generator.append_tokens(np.array([again], np.int32))
    np.testing.assert_allclose(np.array(generator.get_logits()).reshape(1, -1), logits, atol=2e-4)

    alone = og.Generator(model, parameters)
    alone.append_tokens(np.array([again], np.int32))
    expected = ByHand(folder).answer(again, None)[0]
    assert int(np.array(alone.get_logits()).reshape(-1).argmax()) == expected
