"""Do two roles have the same program? What each is about to run, as digests, and a difference."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import jax
import numpy as np

from lpgan_jax.programs.secured import SecureProgram
from lpgan_jax.transform.fingerprint import digests, first_difference

Digests = Mapping[str, str]
"""Of each function of a program, by its name."""

_PUBLIC = "init, what is public"


def digests_of(program: SecureProgram) -> dict[str, str]:
    """Of the step, of every answer, and of the public values that the first step begins with."""
    found = {name: digests(traced) for name, traced in program.functions.items()}
    public = hashlib.sha256()
    for value in jax.tree.leaves(program.schedule(0)):
        array = np.asarray(value)
        public.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return found | {_PUBLIC: public.hexdigest()}


def short(of: Digests) -> dict[str, str]:
    """A digest of each function's, where it is enough to say which function differs."""
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in of.items()}


def difference(program: SecureProgram, other: Digests) -> str | None:
    """Where another role's program differs first, by the digests of it; None if it does not."""
    own = digests_of(program)
    if of_names := _other_names(own, other):
        return of_names
    for name, traced in program.functions.items():
        if (found := first_difference(traced, other[name])) is not None:
            return f"{name}: {found}"
    return _PUBLIC if own[_PUBLIC] != other[_PUBLIC] else None


def differing(own: Digests, other: Digests) -> str | None:
    """The name of a function that differs, of two `short`s; None if none does."""
    if of_names := _other_names(own, other):
        return of_names
    return next((name for name in own if own[name] != other[name]), None)


def _other_names(own: Digests, other: Digests) -> str | None:
    if set(own) == set(other):
        return None
    return f"functions {', '.join(sorted(own))}, and there {', '.join(sorted(other))}"
