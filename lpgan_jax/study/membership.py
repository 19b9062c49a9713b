"""Can an attacker tell who was trained on? Membership inference, and what epsilon allows.

Two attacks, by a score of each image: of SD, its logit (Hayes et al., "LOGAN", 2019: SD remembers
what it was shown); of generated images, how near one comes to the image (Hilprecht et al., "Monte
Carlo and Reconstruction Membership Inference Attacks against Generative Models", 2019). Whoever is
above a threshold counts as a member. The scores are given; the thresholds are looked at on the same
images, so what an attack gains is overestimated, by no more than the interval that is stated.

What is (epsilon, delta)-private bounds every attack: members are found with a probability of at
most e^epsilon times that of a false alarm, and delta (Kairouz et al. 2015).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta

_CONFIDENCE = 0.95
_AT_ONCE = 256


@dataclass(frozen=True)
class Attack:
    """How far an attack came.

    Attributes:
        name: what was attacked.
        area: under its curve: the probability that a member scores higher than somebody else; 0.5
            by chance.
        advantage: the largest difference between the shares of members and of others above a
            threshold; about 0 by chance.
        error: half of the interval in which the difference is with 95 %, at all thresholds at once
            (Dvoretzky, Kiefer, Wolfowitz, of both sides).
        members: how many of each kind were looked at.
    """

    name: str
    area: float
    advantage: float
    error: float
    members: int


def attack(name: str, members: np.ndarray, others: np.ndarray) -> Attack:
    """From scores of members [N] and of others [M]: higher ones say that it is a member.

    Raises:
        ValueError: a side is empty, or a score is not finite.
    """
    for side, scores in (("members", members), ("others", others)):
        if scores.ndim != 1 or not len(scores) or not np.isfinite(scores).all():
            raise ValueError(f"{side}: expected finite scores [N], N >= 1")
    thresholds = np.concatenate([members, others])
    shares = [_above(scores, thresholds) for scores in (members, others)]
    above, ties = (_pairs(members, others, side) for side in ("left", "right"))
    area = (above + ties) / 2 / (len(members) * len(others))
    advantage = float(np.max(shares[0] - shares[1], initial=0.0))
    log = math.log(4 / (1 - _CONFIDENCE))
    error = sum(math.sqrt(log / (2 * len(scores))) for scores in (members, others))
    return Attack(name, area, advantage, error, min(len(members), len(others)))


def _above(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """The share of scores at or above each threshold."""
    return 1 - np.searchsorted(np.sort(scores), thresholds, "left") / len(scores)


def _pairs(members: np.ndarray, others: np.ndarray, side: str) -> int:
    """How many others are below each member, in all ("left"), or not above it ("right")."""
    return int(np.searchsorted(np.sort(others), members, side).sum())  # type: ignore[call-overload]


def advantage_bound(epsilon: float, delta: float) -> float:
    """The largest advantage that (epsilon, delta) leaves any attack: (e^eps - 1 + 2 d)/(e^eps + 1).

    Where e^epsilon x + delta meets 1 - e^-epsilon (1 - delta - x) (Kairouz et al. 2015).
    """
    return math.tanh(epsilon / 2) + 2 * delta / (math.exp(epsilon) + 1)


def area_bound(epsilon: float, delta: float) -> float:
    """The largest area under the curve that it leaves: the curve is below both lines."""
    grid = np.linspace(0, 1, 100_001)
    first = np.exp(min(epsilon, 700.0)) * grid + delta
    second = 1 - np.exp(-epsilon) * (1 - delta - grid)
    return float(np.trapezoid(np.clip(np.minimum(first, second), 0, 1), grid))


def least_epsilon(members: np.ndarray, others: np.ndarray, delta: float) -> float:
    """An epsilon that scores show was spent, at least, with 95 %; 0 if they show nothing.

    From how many members and others are on one side of a threshold (Clopper, Pearson 1934, half of
    the error for each). It is chosen on every other score, and tried on the rest.
    """
    (try_m, m), (try_o, o) = ((scores[0::2], scores[1::2]) for scores in (members, others))
    thresholds = np.unique(np.concatenate([try_m, try_o]))
    sides = [(1, at) for at in thresholds] + [(-1, at) for at in thresholds]

    def shown(side: int, threshold: float, m: np.ndarray, o: np.ndarray) -> float:
        # Above a threshold are more members; below it more others.
        first, second = (m, o) if side > 0 else (-o, -m)
        at = side * threshold
        hits, alarms = int((first >= at).sum()), int((second >= at).sum())
        error = (1 - _CONFIDENCE) / 2
        low = beta.ppf(error, hits, len(first) - hits + 1) if hits else 0.0
        high = beta.ppf(1 - error, alarms + 1, len(second) - alarms)
        high = high if alarms < len(second) else 1.0
        return max(0.0, math.log(max(low - delta, 1e-300) / high))

    side, threshold = max(sides, key=lambda of: shown(of[0], of[1], try_m, try_o))
    return shown(side, threshold, m, o)


def nearness(images: np.ndarray, generated: np.ndarray) -> np.ndarray:
    """How near the nearest generated image comes to each: minus the squared distance of pixels.

    Args:
        images: [N, ...].
        generated: [M, ...].
    """
    flat = generated.reshape(len(generated), -1).astype(np.float32)
    norms = (flat**2).sum(1)

    def some(part: np.ndarray) -> np.ndarray:
        x = part.reshape(len(part), -1).astype(np.float32)
        nearest: np.ndarray = (norms - 2 * x @ flat.T).min(1) + (x**2).sum(1)
        return -nearest

    parts = [some(images[i : i + _AT_ONCE]) for i in range(0, len(images), _AT_ONCE)]
    return np.concatenate(parts)
