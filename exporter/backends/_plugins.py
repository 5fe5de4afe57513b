"""The library of plugins that an engine needs: full TensorRT loads it before it builds the engine, and before it opens one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exporter.bundle import sha256
from exporter.errors import EnvironmentMismatch
from plugins import _ipluginv3, _library
from plugins._contract import SUFFIX


def needed(graph: Path) -> dict[str, str] | None:
    """Path and hash of the library, if the graph, or the engine, has plugins in it.

    Raises:
        EnvironmentMismatch: it is not built.
    """
    if not graph.stem.endswith(SUFFIX):
        return None
    library = _library.path()
    if library is None:
        raise EnvironmentMismatch(
            f"{graph.name} has plugins in it, and their library is not built. Build it on this machine:\n"
            f"  {_library.HOW}\n"
            f"or name one in the environment variable {_library.VARIABLE}; or leave `plugins` out of the profile's [stack]."
        )
    return {"library": str(library.resolve()), "sha256": sha256(library)}


def load(trt: Any, library: str) -> None:
    """Register the library's plugins in this process: by TensorRT itself, or, where it was built without TensorRT's headers, by Python.

    Raises:
        EnvironmentMismatch: TensorRT does not take it.
    """
    try:
        kernels = _library.Library(Path(library))
    except (OSError, AttributeError) as e:
        raise EnvironmentMismatch(f"{library} is no library of these plugins ({e}). Build it:\n  {_library.HOW}") from e
    if not kernels.wrapped:
        _ipluginv3.register(trt, kernels)
    elif trt.get_plugin_registry().load_library(library) is None:
        raise EnvironmentMismatch(
            f"{trt.__name__} {trt.__version__} cannot load {library}: it was built for another TensorRT. Build it again, with "
            f"-DTENSORRT_ROOT=FOLDER if CMake did not find the headers of this one:\n  {_library.HOW}"
        )
