"""Discrete Gaussian noise: exact, from a cryptographic generator.

The probability of an integer x is proportional to exp(-x^2 / (2 sigma^2)). It is drawn by
rejection from a discrete Laplace distribution, with coins of probability exp(-gamma) (Canonne,
Kamath, Steinke, "The Discrete Gaussian for Differential Privacy", 2020, algorithms 1 to 3), of all
values at once. A coin compares a random number with a probability; where 64 bits of it and float64
leave open which is larger, integers of any length decide. So nothing that comes out was rounded, as
Gaussian floats are, whose lowest bits tell what they were added to (Mironov, 2012).

For sigma of 2^10 and more no accountant tells this noise from a rounded Gaussian: the divergences
differ by less than exp(-2 pi^2 sigma^2).
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

SEED_BYTES = 32
LARGEST_SIGMA = 2**40
_CLOSE = 2.0**-34
"""Of probabilities, and of their exponents: what is closer is decided exactly. Those of 50 sigma
and less are right within 2^-36 in float64, and no value beyond is ever drawn (exp(-1000))."""


class Stream:
    """Random words of ChaCha20 (RFC 8439), from a seed that is used for nothing else."""

    def __init__(self, seed: bytes) -> None:
        """ValueError: the seed has not `SEED_BYTES`."""
        if len(seed) != SEED_BYTES:
            raise ValueError(f"seed: {len(seed)} bytes, expected {SEED_BYTES}")
        self._stream = Cipher(ChaCha20(seed, bytes(16)), None).encryptor()

    def words(self, count: int) -> np.ndarray:
        """The next uint64[count]."""
        return np.frombuffer(self._stream.update(bytes(8 * count)), "<u8")


def discrete_gaussian(stream: Stream, sigma: int, count: int) -> np.ndarray:
    """Independent values, int64[count].

    Args:
        stream: of random words.
        sigma: the standard deviation (that of the continuous Gaussian), in LSB.
        count: of values.

    Raises:
        ValueError: sigma is not between 1 and 2^40.
    """
    if not 1 <= sigma <= LARGEST_SIGMA:
        raise ValueError(f"sigma: {sigma} LSB, expected 1 to 2^40")
    scale = sigma + 1

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        value = _laplace(stream, scale, count)
        # (|y| - sigma^2 / t)^2 / (2 sigma^2), over 2 sigma^2 t^2
        size = np.abs(value)
        approximate = (size - sigma * (sigma / scale)) ** 2 / (2.0 * sigma * sigma)

        def exact(place: int) -> Fraction:
            off = int(size[place]) * scale - sigma * sigma
            return Fraction(off * off, 2 * sigma * sigma * scale * scale)

        return value, _exp_coins(stream, approximate, exact)

    return _accepted(draw, count)


def _laplace(stream: Stream, scale: int, count: int) -> np.ndarray:
    """Values of probability proportional to exp(-|x| / scale)."""

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        low, accepted = _low_part(stream, scale, count)
        value = low + scale * _geometric(stream, len(low))
        negative = (stream.words(len(value)) & np.uint64(1)).astype(bool)
        return np.where(negative, -value, value), accepted & ~(negative & (value == 0))

    return _accepted(draw, count)


def _low_part(stream: Stream, scale: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(uniform below the scale, whether to take it: with probability exp(-low / scale))."""
    low = _below(stream, scale, count)
    return low, _exp_coins(stream, low / scale, lambda place: Fraction(int(low[place]), scale))


def _below(stream: Stream, bound: int, count: int) -> np.ndarray:
    """Uniform integers in [0, bound)."""
    most = 2**64 - 2**64 % bound  # a multiple of the bound

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        words = stream.words(count)
        fits = np.ones(count, bool) if most == 2**64 else words < np.uint64(most)
        return (words % np.uint64(bound)).astype(np.int64), fits

    return _accepted(draw, count)


def _geometric(stream: Stream, count: int) -> np.ndarray:
    """How many coins of probability 1 / e fall well before the first that does not."""
    found, going = np.zeros(count, np.int64), np.arange(count)
    while len(going):
        ones = np.ones(len(going))
        going = going[_small_exp_coins(stream, ones, lambda place: Fraction(1))]
        found[going] += 1
    return found


def _exp_coins(stream: Stream, gammas: np.ndarray, exact: Callable[[int], Fraction]) -> np.ndarray:
    """Coins of probability exp(-gamma), for gammas from 0 on.

    Args:
        stream: of random words.
        gammas: float64, right within 2^-36.
        exact: what one is exactly, by its place.
    """
    # exp(-gamma) = exp(-1)^n exp(-(gamma - n)): where gamma is next to an integer, either n does.
    whole = np.maximum(np.floor(gammas), 0).astype(np.int64)
    close = np.abs(gammas - np.round(gammas)) < _CLOSE
    for place in np.flatnonzero(close):
        whole[place] = int(exact(int(place)))
    well = np.ones(len(gammas), bool)
    going = np.flatnonzero(whole > 0)
    rounds = 0
    while len(going):
        ones = np.ones(len(going))
        well[going] &= _small_exp_coins(stream, ones, lambda place: Fraction(1))
        rounds += 1
        going = going[(whole[going] > rounds) & well[going]]
    left = np.flatnonzero(well)
    rest = np.clip(gammas[left] - whole[left], 0.0, 1.0)

    def exact_rest(place: int) -> Fraction:
        return exact(int(left[place])) - int(whole[left[place]])

    well[left] = _small_exp_coins(stream, rest, exact_rest)
    return well


def _small_exp_coins(
    stream: Stream, gammas: np.ndarray, exact: Callable[[int], Fraction]
) -> np.ndarray:
    """The same for gammas between 0 and 1: algorithm 1."""
    number, going = np.ones(len(gammas), np.int64), np.arange(len(gammas))
    while len(going):
        k = number[going]

        def probability(place: int, going: np.ndarray = going, k: np.ndarray = k) -> Fraction:
            return exact(int(going[place])) / int(k[place])

        going = going[_coins(stream, gammas[going] / k, probability)]
        number[going] += 1
    return number % 2 == 1


def _coins(
    stream: Stream, probabilities: np.ndarray, exact: Callable[[int], Fraction]
) -> np.ndarray:
    """Coins of probabilities that are known to 2^-35, and exactly where that matters."""
    words = stream.words(len(probabilities))
    uniform = words / 2.0**64
    well = uniform < probabilities
    for place in np.flatnonzero(np.abs(uniform - probabilities) < _CLOSE):
        well[place] = _is_below(stream, int(words[place]), exact(int(place)))
    return well


def _is_below(stream: Stream, word: int, probability: Fraction) -> bool:
    """Whether a uniform real number whose first 64 bits are a word is below a probability."""
    bits = 64
    while True:
        scaled = probability * 2**bits
        if word + 1 <= scaled:
            return True
        if word >= scaled:
            return False
        word, bits = word << 64 | int(stream.words(1)[0]), bits + 64


def _accepted(draw: Callable[[int], tuple[np.ndarray, np.ndarray]], count: int) -> np.ndarray:
    """The first so many values of those that are taken: (values, whether they are)."""
    parts: list[np.ndarray] = []
    missing = count
    while missing > 0:
        values, taken = draw(missing + missing // 4 + 16)
        parts.append(values[taken][:missing])
        missing -= len(parts[-1])
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
