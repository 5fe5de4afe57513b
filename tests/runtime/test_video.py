"""Frames of a video file: the right ones, upright; and what is no video."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from exporter.errors import EnvironmentMismatch, UsageError
from exporter.runtime import images, video


def film(path: Path, frames: int, size: tuple[int, int] = (32, 48)) -> Path:
    """Frame n has grey 12 n."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for n in range(frames):
            picture = av.VideoFrame.from_ndarray(np.full((*size, 3), 12 * n, np.uint8), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def test_a_phone_that_was_held_upright(tmp_path: Path) -> None:
    """Filmed lying, the left half white, to be turned clockwise by 90°: what was left is on top."""
    av = pytest.importorskip("av")
    lying = np.zeros((32, 48, 3), np.uint8)
    lying[:, :24] = 255
    with av.open(str(tmp_path / "phone.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        if not hasattr(stream, "set_display_rotation"):
            pytest.skip("this PyAV cannot write the rotation")
        stream.set_display_rotation(-90)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(lying, format="rgb24")))
        container.mux(stream.encode())
    (frame,) = images.clip(tmp_path / "phone.mp4", 1)
    shown = np.asarray(frame)
    assert shown.shape == (48, 32, 3)
    assert shown[:20].mean() > 240 and shown[28:].mean() < 15


def numbers(path: Path, count: int) -> list[int]:
    return [round(np.asarray(f).mean() / 12) for f in images.clip(path, count)]


def test_frames_are_taken_evenly(tmp_path: Path) -> None:
    path = film(tmp_path / "clip.mp4", 20)
    assert numbers(path, 4) == [0, 6, 13, 19]
    assert numbers(path, 1) == [9]
    assert images.clip(path, 1)[0].size == (48, 32)


def test_a_file_that_does_not_say_how_long_it_is(tmp_path: Path) -> None:
    assert numbers(film(tmp_path / "clip.mkv", 7), 3) == [0, 3, 6]


def test_a_header_that_promises_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "_length", lambda *_: 100)
    assert numbers(film(tmp_path / "clip.mp4", 5), 3)[0] == 0


def test_what_is_no_video(tmp_path: Path) -> None:
    pytest.importorskip("av")
    (tmp_path / "a.mp4").write_text("no video")
    with pytest.raises(UsageError, match="cannot be read as a video"):
        images.clip(tmp_path / "a.mp4", 2)
    with pytest.raises(UsageError, match="There is no video"):
        images.clip(tmp_path / "b.mp4", 2)


def test_without_a_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(EnvironmentMismatch, match=r"edgetrim\[video\]"):
        images.clip(tmp_path / "a.mp4", 2)
