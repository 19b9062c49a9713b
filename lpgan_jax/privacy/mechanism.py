"""The noise of private sums: whose it is, how large, and how it is drawn."""

from __future__ import annotations

import hashlib
import math
import secrets
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lpgan_jax.privacy.noise import LARGEST_SIGMA, SEED_BYTES, Stream, discrete_gaussian

Source = Literal["dealer", "servers"]


@dataclass(frozen=True)
class Noise:
    """Of the private sums of a step: discrete Gaussian, on the grid of an LSB.

    Leaving out one example moves a sum by `clip` at most, and by up to an LSB more in each element,
    as it is rounded: this norm is its sensitivity.

    Attributes:
        multiplier: standard deviation of each element, in sensitivities; of one server's noise.
        clip: as of `lp.private_sum`.
        size: elements of a sum.
        sums: how many private sums a step has.
        source: `dealer`: DS deals its shares, and so knows it. `servers`: each server adds noise of
            its own, of this multiplier, to its own share: nobody knows the sum, and whoever knows
            one server's still faces the other one's.
    """

    multiplier: float
    clip: float
    size: int
    sums: int = 1
    source: Source = "dealer"

    def __post_init__(self) -> None:
        """ValueError: a number is not above 0."""
        for name in ("multiplier", "clip", "size", "sums"):
            if not getattr(self, name) > 0:
                raise ValueError(f"noise.{name}: {getattr(self, name)}, expected above 0")

    @property
    def shape(self) -> tuple[int, int]:
        """Of what a step takes: a row for each sum."""
        return self.sums, self.size

    def sigma(self, frac_bits: int) -> int:
        """Its standard deviation in LSB, rounded up.

        Raises:
            ValueError: it is not between 1 and 2^40.
        """
        sensitivity = self.clip * 2.0**frac_bits + math.sqrt(self.size)
        found = math.ceil(self.multiplier * sensitivity)
        if found > LARGEST_SIGMA:
            raise ValueError(f"noise.multiplier: {self.multiplier:g}, so large that it has no room")
        return found

    def draw(self, key: bytes, step: int, frac_bits: int) -> np.ndarray:
        """One party's noise of a step, int64[sums, size] in LSB.

        Args:
            key: `SEED_BYTES` bytes that are this party's secret, of one attempt: two steps with the
                same noise would tell what they differ in.
            step: counted from 0.
            frac_bits: of what it is added to.
        """
        if len(key) != SEED_BYTES:
            raise ValueError(f"key: {len(key)} bytes, expected {SEED_BYTES}")
        seed = hashlib.sha256(b"lpgan noise" + key + step.to_bytes(8, "little")).digest()
        values = discrete_gaussian(Stream(seed), self.sigma(frac_bits), math.prod(self.shape))
        return values.reshape(self.shape)

    def share(self, key: bytes, step: int, frac_bits: int) -> np.ndarray:
        """The same as a server's own share of both servers' sum: words of the ring."""
        return self.draw(key, step, frac_bits).view(np.uint64)


def noise_keys(noise: Noise, seed: int | None) -> list[bytes]:
    """A key for each party that draws; `seed`: for simulations only, else nobody can guess them."""
    parties = 2 if noise.source == "servers" else 1
    if seed is None:
        return [secrets.token_bytes(SEED_BYTES) for _ in range(parties)]
    return [seeded(f"noise of party {party}", seed) for party in range(parties)]


def seeded(purpose: str, seed: int) -> bytes:
    """A key from a seed; it is as secret as the seed."""
    return hashlib.sha256(f"lpgan {purpose} {seed}".encode()).digest()
