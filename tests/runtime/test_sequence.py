from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from exporter.errors import UsageError, VerificationError
from exporter.graphset import PAD, ROLES, GraphSet, ImageSpec, TextSpec, VisualLayout
from exporter.runtime.sequence import arrange, pad, split

I = 9  # the image token  # noqa: E741


def graphs(
    placeholders: int = 1, each: int = 4, kept: int | None = None, policy: Any = "keep", ids: Any = None, span: int = 0
) -> GraphSet:
    total = placeholders * each
    ids = [[i] for i in range(each)] if ids is None else ids
    return GraphSet(
        family="x", compute="fp32", weights="none", files={}, reductions=[],
        image=ImageSpec(8, 8, "exact", 8, 8, 3, (0.5,) * 3, (0.5,) * 3),
        visual=VisualLayout(placeholders, placeholders, total, total if kept is None else kept, None, ids, span or each, policy),
        text=TextSpec(8, 1, 1, 8, 100, len(ids[0]), [0], [total], I, [2]),
        signals={}, side={}, sized=False,
    )  # fmt: skip


def test_split_pads_in_front() -> None:
    text = split([[1, I, 5, 6], [I, 7]], graphs())
    assert text.ids.tolist() == [[1, 5, 6], [0, 0, 7]]
    assert text.mask.tolist() == [[True] * 3, [False, False, True]]
    assert split([np.array([1, I, 5, 6])], graphs()).ids.tolist() == [[1, 5, 6]]


def test_nothing_reduced_is_the_prompt_with_its_visual_part_in_front() -> None:
    found = arrange([[1, 2, I, 3, I, 4, 5], [I, I, 6]], np.arange(8)[None].repeat(2, 0), graphs(2))
    assert found.position_ids[0].tolist() == [2, 3, 4, 5, 7, 8, 9, 10, 0, 1, 6, 11, 12]
    assert found.position_ids[1].tolist() == [*range(8), 0, 0, 0, 0, 8]
    assert found.order[0].tolist() == found.position_ids[0].tolist()
    assert found.order[1].tolist() == [*range(8), PAD, PAD, PAD, PAD, 8]
    assert found.next_position.tolist() == found.next_order.tolist() == [13, 9]


def test_kept_tokens_keep_their_places() -> None:
    found = arrange([[1, 2, I, 3, I, 4, 5]], np.array([[-1, 1, 6]]), graphs(2, kept=3))
    assert found.position_ids.tolist() == [[2, 3, 9, 0, 1, 6, 11, 12]]
    assert found.order.tolist() == found.position_ids.tolist()
    assert found.next_position.tolist() == [13]


def test_kept_tokens_close_up() -> None:
    found = arrange([[1, 2, I, 3, I, 4], [I, I, 6]], np.array([[-1, 1, 6]] * 2), graphs(2, kept=3, policy="compact"))
    assert found.position_ids.tolist() == [[2, 3, 4, 0, 1, 5, 6], [0, 1, 2, 0, 0, 0, 3]]
    assert found.order.tolist() == [[2, 3, 4, 0, 1, 5, 6], [0, 1, 2, PAD, PAD, PAD, 3]]
    assert found.next_position.tolist() == found.next_order.tolist() == [7, 4]


@pytest.mark.parametrize(("policy", "image", "prompt"), [("keep", [2, 9, 9], 12), ("compact", [2, 4, 4], 7)])
def test_how_far_a_token_sees(policy: str, image: list[int], prompt: int) -> None:
    """To the last kept token of its image, or of the prompt; text otherwise to itself, padding to nothing in particular."""
    prompts, index = [[1, 2, I, 3, I, 4, 5], [I, I, 6]], np.array([[0, 4, 6], [0, 1, 7]])
    plain = graphs(2, kept=3, policy=policy)
    assert arrange(prompts, index, plain).reach is None
    seen = arrange(prompts, index, replace(plain, visual=replace(plain.visual, sees="image")))
    assert seen.reach is not None
    assert seen.reach[0].tolist() == [*image, *seen.order[0, 3:].tolist()]
    assert seen.reach[1, :2].tolist() == [seen.order[1, 1]] * 2
    whole = arrange(prompts, index, replace(plain, visual=replace(plain.visual, sees="prompt")))
    assert whole.reach is not None
    assert whole.reach[0].tolist() == [prompt] * 8
    assert whole.reach[1, 3:].tolist() == [PAD] * 4 + [whole.next_order[1] - 1]


