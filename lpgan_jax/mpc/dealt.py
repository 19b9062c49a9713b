"""Values that DS knows: those that it dealt, and those that it has not dealt yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax

from lpgan_jax.ring.words import Elements


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dealt:
    """A value that only DS knows, of which each server holds a share.

    Attributes:
        share: this server's share.
        plain: the value itself, which exists where both seeds do (simulate, deal); None online.
    """

    share: Elements
    plain: Elements | None

    def map(self, linear: Callable[[jax.Array], jax.Array]) -> Dealt:
        """The image under a linear map with public static coefficients."""
        return Dealt(linear(self.share), None if self.plain is None else linear(self.plain))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Owed:
    """A value that DS knows, and of which the servers have no shares yet.

    Attributes:
        plain: the value, which exists where both seeds do (simulate, deal); None online.
    """

    plain: Elements | None

    def map(self, linear: Callable[[jax.Array], jax.Array]) -> Owed:
        """The image under a linear map with public static coefficients."""
        return Owed(None if self.plain is None else linear(self.plain))
