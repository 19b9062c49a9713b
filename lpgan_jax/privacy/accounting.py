"""What DP-SGD spends: epsilon at a delta, after so many noised updates.

Each example is in a step's batch with the sampling rate as its probability, independently of the
others (Poisson sampling); the sum of clipped gradients gets Gaussian noise, of standard deviation
noise multiplier x clip. Two data sets are neighbours if one has an example more. Epsilon is that of
`dp_accounting`'s privacy loss distributions, which round pessimistically.

A batch has a fixed number of rows, and a draw may be larger: then some examples are left out. This
is no other mechanism but with the probability eta that it happens at all. If the one without a
limit is (epsilon, delta')-private, this one is (epsilon, delta' + (1 + e^epsilon) eta)-private:
Pr[M(D) in S] <= Pr[M'(D) in S] + eta <= e^epsilon (Pr[M(D') in S] + eta) + delta' + eta. So as much
of delta is kept for it; where that is more than a tenth, the setting is refused.
"""

from __future__ import annotations

import functools
import math
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lpgan_jax.privacy.sampling import require_sampling

if TYPE_CHECKING:
    from dp_accounting.pld import PLDAccountant

_FOR_DRAWS = 0.1
"""Part of delta for draws that are larger than a batch."""
_FINEST = 1e-3  # of noise multipliers that are searched for
_MOST = 2**17  # of these
_FINE = 1e-4  # of losses, to state epsilon
_COARSE = 1e-3  # of losses, to search for noise: ten times as fast
_ROOM = 9.0  # standard deviations of a draw between its mean and the batch


class TooLarge(ValueError):
    """Draws are larger than a batch too often."""


@dataclass(frozen=True)
class Mechanism:
    """One noised update.

    Attributes:
        examples: in the data set.
        sampling_rate: the probability of each to be in a batch.
        batch_size: rows of a batch: more are not taken.
        noise_multiplier: standard deviation of the noise, in clips.
    """

    examples: int
    sampling_rate: float
    batch_size: int
    noise_multiplier: float

    def __post_init__(self) -> None:
        """ValueError: a field is out of range."""
        require_sampling(self.sampling_rate, examples=self.examples, batch_size=self.batch_size)
        if not self.noise_multiplier > 0:
            raise ValueError(f"noise_multiplier: {self.noise_multiplier:g}, expected above 0")

    @functools.cached_property
    def too_large(self) -> float:
        """The probability that a draw has more examples than a batch has rows."""
        from scipy.stats import binom  # takes memory, in roles that account for nothing too

        return float(binom.sf(self.batch_size, self.examples, self.sampling_rate))

    def epsilon(self, updates: int, delta: float) -> float:
        """Spent by so many updates; 0 by none.

        Raises:
            ValueError: delta is not between 0 and 1.
            TooLarge: draws are larger than a batch too often.
        """
        if not 0 < delta < 1:
            raise ValueError(f"delta: {delta:g}, expected between 0 and 1")
        return _epsilon(self, updates, delta)

    def without_limit(self, updates: int, interval: float = _FINE) -> PLDAccountant:
        """The accountant of so many updates, if no draw is larger than a batch.

        `interval`: of losses, which are rounded up to multiples of it.
        """
        import dp_accounting  # as above
        from dp_accounting.pld import PLDAccountant

        gaussian = dp_accounting.GaussianDpEvent(self.noise_multiplier)
        event = dp_accounting.PoissonSampledDpEvent(self.sampling_rate, gaussian)
        neighbours = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
        accountant = PLDAccountant(neighbours, interval)
        return accountant.compose(event, updates)


@functools.lru_cache(256)
def _epsilon(of: Mechanism, updates: int, delta: float, interval: float = _FINE) -> float:
    if updates == 0:
        return 0.0
    accountant, eta = of.without_limit(updates, interval), updates * of.too_large
    if eta == 0:
        return float(accountant.get_epsilon(delta))
    # What a larger epsilon needs for draws is enough: the rest of delta is for the updates.
    most = accountant.get_epsilon((1 - _FOR_DRAWS) * delta)
    log_kept = math.log(eta) + _softplus(most)
    if log_kept > math.log(_FOR_DRAWS * delta):
        raise TooLarge(
            f"batch_size: {of.batch_size} rows, and a draw has more with probability "
            f"{of.too_large:.1g}, too often for delta {delta:g}: expected a larger batch, or "
            f"a sampling_rate below {of.sampling_rate:g}"
        )
    return float(accountant.get_epsilon(delta - math.exp(log_kept)))


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def noise_for(
    epsilon: float,
    delta: float,
    updates: int,
    *,
    examples: int,
    sampling_rate: float,
    batch_size: int,
) -> float:
    """The least noise multiplier, to 0.001, of which so many updates spend no more than epsilon.

    Raises:
        ValueError: a number is out of range, or as of `Mechanism.epsilon`.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon: {epsilon:g}, expected above 0")
    if updates < 1:
        raise ValueError(f"updates: {updates}, expected at least 1")

    def with_noise(thousandths: int) -> Mechanism:
        return Mechanism(examples, sampling_rate, batch_size, thousandths * _FINEST)

    def is_enough(thousandths: int) -> bool:
        with suppress(TooLarge):  # as epsilon is
            return _epsilon(with_noise(thousandths), updates, delta, _COARSE) <= epsilon
        return False

    with_noise(1000).epsilon(0, delta)  # or an error that names what is out of range
    # Step by step: with much less noise than it takes, an accountant takes minutes.
    low, high = 875, 1000
    while not is_enough(high):
        low, high = high, high + high // 2
        if high > _MOST:
            spent = with_noise(high).epsilon(updates, delta)  # or draws are larger too often
            raise ValueError(f"epsilon: {epsilon:g}, and with all noise it is {spent:.3g}")
    while high <= 1000 and is_enough(low):
        low, high = low - low // 8, low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high * _FINEST


def default_rate(examples: int, batch_size: int) -> float:
    """The sampling rate at which a batch has room for 9 standard deviations more than the mean.

    Raises:
        ValueError: the batch is larger than the data set.
    """
    if batch_size > examples:
        raise ValueError(f"batch_size: {batch_size}, expected at most the {examples} examples")
    # mean + 9 sqrt(mean) = batch_size
    mean = (math.sqrt(_ROOM**2 / 4 + batch_size) - _ROOM / 2) ** 2
    return mean / examples


@dataclass(frozen=True)
class Privacy:
    """What a training promises, of each example.

    Attributes:
        mechanism: one noised update.
        delta: at which epsilon is stated.
        updates: how many a step has.
    """

    mechanism: Mechanism
    delta: float
    updates: int = 1

    def __post_init__(self) -> None:
        """ValueError: a number is out of range, or draws are larger than a batch too often."""
        if self.updates < 1:
            raise ValueError(f"privacy.updates: {self.updates}, expected at least 1")
        self.mechanism.epsilon(0, self.delta)

    def epsilon(self, steps: int) -> float:
        """Spent by so many steps, those included that were repeated, or are void."""
        return self.mechanism.epsilon(self.updates * steps, self.delta)

    def stated(self, steps: int) -> dict[str, Any]:
        """Epsilon after so many steps, and what it holds for: flat, for people and programs."""
        of = self.mechanism
        return {
            "epsilon": self.epsilon(steps),
            "delta": self.delta,
            "noise_multiplier": of.noise_multiplier,
            "sampling_rate": of.sampling_rate,
            "examples": of.examples,
        }
