"""One GPU through NVIDIA's driver library, by ctypes: memory, copies, a stream, recorded graphs.

The driver (libcuda.so.1) is wherever a GPU is, and its binary interface stays what it was; a binding would have to be
installed in the version of CUDA that the board has. Only the functions below are used.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_ulonglong, c_void_p
from dataclasses import dataclass
from typing import Any

from exporter.backends._contract import Array
from exporter.errors import EnvironmentMismatch, ExportError

LIBRARY = "libcuda.so.1"
OUT_OF_MEMORY = 2
_NON_BLOCKING, _THREAD_LOCAL = 1, 1
_MAJOR, _MINOR = 75, 76
_ON_DEVICE = 2

_FUNCTIONS: dict[str, Sequence[Any]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceTotalMem_v2": (POINTER(c_size_t), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxSetCurrent": (c_void_p,),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuMemcpyDtoDAsync_v2": (c_uint64, c_uint64, c_size_t, c_void_p),
    "cuMemcpy2DAsync_v2": (c_void_p, c_void_p),
    "cuMemsetD8Async": (c_uint64, c_ubyte, c_size_t, c_void_p),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, POINTER(c_void_p)),
    "cuGraphInstantiateWithFlags": (POINTER(c_void_p), c_void_p, c_ulonglong),
    "cuGraphDestroy": (c_void_p,),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
}
"""Name → types of its arguments; all return a CUresult, 0 for success."""


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D_v2."""

    _fields_ = (
        *(
            (f"{side}{name}", kind)
            for side in ("src", "dst")
            for name, kind in (
                ("XInBytes", c_size_t), ("Y", c_size_t), ("MemoryType", c_uint), ("Host", c_void_p), ("Device", c_uint64),
                ("Array", c_void_p), ("Pitch", c_size_t),
            )
        ),
        ("WidthInBytes", c_size_t), ("Height", c_size_t),
    )  # fmt: skip


