"""The user's questions: what a line may say, and what is refused with its number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from exporter.errors import UsageError
from exporter.stages import _task

Ask = Callable[..., _task.Question]


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / name)
    (tmp_path / "clip").mkdir()
    for n in range(12):
        Image.new("RGB", (8, 8), (20 * n, 0, 0)).save(tmp_path / "clip" / f"frame_{n}.png")

    def read(entry: object, frames: int = 1) -> _task.Question:
        path = tmp_path / "q.jsonl"
        path.write_text("\n" + (entry if isinstance(entry, str) else json.dumps(entry)) + "\n")
        (question,) = _task.from_file(path, frames)
        return question

    return read


def test_one_image(ask: Ask) -> None:
    question = ask({"image": "a.png", "question": "What?", "answer": 2, "metric": "numeric", "kind": "count"})
    assert (question.kind, question.answer, question.source) == ("count", "2", ("a.png",))
    assert [f.getpixel((0, 0)) for f in question.frames] == [(255, 0, 0)]
    assert (question.score("There are two."), question.score("three")) == (1.0, 0.0)


def test_several_answers(ask: Ask) -> None:
    question = ask({"image": "a.png", "question": "What?", "answers": ["red", "crimson"]})
    assert [question.score(a) for a in ("Red", "crimson", "blue")] == [1, 1, 0]


def test_a_video_is_sampled_from_first_to_last(ask: Ask) -> None:
    question = ask({"video": "clip", "question": "What?", "answer": "a"}, 4)
    assert [f.getpixel((0, 0))[0] // 20 for f in question.frames] == [0, 4, 7, 11]
    assert (len(question.frames), question.frames[3].getpixel((0, 0))) == (4, (220, 0, 0))


def test_images_are_read_when_looked_at(ask: Ask, tmp_path: Path) -> None:
    question = ask({"images": ["a.png", "b.png"], "question": "What?", "answer": "a"}, 2)
    (tmp_path / "b.png").unlink()
    with pytest.raises(UsageError, match=r"b\.png"):
        list(question.frames)


def test_the_key_is_of_question_and_pixels(ask: Ask, tmp_path: Path) -> None:
    entry = {"image": "a.png", "question": "What?", "answer": "a"}
    key = ask(entry).key
    assert ask({**entry, "answer": "b", "metric": "contains"}).key == key, "scored anew, not asked anew"
    assert ask({**entry, "question": "Who?"}).key != key
    Image.new("RGB", (8, 8), "green").save(tmp_path / "a.png")
    assert ask(entry).key != key


GOOD = {"image": "a.png", "question": "What?", "answer": "a"}


def test_where_an_answer_is_read(ask: Ask) -> None:
    box = [1, 2.5, 3, 4]
    assert ask(GOOD).boxes == ()
    assert ask({**GOOD, "answer": "red and blue", "box": box}).boxes == ((1, 2.5, 3, 4),) * 3
    assert ask({**GOOD, "answer": "no way", "boxes": [None, box]}).boxes == (None, (1, 2.5, 3, 4))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{", "line 2: expected {"),
        ({"question": "What?", "answer": "a"}, 'one of "image", "images" and "video"; found none'),
        ({**GOOD, "video": "clip"}, "found image and video"),
        (
            {**GOOD, "box": [1, 2, 3]},
            "a box must be [left, top, right, bottom] in pixels of the image; found [1, 2, 3]",
        ),
        ({**GOOD, "box": [3, 2, 1, 4]}, "a box must be "),
        ({**GOOD, "box": [True, 2, 3, 4]}, "a box must be "),
        ({**GOOD, "box": [-1, 2, 3, 4]}, "a box must be "),
        ({**GOOD, "boxes": [[1, 2, 3, 4]] * 2}, '"boxes" must be a list of 1, one for each word of "a"; found 2'),
        ({**GOOD, "boxes": "here"}, "found 'here'"),
        ({**GOOD, "box": [0, 0, 1, float("inf")]}, "a box must be "),
        ({**GOOD, "box": [1, 2, 3, 4], "boxes": []}, "found both"),
        ({**GOOD, "image": "absent.png"}, "there is no "),
        ({**GOOD, "anwser": "b"}, "unknown key 'anwser'"),
        ({**GOOD, "answers": ["b"]}, 'one of "answer" and "answers"'),
        ({"image": "a.png", "question": "What?", "answers": []}, "at least one"),
        ({**GOOD, "answer": None}, "must be text or a number"),
        ({**GOOD, "metric": "bleu"}, "unknown metric 'bleu'"),
        ({**GOOD, "metric": "numeric"}, "cannot score the right answer 'a'"),
        ({**GOOD, "image": 3}, "line 2: "),
        ({"images": ["a.png", "b.png"], "question": "What?", "answer": "a"}, "2 images, but the graphs take 1"),
        ("[1]", "line 2: "),
    ],
)
def test_what_is_wrong_is_said_with_its_line(ask: Ask, entry: object, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        ask(entry)
    assert "line 2: " in str(refused.value) and message in str(refused.value)
