"""Optional kernels for CPUs: built on first use with the system's C++ compiler, if there is one.

Ring products and ChaCha20 take most of a training step, and XLA reaches a fraction of what a CPU
can do in either. `kernels.cc` gives the same words several times as fast. Without a compiler, or
with the environment variable `LPGAN_NATIVE=0`, the portable code runs; nothing else changes.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jaxlib

from lpgan_jax.common.files import cache_directory, require_trusted

RING_PRODUCT = "lpgan_ring_product"
CHACHA20 = "lpgan_chacha20"

_SOURCE = Path(__file__).with_name("kernels.cc")
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-w")
_log = logging.getLogger(__name__)


@functools.cache
def available() -> bool:
    """Whether the kernels are registered with XLA; builds them when first asked."""
    if os.environ.get("LPGAN_NATIVE", "1") == "0":
        return False
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        _log.info("no C++ compiler (%s): the portable code runs", ", ".join(_COMPILERS))
        return False
    folder = cache_directory("native", "the portable code runs")
    if folder is None:
        return False
    try:
        library = ctypes.CDLL(str(_built(compiler, folder)))
    except (OSError, subprocess.SubprocessError) as error:  # no room, no trust, or a failed build
        detail = getattr(error, "stderr", None) or error
        _log.warning("native kernels: %s: the portable code runs", detail)
        return False
    for name in (RING_PRODUCT, CHACHA20):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return True


def _built(compiler: str, folder: Path) -> Path:
    """The library for this source, compiler, jaxlib and processor; compiled if it is new.

    Nobody else can swap it before it is loaded: its folder is private.
    """
    described = (_SOURCE.read_text(), compiler, _FLAGS, jaxlib.__version__, _processor())
    name = hashlib.sha256(repr(described).encode()).hexdigest()[:16]
    library = folder / f"kernels-{name}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / library.name
            subprocess.run(
                [compiler, *_FLAGS, f"-I{jax.ffi.include_dir()}", str(_SOURCE), "-o", str(made)],
                check=True,
                capture_output=True,
                text=True,
                errors="replace",  # a compiler may answer in any encoding
                timeout=120,
            )
            made.chmod(0o600)  # which compilers leave to the umask
            made.replace(library)  # whole, or not at all: others may be building it too
    require_trusted(library)
    return library


def _processor() -> str:
    """What `-march=native` depends on: a cache folder may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
