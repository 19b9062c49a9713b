"""How large a batch an audit has memory for: it keeps a few bytes for each random word."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lpgan_jax.bench import random_words

_BASE, _PER_WORD = 10**9, 20
"""Bytes that an audit takes: measured on the published network, at batches of 2 to 32."""
_SHARE = 0.5

Program = tuple[Callable[..., Any], Any, Any]


def largest_batch(program: Callable[[int], Program], wanted: int, memory: int | None = None) -> int:
    """The wanted size of a batch, or the largest that an audit takes half of the memory for.

    Args:
        program: of a batch of a size.
        wanted: the configuration's.
        memory: bytes of this machine; by default what it has, or what this process may use.
    """
    available = _SHARE * (_memory() if memory is None else memory) - _BASE
    needed = _PER_WORD * random_words(*program(wanted))
    return wanted if needed <= available else max(1, int(wanted * available / needed))


def _memory() -> int:
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    try:
        allowed = int(limit.read_text())
    except (OSError, ValueError):  # none, or "max"
        return installed
    return min(installed, allowed)
