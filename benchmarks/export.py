"""Export at real sizes: memory and time.

    python -m benchmarks.export --model llava-1.5-7b --precision fp16 int4

Writes a checkpoint of random weights in a published model's true shapes and dtype (sharded safetensors, at most 5 GB each), copies
its bytes as a yardstick, and runs `edgetrim export` in a process of its own for every precision. Before each of them the
checkpoint is dropped from the system's cache, so that all read it from the disk; all are timed until what they wrote is on the disk
(fsync), the exports also until the command ends. An export is killed half-way and started again, too. Needs as much disk
as two checkpoints and a bit, in the temporary folder; everything is deleted at the end, also after SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import _common
from exporter import _discover, device, families, pipeline
from exporter.embedded import CHECKPOINT
from exporter.job import Job
from exporter.journal import JOURNAL, Journal, Part
from exporter.quantize import rtn
from exporter.workspace import PART, Workspace

SHARD = 5_000_000_000
CHUNK = 16 * 2**20
PROFILES = {"fp16": "rtx_fp16", "int4": "rtx_int4"}
REDUCTION = "fastv:layer=2,keep_ratio=0.5"
"""Prefill is then a graph of its own, so that two graphs share the language model's weights."""
EVERY_S = 0.02
"""How often memory is looked at. The peak is the system's own count."""


@dataclass(frozen=True)
class Subject:
    """A published model: its family, what sets it apart from the family's `published` config, the dtype of its checkpoint."""

    family: str
    dtype: str
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        published = _discover.load(families, "family", self.family).FAMILY.published
        return _merged(published, self.changes)


