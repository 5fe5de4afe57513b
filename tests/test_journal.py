"""What a killed export had finished is kept, and only that: nothing is taken for whole that is not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from exporter.errors import ExportError
from exporter.journal import JOURNAL, DataFile, Journal

ORIGIN = {"checkpoint": "a", "sizes": (1, 2)}
PARTS = {"one": b"1" * 100, "two": b"2" * 5000, "three": b"3" * 10}


class Killed(BaseException):
    pass


def write(folder: Path, until: int = 10**6, origin: object = ORIGIN, parts: dict[str, bytes] = PARTS) -> list[str]:
    """Write the parts in pieces of 40 bytes, aligned to 64, dying in front of a piece; returns those that were asked for bytes.
    What a killed process leaves is what it had written: nothing is cleaned up."""
    asked, left = [], until

    def pieces(name: str) -> Iterator[memoryview]:
        nonlocal left
        asked.append(name)
        data = parts[name]
        for start in range(0, len(data), 40):
            if not left:
                raise Killed
            left -= 1
            yield memoryview(data)[start : start + 40]

    folder.mkdir(exist_ok=True)
    file = DataFile(folder / "weights.data", Journal(folder, origin))
    file.__enter__()
    try:
        for name in parts:
            file.part(name, pieces(name), 64)
    except Killed:
        assert file._file is not None
        file._file.close()  # flushes a half-written part, too
    else:
        file.__exit__(None, None, None)
    return asked


def content(parts: dict[str, bytes] = PARTS) -> bytes:
    whole = b""
    for data in parts.values():
        whole += b"\0" * (-len(whole) % 64) + data
    return whole


@pytest.mark.parametrize("until", [0, 1, 2, 3, 4, 60, 127, 128, 129, 130])
def test_only_what_was_finished_is_kept(until: int, tmp_path: Path) -> None:
    write(tmp_path / "x", until)
    ends = {"one": 3, "two": 128, "three": 129}
    assert write(tmp_path / "x") == [name for name in PARTS if ends[name] > until]
    assert (tmp_path / "x" / "weights.data").read_bytes() == content()


def test_killed_again_and_again(tmp_path: Path) -> None:
    asked = [write(tmp_path / "x", 2), write(tmp_path / "x", 50), write(tmp_path / "x", 125), write(tmp_path / "x")]
    assert asked == [["one"], ["one", "two"], ["two", "three"], ["three"]]
    assert (tmp_path / "x" / "weights.data").read_bytes() == content()


@pytest.mark.parametrize(
    ("place", "again"),
    [(0, ["one", "two", "three"]), (99, ["one", "two", "three"]), (130, ["two", "three"]), (5185, ["three"])],
)
def test_a_changed_byte_is_seen(place: int, again: list[str], tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "weights.data"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    assert write(tmp_path) == again
    assert path.read_bytes() == content()


@pytest.mark.parametrize(("size", "again"), [(0, 3), (99, 3), (100, 2), (5127, 2), (5128, 1), (5193, 1), (5194, 0)])
def test_a_file_that_lost_its_end_when_the_power_went(size: int, again: int, tmp_path: Path) -> None:
    write(tmp_path)
    with (tmp_path / "weights.data").open("r+b") as file:
        file.truncate(size)
    assert write(tmp_path) == list(PARTS)[3 - again :]
    assert (tmp_path / "weights.data").read_bytes() == content()


def test_a_half_written_line_of_the_journal_is_none(tmp_path: Path) -> None:
    write(tmp_path)
    journal = tmp_path / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-3])
    assert write(tmp_path) == ["three"]
    assert write(tmp_path) == []
    assert [json.loads(line).get("name") for line in journal.read_text().splitlines()] == [None, *PARTS]


def test_from_another_origin_nothing_is_kept(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "processor").mkdir()
    (tmp_path / "processor" / "config.json").touch()
    Journal(tmp_path, {"checkpoint": "b"})
    assert [p.name for p in tmp_path.iterdir()] == [JOURNAL]


def test_from_the_same_origin_only_data_files_are_kept(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "processor").mkdir()
    (tmp_path / "vision.onnx").touch()
    Journal(tmp_path, ORIGIN)
    assert sorted(p.name for p in tmp_path.iterdir()) == [JOURNAL, "weights.data"]


def test_other_parts_than_before_take_their_place(tmp_path: Path) -> None:
    """A part of another name, then one that stood elsewhere."""
    write(tmp_path)
    other = {"one": PARTS["one"], "other": b"4" * 70, "three": PARTS["three"]}
    assert write(tmp_path, parts=other) == ["other", "three"]
    assert (tmp_path / "weights.data").read_bytes() == content(other)
    assert write(tmp_path, parts=other) == []


def test_a_folder_that_no_export_left_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ExportError, match="is not empty"):
        Journal(tmp_path, ORIGIN)
    assert (tmp_path / "thesis.tex").exists()


def test_where_a_part_stands(tmp_path: Path) -> None:
    with DataFile(tmp_path / "a.data", Journal(tmp_path, ORIGIN)) as file:
        found = [file.part(name, iter([memoryview(data)]), 64) for name, data in PARTS.items()]
    assert [(p.offset, p.size) for p in found] == [(0, 100), (128, 5000), (5184, 10)]
    assert [p.sha256 for p in found] == [hashlib.sha256(data).hexdigest() for data in PARTS.values()]
