"""Tests of words that should be uniform and independent, and of samples that have one law."""

import numpy as np
from scipy import stats


def byte_counts(words):
    """[8, 256]: how often each byte has each value."""
    positions = 256 * np.arange(8, dtype=np.uint16)
    return np.bincount((words.view(np.uint8).reshape(-1, 8) + positions).reshape(-1),
                       minlength=8 * 256).reshape(8, 256).astype(float)  # fmt: skip


def kolmogorov_smirnov(words):
    """The p-value of words as uniform fractions."""
    ranks = np.arange(len(words) + 1) / len(words)
    fractions = np.sort(words) * 2.0**-64
    distance = max((ranks[1:] - fractions).max(), (fractions - ranks[:-1]).max())
    return stats.kstwobign.sf(distance * np.sqrt(len(words)))


def correlations(words, lag):
    """The p-value of all pairs of bits of words that are `lag` apart."""
    lag = min(lag, len(words) // 2)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little").reshape(-1, 64)
    bits = 2 * bits.astype(np.float32) - 1  # counts below 2^24 are exact
    correlation = bits[:-lag].T @ bits[lag:]
    return stats.chi2.sf((correlation.astype(float) ** 2).sum() / (len(bits) - lag), 64**2)


def two_samples(first, second, level):
    """(statistic, the value that it passes with probability `level` if the law is the same)."""
    first, second = np.sort(np.ravel(first)), np.sort(np.ravel(second))
    at = np.concatenate([first, second])
    statistic = np.abs(
        np.searchsorted(first, at, "right") / len(first)
        - np.searchsorted(second, at, "right") / len(second)
    ).max()
    effective = len(first) * len(second) / (len(first) + len(second))
    return statistic, np.sqrt(-np.log(level / 2) / 2 / effective)