class CudaError(ExportError):
    """A function of the driver failed. `code` is its CUresult."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def missing() -> str | None:
    """None, or what keeps CUDA from coming up, as the object of "this machine has"."""
    try:
        driver = _library()
    except OSError:
        return f"no NVIDIA driver ({LIBRARY})"
    count = c_int(0)
    if (code := driver.cuInit(0)) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return f"an NVIDIA driver but no usable GPU (cuInit returned {code})"
    return None


@dataclass(frozen=True)
class Gpu:
    """A GPU. compute_capability: 87 for SM 8.7. driver: the CUDA version it was made for, 12060 for 12.6. memory: bytes."""

    name: str
    compute_capability: int
    driver: int
    memory: int


def first_gpu() -> Gpu:
    """The first GPU that this process sees; takes no memory there. Raises EnvironmentMismatch where there is none."""
    driver, device = _started()
    text, version, total = ctypes.create_string_buffer(256), c_int(), c_size_t()
    _call(driver, "cuDeviceGetName", text, len(text), device)
    _call(driver, "cuDriverGetVersion", ctypes.byref(version))
    _call(driver, "cuDeviceTotalMem_v2", ctypes.byref(total), device)
    capability = 0
    for which in (_MAJOR, _MINOR):
        value = c_int()
        _call(driver, "cuDeviceGetAttribute", ctypes.byref(value), which, device)
        capability = 10 * capability + value.value
    return Gpu(text.value.decode(errors="replace"), capability, version.value, total.value)


class Cuda:
    """The first GPU that this process sees, with a stream of its own. Shares TensorRT's (the primary) context.

    Raises:
        EnvironmentMismatch: there is none.
    """

    def __init__(self) -> None:
        self.gpu = first_gpu()
        self._driver, self._device = _started()
        self._context, stream = c_void_p(), c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self.use()
        self._call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        self._stream = stream

    def close(self) -> None:
        self._call("cuStreamDestroy_v2", self._stream)
        self._call("cuDevicePrimaryCtxRelease_v2", self._device)

    def use(self) -> None:
        """Make this the calling thread's GPU."""
        self._call("cuCtxSetCurrent", self._context)

    @property
    def stream(self) -> int:
        """The stream's handle, as TensorRT takes it."""
        return self._stream.value or 0

    def memory(self) -> tuple[int, int]:
        """Bytes that are free, and bytes in all."""
        free, total = c_size_t(), c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def allocate(self, size: int) -> int:
        """Device memory of `size` bytes, at least 1; its address. Raises CudaError with code OUT_OF_MEMORY."""
        address = c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), size)
        return address.value

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", address)

    def upload(self, address: int, array: Array) -> None:
        """Copy a contiguous array to the device, in the stream's order. It may be read until `synchronize`."""
        if array.nbytes:
            self._call("cuMemcpyHtoDAsync_v2", address, array.ctypes.data, array.nbytes, self._stream)

    def download(self, array: Array, address: int) -> None:
        """Fill a contiguous array from the device."""
        if array.nbytes:
            self._call("cuMemcpyDtoHAsync_v2", array.ctypes.data, address, array.nbytes, self._stream)
        self.synchronize()

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy on the device, in the stream's order."""
        if size:
            self._call("cuMemcpyDtoDAsync_v2", target, source, size, self._stream)

    def copy_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, size: int, rows: int
    ) -> None:  # fmt: skip
        """Copy so many rows of `size` bytes on the device, in the stream's order. pitch: bytes from a row to the next."""
        if size and rows:
            how = _Copy2D(
                srcMemoryType=_ON_DEVICE, srcDevice=source, srcPitch=source_pitch,
                dstMemoryType=_ON_DEVICE, dstDevice=target, dstPitch=target_pitch, WidthInBytes=size, Height=rows,
            )  # fmt: skip
            self._call("cuMemcpy2DAsync_v2", ctypes.byref(how), self._stream)

    def clear(self, address: int, size: int) -> None:
        """Set bytes on the device to zero, in the stream's order."""
        if size:
            self._call("cuMemsetD8Async", address, 0, size, self._stream)

    def synchronize(self) -> None:
        self._call("cuStreamSynchronize", self._stream)

    def begin_recording(self) -> None:
        """What goes into the stream from here on is recorded, not done."""
        self._call("cuStreamBeginCapture_v2", self._stream, _THREAD_LOCAL)

    def end_recording(self) -> int:
        """The recorded graph, ready to launch; its handle."""
        graph, ready = c_void_p(), c_void_p()
        self._call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        try:
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(ready), graph, 0)
        finally:
            self._call("cuGraphDestroy", graph)
        return ready.value or 0

    def launch(self, graph: int) -> None:
        self._call("cuGraphLaunch", graph, self._stream)

    def drop(self, graph: int) -> None:
        self._call("cuGraphExecDestroy", graph)

    def _call(self, function: str, *arguments: Any) -> None:
        _call(self._driver, function, *arguments)


def _started() -> tuple[Any, c_int]:
    """The driver, and its first device."""
    if lacking := missing():
        raise EnvironmentMismatch(f"This machine has {lacking}.")
    driver, device = _library(), c_int()
    _call(driver, "cuDeviceGet", ctypes.byref(device), 0)
    return driver, device


def _call(driver: Any, function: str, *arguments: Any) -> None:
    code = getattr(driver, function)(*arguments)
    if code:
        name = c_char_p()
        driver.cuGetErrorName(code, ctypes.byref(name))
        told = (name.value or b"unknown error").decode(errors="replace")
        raise CudaError(code, f"The NVIDIA driver's {function} failed: {told} ({code}).")


def _library() -> Any:
    """Raises OSError where there is none."""
    driver = ctypes.CDLL(LIBRARY)
    for name, arguments in _FUNCTIONS.items():
        function = getattr(driver, name)
        function.argtypes, function.restype = arguments, c_int
    return driver
