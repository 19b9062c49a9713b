"""Do two roles have the same program? What each is about to run, as digests, and a difference."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

import lpgan_jax
from lpgan_jax.programs import shapes
from lpgan_jax.programs.secured import secured
from lpgan_jax.programs.training import Training
from lpgan_jax.transform.fingerprint import digests, first_difference

Digests = Mapping[str, str]
"""Of each function of a program, by its name, and of what else must be the same."""

PROTOCOLS = "the code of lpgan_jax"
PUBLIC = "init, what is public"
OPENED = "what is opened"

_ROOMS = ("ring", "mpc", "transform", "programs")  # which decide what is sent


def digests_of(training: Training) -> dict[str, str]:
    """Of the protocols, of step and answers, of public values at the start, of what is opened."""
    program = secured(training.program)
    found = {PROTOCOLS: code()}
    found |= {name: digests(traced) for name, traced in program.functions.items()}
    public = hashlib.sha256()
    for value in jax.tree.leaves(program.schedule(0)):
        array = np.asarray(value)
        public.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    sample = training.sample
    opened = {
        **program.choices,
        "told": str(jax.tree.structure(shapes.told_shapes(program))),
        "sample": "" if sample is None else f"{sample.answer} {sample.opened}",
    }
    for name in training.program.answers:
        opened[name] = str(jax.tree.structure(shapes.answer_shapes(program, name)))
    return found | {PUBLIC: public.hexdigest(), OPENED: _sha(repr(sorted(opened.items())))}


def short(of: Digests) -> dict[str, str]:
    """A digest of each, where it is enough to say which one differs."""
    return {name: _sha(text) for name, text in of.items()}


def difference(training: Training, other: Digests) -> str | None:
    """Where another role's program differs first, by the digests of it; None if it does not."""
    own = digests_of(training)
    name = differing(own, other)
    traced = secured(training.program).functions.get(name or "")
    if name is None or traced is None:
        return name
    return f"{name}: {first_difference(traced, other[name])}"


def differing(own: Digests, other: Digests) -> str | None:
    """The name of what differs; None if nothing does."""
    if set(own) != set(other):
        return f"functions {', '.join(sorted(own))}, and there {', '.join(sorted(other))}"
    return next((name for name in own if own[name] != other[name]), None)


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def code() -> str:
    """A digest of the protocols: two versions may deal differently for the same program."""
    digest, package = hashlib.sha256(), Path(lpgan_jax.__file__).parent
    for room in _ROOMS:
        for file in sorted((package / room).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()
