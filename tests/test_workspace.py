"""An output folder is whole at every moment, and only one process writes to it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from exporter import workspace
from exporter.errors import ExportError, UsageError
from exporter.workspace import LOCK, Workspace

HOLD = """
import sys
from pathlib import Path
from exporter.workspace import Workspace
with Workspace(Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def work(tmp_path: Path) -> Workspace:
    """Holds a result."""
    work = Workspace(tmp_path / "out")
    (work.graphs).mkdir(parents=True)
    (work.graphs / "old").touch()
    return work


@pytest.fixture
def other(work: Workspace) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLD, str(work.folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def names(work: Workspace) -> list[str]:
    return sorted(p.relative_to(work.folder).as_posix() for p in work.folder.rglob("*"))


def test_a_new_result_takes_the_place_of_the_old_one(work: Workspace) -> None:
    with work.fresh("graphs") as folder:
        (folder / "new").touch()
        assert (work.graphs / "old").exists()
    assert names(work) == ["graphs", "graphs/new"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_result(error: type[BaseException], work: Workspace) -> None:
    def write() -> None:
        with work.fresh("graphs") as folder:
            (folder / "half").touch()
            raise error

    with pytest.raises(error):
        write()
    assert names(work) == ["graphs", "graphs/old"]


def test_a_failing_rename_leaves_the_old_result(work: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if (self / "half").exists():
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)

    def write() -> None:
        with work.fresh("graphs") as folder:
            (folder / "half").touch()

    with pytest.raises(OSError, match="no"):
        write()
    assert names(work) == ["graphs", "graphs/old"]


def test_what_a_killed_run_left_is_removed(work: Workspace) -> None:
    (work.folder / f"{workspace.SCRATCH}engines-x").mkdir()
    (work.folder / f"{workspace.SCRATCH}report.html").touch()
    with work.locked():
        pass
    assert names(work) == ["graphs", "graphs/old"]


def test_a_result_that_a_killed_run_had_moved_aside_comes_back(work: Workspace) -> None:
    work.graphs.rename(work.folder / f"{workspace.OLD}graphs")
    with work.locked():
        assert names(work) == [LOCK, "graphs", "graphs/old"]


def test_scratch_vanishes(work: Workspace) -> None:
    with work.fresh_scratch("x") as folder:
        (folder / "file").touch()
    assert names(work) == ["graphs", "graphs/old"]


def test_text_is_written_whole_or_not_at_all(work: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    path = work.write("evidence/a.json", "1")
    monkeypatch.setattr("os.fsync", lambda handle: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        work.write("evidence/a.json", "2")
    assert path.read_text() == "1"
    assert list(path.parent.iterdir()) == [path]


def test_another_process_holds_the_folder(work: Workspace, other: subprocess.Popen[str]) -> None:
    for _ in range(2):  # being refused must not open the door for the next one
        with pytest.raises(UsageError, match="Another edgetrim is writing to"), work.locked():
            pass
    other.communicate("")
    with work.locked():
        pass
    assert names(work) == ["graphs", "graphs/old"]


def test_a_killed_process_holds_nothing(work: Workspace, other: subprocess.Popen[str]) -> None:
    other.kill()
    other.wait()
    with work.locked():
        pass


def test_a_folder_that_nothing_was_written_to_vanishes(tmp_path: Path) -> None:
    with Workspace(tmp_path / "new").locked():
        pass
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"Cannot write to .*out: .* Choose another --output"):
        with Workspace(tmp_path / "file" / "out").locked():
            pass


def test_reading(work: Workspace) -> None:
    with pytest.raises(UsageError, match=r"There is no .*job.json. Run export."):
        work.read_json("job.json", "Run export.")
    work.write("job.json", "{")
    with pytest.raises(ExportError, match=r"job.json is damaged .* Run export."):
        work.read_json("job.json", "Run export.")
    work.write("job.json", '{"a": 1}')
    assert work.read_json("job.json", "") == {"a": 1}
