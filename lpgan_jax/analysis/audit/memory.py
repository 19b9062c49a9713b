"""How large a batch an audit has memory for: it keeps a few bytes for each random word."""

from __future__ import annotations

import os
from pathlib import Path

from lpgan_jax.analysis.cost import random_words
from lpgan_jax.mpc.party import Program

_BASE, _PER_WORD = 10**9, 20
"""Bytes that an audit takes: measured on the published network, at batches of 2 to 32."""
_SHARE = 0.5


def largest_batch(program: Program, size: int, memory: int | None = None) -> int:
    """The size of a batch, or the largest that an audit takes half of the memory for.

    Args:
        program: of a batch of this size.
        size: the configuration's.
        memory: bytes of this machine; by default what it has, or what this process may use.
    """
    available = _SHARE * (_memory() if memory is None else memory) - _BASE
    needed = _PER_WORD * random_words(*program)
    return size if needed <= available else max(1, int(size * available / needed))


def _memory() -> int:
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    try:
        allowed = int(limit.read_text())
    except (OSError, ValueError):  # none, or "max"
        return installed
    return min(installed, allowed)
