"""What a role's machine is like, as the others may know it: its time, and which code it has."""

from __future__ import annotations

import platform
import time
from importlib.metadata import version

import jax
from pydantic import Field

from lpgan_jax.programs import agreement
from lpgan_jax.training.config import Fields

_LONGEST = 64


class Condition(Fields):
    """Of one machine, at one moment. Nothing in it is secret."""

    now: float
    """Seconds since 1970, by its clock."""
    lpgan: str = Field(max_length=_LONGEST)
    """The version of lpgan_jax."""
    jax: str = Field(max_length=_LONGEST)
    python: str = Field(max_length=_LONGEST)
    code: str = Field(max_length=_LONGEST)
    """A digest of the code that decides what is sent (`agreement.code`)."""

    @property
    def versions(self) -> str:
        """For people."""
        return f"lpgan_jax {self.lpgan}, JAX {self.jax}, Python {self.python}"


def own_condition() -> Condition:
    """Of this machine, now."""
    return Condition(
        lpgan=version("lpgan-jax"),
        jax=jax.__version__,
        python=platform.python_version(),
        code=agreement.code(),
        now=time.time(),  # when all else is known
    )
