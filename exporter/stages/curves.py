"""curves: how accuracy falls with the tokens kept, method by method, and pictures of what each one keeps.

Measured in the PyTorch reference: this is about methods, not engines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from exporter.errors import UsageError
from exporter.graphset import ImageSpec
from exporter.workspace import Workspace

if TYPE_CHECKING:
    from PIL import Image

    from exporter.backends._contract import Array
    from exporter.job import Job
    from exporter.plan import Plan
    from exporter.runtime.generate import Generator
    from exporter.stages._task import Question

Log = Callable[[str], None]
CURVES = "evidence/curves.json"
PICTURES = "evidence/overlays.json"
CONTROLS = ("random", "uniform")


@dataclass(frozen=True)
class Picture:
    """What one method kept of one image or clip. `index`: places among `total` tokens, frames one after another."""

    method: str
    index: npt.NDArray[np.int64]
    total: int
    image: Image.Image


def label(template: str) -> str:
    """A template without the knobs that vary.

    >>> label("visionzip:keep={keep},cls=off + fastv:keep={total}")
    'visionzip:cls=off + fastv'
    """
    labels = []
    for spec in template.split(" + "):
        name, _, rest = spec.partition(":")
        fixed = [item for item in rest.split(",") if item and "{" not in item]
        labels.append(f"{name}:{','.join(fixed)}" if fixed else name)
    return " + ".join(labels)


def fill(template: str, ratio: float, tokens: int, frames: int) -> str | None:
    """The spec of a template at a keep ratio; None where it cannot be met with whole frames.

    `{keep}` is tokens per frame, `{total}` tokens over all frames, `{frames}` frames, `{ratio}` the ratio itself.
    """
    whole = ratio * frames
    if "{frames}" in template and (whole < 1 or whole != int(whole)):
        return None
    counts = {"keep": round(ratio * tokens), "total": round(ratio * tokens * frames), "frames": int(whole)}
    return re.sub(r"\{(\w+)\}", lambda m: f"{ratio:g}" if m[1] == "ratio" else str(max(1, counts[m[1]])), template)


def measure(
    job: Job, methods: Sequence[str], keep_ratios: Sequence[float], per_kind: int, log: Log = lambda text: None
) -> dict[str, Any]:
    """Accuracy on the embedded questions at every keep ratio a method can meet.

    Args:
        job: its checkpoint and frames; its own reductions do not matter.
        methods: spec templates, see `fill`; several reductions in one are joined by " + ".
        per_kind: questions of each kind.
    Returns:
        What `evidence/curves.json` holds. The ratio of a point is the one really met, at the narrowest place.
    Raises:
        UsageError: there are no embedded questions about this many frames, or a spec that does not fit.
    """
    from dataclasses import replace

    from exporter.stages import _task, validate
    from exporter.stages._processor import prompt_of

    questions = _task.embedded(job.frames, per_kind)
    if not questions:
        raise UsageError(f"The embedded questions are about 1 or 4 frames; found --frames {job.frames}.")
    bare = job.unreduced().plan()
    site = bare.geometry.tower
    prompt = prompt_of(bare)

    def accuracy(plan: Plan) -> dict[str, float]:
        scores = validate.score(validate.ask_reference(plan, prompt, questions), questions)
        return {kind: correct / asked for kind, (correct, asked) in scores.items()}

    log("unreduced")
    full = accuracy(bare)
    curves = []
    for template in methods:
        points = []
        refused: UsageError | None = None
        for ratio in keep_ratios:
            spec = fill(template, ratio, site.tokens, site.frames)
            if spec is None:
                continue
            try:
                plan = replace(job, reductions=tuple(spec.split(" + "))).plan()
            except UsageError as e:  # such as more than an earlier reduction leaves
                refused = e
                continue
            log(spec)
            met = min(s.after for s in plan.steps) / site.total
            points.append({"keep_ratio": met, "spec": spec, "accuracy": accuracy(plan)})
        if refused is not None and not points:
            raise refused
        control = template.partition(":")[0] in CONTROLS
        curves.append({"method": label(template), "template": template, "control": control, "points": points})
    return {"frames": job.frames, "per_kind": per_kind, "full": full, "curves": curves}


def write(work: Workspace, record: Mapping[str, Any]) -> None:
    work.write(CURVES, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def kept(
    generator: Generator, pixel_values: Array, input_ids: Sequence[int], side: Mapping[str, Array] | None = None
) -> npt.NDArray[np.int64]:
    """Which of the visual tokens before any reduction are still there behind the last one, that of a cache aside: int64 [kept],
    −1 for CLS."""
    from exporter.runtime.sequence import split

    text = split([input_ids], generator.graphs)
    visual = generator.reduce(generator.vision(pixel_values), text, side)
    index = visual.index[0]
    if generator.graphs.prefill_apart:
        found = generator.prefill(visual, [input_ids], text).kept
        for name in sorted((n for n in found if n.startswith("kept_")), key=lambda n: int(n.rpartition("_")[2])):
            index = index[found[name][0]]
    return index.astype(np.int64)


def picture(
    generator: Generator, pixel_values: Array, input_ids: Sequence[int], method: str, side: Mapping[str, Array]
) -> Picture:
    """Draw what the generator's reductions keep of one sample [1, frames, 3, height, width]. `side`: see `reduce`."""
    from exporter.report import overlay

    graphs = generator.graphs
    grid = graphs.visual.grid
    if grid is None:
        raise UsageError("This model's visual tokens have no raster, so they cannot be drawn on the image.")
    index = graphs.visual.of_grid(kept(generator, pixel_values, input_ids, side))
    frames = seen(pixel_values, graphs.image)
    tokens = graphs.visual.total - graphs.visual.fixed * graphs.visual.placeholders
    groups = tokens // (grid[0] * grid[1])  # some towers merge frames in pairs
    names = " + ".join(spec.partition(":")[0] for spec in method.split(" + "))
    drawn = overlay.draw(frames[:: len(frames) // groups], index, grid, caption=names)
    return Picture(method, index, tokens, drawn)


def seen(pixel_values: Array, spec: ImageSpec) -> npt.NDArray[np.uint8]:
    """What the model sees, as a picture: uint8 [frames, height, width, 3]."""
    scaled = pixel_values[0] * np.array(spec.std)[:, None, None] + np.array(spec.mean)[:, None, None]
    return np.clip(scaled * 255 + 0.5, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def overlays(job: Job, methods: Sequence[str], question: Question) -> list[Picture]:
    """What each method keeps of one question's frames, by the PyTorch reference.

    Args:
        methods: specs; several reductions in one are joined by " + ".
    """
    from dataclasses import replace

    from exporter.runtime import images
    from exporter.runtime.generate import Generator
    from exporter.stages._processor import prompt_of
    from exporter.stages._reference import reference

    drawn = []
    for spec in methods:
        plan = replace(job, reductions=tuple(spec.split(" + "))).plan()
        runners, graphs, table = reference(plan)
        prompt = prompt_of(plan)
        ids = prompt.ask(question.question, graphs.visual.placeholders, graphs.visual.media)
        pixels = images.preprocess(question.frames, graphs.image)
        side = prompt.side([question.question])
        drawn.append(picture(Generator(runners, graphs, table), pixels, ids, spec, side))
    return drawn


def write_overlays(work: Workspace, pictures: Sequence[Picture], caption: str) -> None:
    """Into evidence/overlays/, with a list of them for the report."""
    from exporter.report import overlay

    listed = []
    work.evidence.mkdir(exist_ok=True)
    with Workspace(work.evidence).fresh("overlays") as folder:
        for number, drawn in enumerate(pictures, 1):
            name = f"{number}-{re.sub(r'[^a-z0-9]+', '-', drawn.method.lower()).strip('-')[:60]}.png"
            (folder / name).write_bytes(overlay.png(drawn.image))
            listed.append({"method": drawn.method, "caption": caption, "files": [name]})
    work.write(PICTURES, json.dumps(listed, indent=1, ensure_ascii=False) + "\n")