def test_tiles_are_written_row_by_row() -> None:
    """Two tiles of 2 × 1 tokens side by side, with an end behind each of the two rows."""
    rows = graphs(each=6, ids=[[0], [3], [1], [4], [2], [5]])
    found = arrange([[1, I, 7]], np.arange(6)[None], rows)
    assert found.order.tolist() == found.position_ids.tolist() == [[1, 4, 2, 5, 3, 6, 0, 7]]
    two = replace(rows.visual, placeholders=2, frames=4, total=12, fixed=2)
    assert two.of_grid(np.array([-1, 0, 3, 4, 5, 6, 9, 11])).tolist() == [-1, 0, 3, 4, 7]


def test_compact_on_three_axes() -> None:
    ids = [[0, i // 2, i % 2] for i in range(4)]
    found = arrange([[1, I, 3]], np.array([[1, 3]]), graphs(kept=2, policy="compact", ids=ids, span=2))
    assert found.position_ids.tolist() == [[[1, 2, 0, 3]]] * 3
    assert found.next_position.tolist() == [4]


@pytest.mark.parametrize(("frames", "rows", "columns"), [(1, 4, 6), (1, 6, 2), (3, 2, 4)])
def test_qwen_positions(frames: int, rows: int, columns: int) -> None:
    """Unreduced, positions equal get_rope_index; reduced, they are the kept tokens' ones."""
    merged = (rows // 2, columns // 2)
    each, grid = frames * merged[0] * merged[1], torch.tensor([[frames, rows, columns]])
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=2))
    model: Any = SimpleNamespace(config=config)
    model.get_vision_position_ids = partial(Qwen2_5_VLModel.get_vision_position_ids, model)
    kind = 1 if frames == 1 else 2
    step = 1 if frames == 1 else 2
    ids = [[t * step, h, w] for t in range(frames) for h in range(merged[0]) for w in range(merged[1])]
    before, after = [1, 2, 3], [4, 5, 6, 7]
    expanded = torch.tensor([before + [I] * each + after])
    kinds = (expanded == I).int() * kind
    wanted, delta = Qwen2_5_VLModel.get_rope_index(
        model, expanded, kinds, **{"image_grid_thw" if kind == 1 else "video_grid_thw": grid}
    )
    visual = wanted[:, :, 3 : 3 + each].numpy()
    text = torch.cat([wanted[:, :, :3], wanted[:, :, 3 + each :]], -1).numpy()

    layout = partial(graphs, each=each, ids=ids, span=max(merged))
    found = arrange([[*before, I, *after]], np.arange(each)[None], layout())
    assert np.array_equal(found.position_ids, np.concatenate([visual, text], -1))
    assert found.order.tolist() == [[*range(3, 3 + each), 0, 1, 2, *range(3 + each, 7 + each)]]
    assert found.next_order.tolist() == [expanded.shape[1]]
    # Qwen counts on from the largest id; in a clip that may be a frame's, which then is not behind the last text token.
    assert found.next_position.tolist() == [text[0].max() + 1]
    if text.max() > visual.max():
        assert found.next_position.tolist() == (expanded.shape[1] + delta[0]).tolist()

    some = np.array([[0, each // 2, each - 1]])
    kept = arrange([[*before, I, *after]], some, layout(kept=3))
    assert np.array_equal(kept.position_ids, np.concatenate([visual[:, :, some[0]], text], -1))
    assert kept.next_position.tolist() == found.next_position.tolist()


def test_pad_keeps_an_empty_row() -> None:
    assert pad([[], [4]]).mask.tolist() == [[False], [True]]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "No prompt"),
        ([[1, 2]], r"Prompt 0 holds 0 image tokens \(id 9\); this model was exported for 1"),
        ([[I, 1], [I, I, 1]], "Prompt 1 holds 2 image tokens"),
        ([[I, I, I, I, 1]], "before a processor expands"),
        ([[1, I]], "ends with an image token"),
        ([[I, 100]], "token id 100; this model's vocabulary is 0 to 99"),
        ([[I, -1]], "token id -1"),
    ],
)
def test_prompts_that_do_not_fit(prompts: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        split(prompts, graphs())


@pytest.mark.parametrize("index", [[[0, 4]], [[-2, 1]], [[0, 1, 2]], [[0, 1]] * 2])
def test_an_index_that_cannot_be(index: Any) -> None:
    with pytest.raises(VerificationError, match="values"):
        arrange([[I, 1]], np.array(index), graphs(kept=2))


def test_graphs_survive_their_file(tmp_path: Path) -> None:
    """What positions are made of is read back as it was written."""
    made = replace(graphs(2, kept=3), embedding="e.npy", files={role: f"{role}.onnx" for role in ROLES})
    made.save(tmp_path)
    assert GraphSet.load(tmp_path) == made
