"""A Python function as a call of compiled programs: XLA's FFI without a compiler.

XLA hands a handler one C struct, the call frame (`xla/ffi/api/c_api.h`, which jaxlib ships; its
version 0.3 is what is read here), with pointers to operands and results. ctypes reads it. Unlike
`jax.experimental.io_callback`, a program with such a call goes into the compilation cache, and the
buffers are handed over as they are, uncopied.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import traceback
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

Handler = Callable[[Sequence[memoryview], Sequence[memoryview]], None]
"""(operands, results) as bytes: reads the former, fills the latter; what it raises, the program
raises as `jax.errors.JaxRuntimeError` of the same text."""

_VERSION = (0, 3)
_METADATA = 1  # XLA_FFI_Extension_Metadata
_EXECUTE = 3  # XLA_FFI_ExecutionStage_EXECUTE
_ABORTED = 10  # XLA_FFI_Error_Code_ABORTED
_NO_ANSWER = 70  # the process's status, where not even an error could be given back
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 2, 8: 4, 9: 8, 11: 4, 12: 8}  # of XLA_FFI_DataType


class _Struct(ctypes.Structure):
    """Every struct of the API begins so."""

    _fields_: ClassVar[Any] = (("struct_size", ctypes.c_size_t), ("extension", ctypes.c_void_p))


class _Extension(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("metadata", ctypes.c_void_p),  # of a metadata extension
    )


class _Version(_Struct):
    _fields_ = (("major", ctypes.c_int), ("minor", ctypes.c_int))


class _Metadata(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("version", _Version),
        ("traits", ctypes.c_uint32),
    )


class _Buffer(_Struct):
    _fields_ = (
        ("dtype", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
    )


class _Buffers(_Struct):
    _fields_ = (
        ("size", ctypes.c_int64),
        ("types", ctypes.c_void_p),
        ("items", ctypes.POINTER(ctypes.POINTER(_Buffer))),
    )


class _CallFrame(_Struct):
    _fields_ = (
        ("api", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
        ("stage", ctypes.c_int),
        ("operands", _Buffers),
        ("results", _Buffers),
    )


class _Error(_Struct):
    _fields_ = (("message", ctypes.c_char_p), ("code", ctypes.c_int))


_CreateError = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_Error))


class _Api(_Struct):
    _fields_ = (
        ("version", _Version),
        ("internal", ctypes.c_void_p),
        ("create_error", _CreateError),
    )


_CHandler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_CallFrame))
_registered: dict[str, Any] = {}  # XLA keeps the address


def register(name: str, handler: Handler) -> None:
    """Have programs on CPUs that call `name` (`jax.ffi.ffi_call`) call a Python function.

    Args:
        name: of the target; of one handler for the life of the process.
        handler: see `Handler`; it is called from a thread of XLA's.

    Raises:
        ValueError: the name is taken.
    """
    if name in _registered:
        raise ValueError(f"{name}: registered already")

    def call(frame: Any) -> int | None:
        try:
            return _called(frame.contents, handler)
        except BaseException:  # whatever comes back would be taken for an answer
            traceback.print_exc()
            os._exit(_NO_ANSWER)

    _registered[name] = _CHandler(call)
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(_registered[name]), platform="cpu")


def _called(frame: _CallFrame, handler: Handler) -> int | None:
    """Null, or the address of an error of XLA's."""
    if frame.extension:
        extension = _Extension.from_address(frame.extension)
        if extension.type == _METADATA:
            metadata = _Metadata.from_address(extension.metadata)
            metadata.version.major, metadata.version.minor = _VERSION
            metadata.traits = 0
            return None
    if frame.stage != _EXECUTE:
        return None
    try:
        handler(_views(frame.operands), _views(frame.results))
    except BaseException as error:
        return _error(frame, str(error) or type(error).__name__)
    return None


def _views(buffers: _Buffers) -> list[memoryview]:
    return [_view(buffers.items[i].contents) for i in range(buffers.size)]


def _view(buffer: _Buffer) -> memoryview:
    if buffer.dtype not in _SIZES:
        raise TypeError(f"a buffer of XLA's type {buffer.dtype}, expected one of {sorted(_SIZES)}")
    size = _SIZES[buffer.dtype] * math.prod(buffer.dims[: buffer.rank])
    array = (ctypes.c_ubyte * size).from_address(buffer.data) if size else bytearray()
    return memoryview(array).cast("B")


def _error(frame: _CallFrame, message: str) -> int | None:
    create = _Api.from_address(frame.api).create_error
    made = _Error(ctypes.sizeof(_Error), None, message.encode(errors="replace"), _ABORTED)
    address: int | None = create(ctypes.byref(made))
    return address


@functools.cache
def works() -> bool:
    """Whether this jaxlib calls a handler as is expected here; tried once."""

    def increment(operands: Sequence[memoryview], results: Sequence[memoryview]) -> None:
        np.frombuffer(results[0], np.uint32)[:] = np.frombuffer(operands[0], np.uint32) + 1

    given = np.arange(3, dtype=np.uint32)
    result = jax.ShapeDtypeStruct(given.shape, given.dtype)
    try:
        register("lpgan_increment", increment)
        call = jax.ffi.ffi_call("lpgan_increment", result)
        cpu = jax.default_device(jax.local_devices(backend="cpu")[0])
        with jax.ensure_compile_time_eval(), cpu:  # also where a program is being traced
            return bool((np.asarray(jax.jit(call)(given)) == given + 1).all())
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return False
