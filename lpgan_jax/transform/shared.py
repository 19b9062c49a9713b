"""Secret arrays outside of a program: what a function that was made secure takes and gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from lpgan_jax.mpc import shares
from lpgan_jax.mpc.fixed_point import FixedPoint
from lpgan_jax.mpc.shares import require_shares


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shared:
    """A secret array, as paired shares.

    Attributes:
        words: uint64[2, *shape], S1's share first.
        frac_bits: fraction bits of the value; 0 of integers and booleans.
        dtype: of the value in ordinary code: float32, int32, uint32 or bool.
    """

    words: Any = field(repr=False)  # whoever reads both shares in a log knows the secret
    frac_bits: int = field(metadata={"static": True})
    dtype: Any = field(default=np.dtype(np.float32), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""
        return tuple(self.words.shape[1:])


def is_shared(leaf: object) -> bool:
    """Whether a node of a tree is a `Shared`: for `is_leaf`."""
    return isinstance(leaf, Shared)


def reveal(shares_of: Any, fxp: FixedPoint | None = None) -> Any:
    """SP's reconstruction.

    Args:
        shares_of: uint64[2, *shape], with `fxp`; or a pytree of `Shared`, whose other leaves are
            public and stay as they are.
        fxp: the encoding of an array; a `Shared` has its own.

    Returns:
        float64[*shape], or a pytree of such arrays; of a `Shared` integer or boolean, int64 or
        bool.

    Raises:
        TypeError: the shares are not uint64, or there is an array of shares and no encoding.
        ValueError: a leading axis is not 2.
    """
    if fxp is not None:
        return shares.reveal(shares_of, fxp)

    def leaf(value: Any) -> Any:
        if not is_shared(value):
            if getattr(value, "dtype", None) == np.uint64:
                raise TypeError("fxp: expected the encoding of an array of shares")
            return value
        require_shares("shares", value.words)
        words = value.words[0] + value.words[1]
        integers = words.astype(np.int64)
        if value.dtype == bool:
            return integers != 0
        if np.issubdtype(value.dtype, np.integer):
            return integers >> value.frac_bits
        return integers * 2.0**-value.frac_bits

    return jax.tree.map(leaf, shares_of, is_leaf=is_shared)