SUBJECTS = {
    "llava-1.5-7b": Subject("llava", "float16"),
    "qwen2.5-vl-3b": Subject("qwen2_5_vl", "bfloat16", {
        "_name_or_path": "Qwen/Qwen2.5-VL-3B-Instruct", "tie_word_embeddings": True,
        "vision_config": {"out_hidden_size": 2048},
        "text_config": {
            "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
            "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
        },
    }),
    "smolvlm-256m": Subject("smolvlm", "bfloat16", {
        "_name_or_path": "HuggingFaceTB/SmolVLM-256M-Instruct", "scale_factor": 4, "tie_word_embeddings": False,
        "vision_config": {
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "image_size": 512, "patch_size": 16,
        },
        "text_config": {
            "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
            "num_key_value_heads": 3, "tie_word_embeddings": False,
        },
    }),
}  # fmt: skip


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = {k: _merged(base[k], v) for k, v in changes.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return base | changes | both


# --- the checkpoint ---------------------------------------------------------------------------------------------------


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name → shape of a model's tensors, from Hugging Face's own class."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config))
    tied = config.get("tie_word_embeddings", False)
    return {
        name: tuple(t.shape) for name, t in model.state_dict().items() if not (tied and name.endswith("lm_head.weight"))
    }


def write_checkpoint(folder: Path, subject: Subject, shard: int = SHARD) -> int:
    """Save random weights, a few megabytes of them over and over; returns the bytes of all shards."""
    import torch

    dtype = getattr(torch, subject.dtype)
    code = {"float16": "F16", "bfloat16": "BF16"}[subject.dtype]
    generator = torch.Generator().manual_seed(0)
    noise = (0.02 * torch.randn(2**24 + 331, generator=generator)).to(dtype).view(torch.uint8).numpy().data
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(subject.config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(CHECKPOINT / name, folder / name)
    shards: list[dict[str, Any]] = [{}]
    end = 0
    for name, shape in shapes(subject.config).items():
        size = dtype.itemsize * int(torch.Size(shape).numel())
        if end + size > shard and shards[-1]:
            shards.append({})
            end = 0
        shards[-1][name] = {"dtype": code, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    where: dict[str, str] = {}
    for number, header in enumerate(shards, 1):
        path = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        where |= dict.fromkeys(header, path.name)
        head = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            left = list(header.values())[-1]["data_offsets"][1]
            while left:
                left -= file.write(noise[:left])
            file.flush()
            os.fsync(file.fileno())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def forget(folder: Path) -> None:
    """Drop a folder's files, which are on the disk, from the system's cache."""
    for path in filter(Path.is_file, folder.rglob("*")):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def flush(folder: Path) -> None:
    """Wait until a folder's files are on the disk."""
    for path in filter(Path.is_file, folder.rglob("*")):
        with path.open("rb") as file:
            os.fsync(file.fileno())


class Others:
    """What is not done by this process and its children takes of the processors meanwhile: other programs, and the system where
    it writes to the disk behind their back."""

    def __init__(self) -> None:
        self._before = self._seconds()

    @property
    def share(self) -> float:
        mine, busy, total = (b - a for a, b in zip(self._before, self._seconds(), strict=True))
        return round(max(0.0, busy - mine) / total, 3) if total else 0.0

    @staticmethod
    def _seconds() -> tuple[float, float, float]:
        mine, busy, total = _common.Load._seconds()
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return mine + children.ru_utime + children.ru_stime, busy, total


def copied(source: Path, target: Path) -> dict[str, float]:
    """Copy the shards: the seconds that it takes, fsync included."""
    target.mkdir()
    others, begin = Others(), time.perf_counter()
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb", buffering=0) as a, (target / path.name).open("wb", buffering=0) as b:
            while chunk := a.read(CHUNK):
                b.write(chunk)
            os.fsync(b.fileno())
    return {"s": time.perf_counter() - begin, "others_share": others.share}


# --- the export, in a process of its own ------------------------------------------------------------------------------


def child(checkpoint: str, profile: str, out: str, threads: str, dies_after: str) -> None:
    """Export, and print where the time went, in seconds; or die by SIGKILL when so many bytes are written."""
    begin = time.perf_counter()
    import torch

    torch.set_num_threads(int(threads))
    marks: dict[str, float] = {}
    quantize, spent = rtn.quantize, [0.0]

    def timed(*given: Any) -> Any:
        start = time.perf_counter()
        found = quantize(*given)
        spent[0] += time.perf_counter() - start
        return found

    add, left = Journal.add, [float(dies_after)]

    def counted(self: Journal, part: Part) -> None:
        add(self, part)
        left[0] -= part.size
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    rtn.quantize, Journal.add = timed, counted  # type: ignore[assignment, method-assign]

    def mark(text: str) -> None:
        marks.setdefault(text, time.perf_counter())

    with Workspace(Path(out)).locked() as work:
        pipeline.run_export(Job(checkpoint, (REDUCTION,), profile), work, mark)
    first, writing = next(iter(marks.values())), marks["writing weights"]
    end = time.perf_counter()
    print(json.dumps({
        "imports_and_plan_s": first - begin, "tracing_s": writing - first, "writing_s": end - writing,
        "quantising_s": spent[0], "ru_maxrss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }))  # fmt: skip


@dataclass
class Memory:
    """What a process holds: its peak as the system counts it, and the largest of what was seen of each kind. MiB."""

    peak: int = 0
    anonymous: int = 0
    file: int = 0

    def look(self, pid: int) -> None:
        with contextlib.suppress(OSError):
            status = dict(re.findall(r"(VmHWM|RssAnon|RssFile):\s+(\d+)", Path(f"/proc/{pid}/status").read_text()))
            self.peak = max(self.peak, int(status.get("VmHWM", 0)) // 1024)
            self.anonymous = max(self.anonymous, int(status.get("RssAnon", 0)) // 1024)
            self.file = max(self.file, int(status.get("RssFile", 0)) // 1024)


def exported(
    checkpoint: Path, profile: str, out: Path, threads: int, dies_after: float = float("inf")
) -> dict[str, Any]:
    """Run an export; one that dies after so many bytes has nothing to tell but when that was."""
    code = "import sys; from benchmarks.export import child; child(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(checkpoint), profile, str(out), str(threads), str(dies_after)]
    memory, others, begin = Memory(), Others(), time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            while process.poll() is None:
                memory.look(process.pid)
                time.sleep(EVERY_S)
            assert process.stdout is not None
            said = process.stdout.read()
        finally:
            process.kill()
    total = time.perf_counter() - begin
    if process.returncode == -signal.SIGKILL and dies_after < float("inf"):
        return {"killed_after_s": total}
    if process.returncode:
        raise SystemExit(f"the export ended with {process.returncode}")
    flush(out)
    on_disk = time.perf_counter() - begin
    sizes = {path.name: path.stat().st_size for path in out.rglob("*") if path.is_file()}
    weights = sum(size for name, size in sizes.items() if name.endswith((".data", ".npy")))
    return {
        "total_s": total, "on_disk_s": on_disk, "written_bytes": sum(sizes.values()), "weights_bytes": weights, "peak_rss_mib": memory.peak,
        "peak_anonymous_mib": memory.anonymous, "peak_file_mib": memory.file, "others_share": others.share,
        **json.loads(said),
    }  # fmt: skip


def resumed(checkpoint: Path, profile: str, out: Path, threads: int, size: int) -> dict[str, Any]:
    """Kill an export when it has written half of `size` bytes of weights, and start it again."""
    first = exported(checkpoint, profile, out, threads, size / 2)
    lines = (out / f"{PART}graphs" / JOURNAL).read_text().splitlines()[1:]
    kept = sum(int(json.loads(line)["size"]) for line in lines)
    again = exported(checkpoint, profile, out, threads)
    return {**first, "kept_bytes": kept, "again_s": again["total_s"], "again_writing_s": again["writing_s"]}


# --- records ----------------------------------------------------------------------------------------------------------


def measure(scratch: Path, name: str, precisions: list[str], threads: int) -> Iterator[dict[str, Any]]:
    """A record for each precision."""
    subject, checkpoint = SUBJECTS[name], scratch / "checkpoint"
    size = write_checkpoint(checkpoint, subject)
    _common.say(f"{name}: {size / 1e9:.2f} GB written")
    forget(checkpoint)
    for precision in precisions:
        out = scratch / "out"
        forget(checkpoint)
        copy = copied(checkpoint, scratch / "copy")
        shutil.rmtree(scratch / "copy")
        _common.say(f"copied: {copy}")
        forget(checkpoint)
        found = exported(checkpoint, PROFILES[precision], out, threads)
        _common.say(f"{precision}: {found}")
        shutil.rmtree(out)
        forget(checkpoint)
        again = resumed(checkpoint, PROFILES[precision], out, threads, found["weights_bytes"])
        _common.say(f"{precision}, killed: {again}")
        shutil.rmtree(out)
        yield {
            "benchmark": f"export-{name}",
            "command": f"python -m benchmarks.export --model {name} --precision {precision} --threads {threads}",
            "precision": precision,
            "machine": device.machine(),
            "versions": device.versions(),
            "model": subject.config["_name_or_path"],
            "reductions": [REDUCTION],
            "threads": threads,
            "checkpoint": {"bytes": size, "dtype": subject.dtype},
            "copy": copy,
            "export": found,
            "against_copy": (found["on_disk_s"] - found["quantising_s"]) / copy["s"],
            "killed": again,
        }


def row(entry: dict[str, Any]) -> list[object]:
    """For a table under `HEADER`."""
    found, killed = entry["export"], entry["killed"]
    return [
        entry["model"].partition("/")[2], entry["precision"], f"{entry['checkpoint']['bytes'] / 1e9:.1f}",
        f"{found['written_bytes'] / 1e9:.1f}", found["peak_rss_mib"], found["peak_anonymous_mib"], found["peak_file_mib"],
        f"{found['tracing_s']:.0f}", f"{found['writing_s']:.0f}", f"{found['quantising_s']:.0f}", f"{found['on_disk_s']:.0f}",
        f"{entry['copy']['s']:.0f}", f"{entry['against_copy']:.2f}", f"{killed['kept_bytes'] / 1e9:.1f}", f"{killed['again_s']:.0f}",
    ]  # fmt: skip


HEADER = (
    "model", "precision", "read, GB", "written, GB", "peak RSS, MiB", "anonymous", "file", "tracing, s", "writing, s",
    "of it quantising, s", "in all, s", "copy, s", "÷ copy, less quantising", "kept after kill, GB", "again, s",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=list(SUBJECTS), required=True)
    parser.add_argument("--precision", choices=list(PROFILES), nargs="+", default=list(PROFILES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=_common.RESULTS, help="folder of the JSON records")
    options = parser.parse_args()
    _common.quiet()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the temporary folder goes, too
    rows = []
    with tempfile.TemporaryDirectory(prefix="edgetrim-export-") as scratch:
        for entry in measure(Path(scratch), options.model, options.precision, options.threads):
            _common.say(str(_common.write(options.results, entry)))
            rows.append(row(entry))
    print(_common.table(rows, HEADER))


if __name__ == "__main__":
    main()
