"""How good are generated images? Measures on features of real and generated ones.

Features are what some classifier makes of an image (`classifier`, `inception`), one row an image.
All measures are deterministic, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import numpy as np

_MOST_DISTANCES = 2**24  # computed at once: 128 MB


def frechet_distance(real: np.ndarray, generated: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)): between normal distributions of the features.

    Heusel et al. (2017) call it FID on features of Inception. It falls with the number of images;
    compare only distances of equal numbers.

    Args:
        real: [N, d], N at least 2.
        generated: [M, d], M at least 2.

    Raises:
        ValueError: the shapes are not as above, or a value is not finite.
    """
    real, generated = _checked("real", real), _checked("generated", generated)
    _same_width(real, generated)
    difference = real.mean(0) - generated.mean(0)
    first, second = np.cov(real, rowvar=False), np.cov(generated, rowvar=False)
    first, second = np.atleast_2d(first), np.atleast_2d(second)
    # tr (C1 C2)^(1/2) = tr (R C2 R)^(1/2) with R = C1^(1/2): symmetric, so that no root is complex.
    root = _symmetric_root(first)
    eigenvalues = np.linalg.eigvalsh(root @ second @ root)
    cross = np.sqrt(np.maximum(eigenvalues, 0)).sum()
    return float(difference @ difference + np.trace(first) + np.trace(second) - 2 * cross)


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def precision_recall(
    real: np.ndarray, generated: np.ndarray, neighbours: int = 3
) -> tuple[float, float]:
    """Precision and recall of manifolds (Kynkaanniemi et al., 2019).

    A set's manifold is the union of balls around its points, each reaching to the point's k-th
    neighbour in the set. Precision is the share of generated points in the real manifold, recall
    that of real points in the generated one.

    Args:
        real: [N, d], more rows than neighbours.
        generated: [M, d], likewise.
        neighbours: k.

    Raises:
        ValueError: the shapes are not as above, or a value is not finite.
    """
    real, generated = _checked("real", real), _checked("generated", generated)
    _same_width(real, generated)
    return _inside(real, generated, neighbours), _inside(generated, real, neighbours)


def _inside(reference: np.ndarray, points: np.ndarray, neighbours: int) -> float:
    """The share of the points in the manifold of the reference."""
    if not 1 <= neighbours < len(reference):
        raise ValueError(
            f"neighbours: {neighbours} given, expected 1 to {len(reference) - 1}, "
            "one less than the images"
        )
    # A point is its own nearest neighbour, at distance 0.
    radii = np.concatenate(
        [
            np.partition(d, neighbours, axis=1)[:, neighbours]
            for d in _distances(reference, reference)
        ]
    )
    return float(
        np.mean(np.concatenate([(d <= radii).any(1) for d in _distances(points, reference)]))
    )


def _distances(points: np.ndarray, reference: np.ndarray) -> Iterator[np.ndarray]:
    """Squared distances [some points, all of the reference], in parts that fit into memory."""
    rows = max(1, _MOST_DISTANCES // len(reference))
    squares = (reference**2).sum(1)
    for start in range(0, len(points), rows):
        part = points[start : start + rows]
        d = (part**2).sum(1)[:, None] + squares - 2 * part @ reference.T
        yield np.maximum(d, 0)


def class_coverage(
    real: np.ndarray, generated: np.ndarray, num_classes: int, least: float = 0.1
) -> float:
    """The share of classes that are not missing among generated images.

    A class is missing if its share of the generated images is below `least` times its share of the
    real ones.

    Args:
        real: int [N], classes of the real images.
        generated: int [M], classes that a classifier sees in the generated ones.
        num_classes: classes count from 0; those without real images do not count.
        least: 0 to 1.
    """
    shares = [
        np.bincount(labels, minlength=num_classes) / len(labels) for labels in (real, generated)
    ]
    there = shares[0] > 0
    return float(np.mean(shares[1][there] >= least * shares[0][there]))


@dataclass(frozen=True)
class Quality:
    """The measures of a set of generated images.

    Attributes:
        frechet: Fréchet distance to the real images; 0 is best.
        precision: share of generated images that look like real ones.
        recall: share of real images that generated ones look like.
        coverage: share of classes that are there; None without a classifier of classes.
        images: how many generated ones were measured.
        accuracy: on real images that were not trained on, of a classifier that was trained on
            generated ones of each class; None without classes or such images.
    """

    frechet: float
    precision: float
    recall: float
    coverage: float | None
    images: int
    accuracy: float | None = None


MEASURES = tuple(field.name for field in fields(Quality) if field.name != "images")
"""By name, for tables."""


def _checked(name: str, features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"{name}: shape {list(features.shape)} given, expected [N, d], N >= 2")
    if not np.isfinite(features).all():
        raise ValueError(f"{name}: expected finite features, got NaN or infinity")
    return features


def _same_width(real: np.ndarray, generated: np.ndarray) -> None:
    if real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"generated: {generated.shape[1]} features an image, expected {real.shape[1]} as of "
            "the real ones"
        )


def chosen(total: int, num_images: int) -> np.ndarray:
    """Which of `total` real images are compared with: always the same, of all classes alike.

    The first ones of a data set may all be of one class.
    """
    return np.random.default_rng(0).permutation(total)[:num_images]


class Judge:
    """Measures generated images against real ones."""

    def __init__(
        self,
        real: np.ndarray,
        features: Callable[[np.ndarray], np.ndarray],
        labels: np.ndarray | None = None,
        classes: Callable[[np.ndarray], np.ndarray] | None = None,
        num_classes: int = 0,
    ) -> None:
        """Compute the real images' features once.

        Args:
            real: [N, H, W, C].
            features: images to [N, d].
            labels: int[N], classes of the real images.
            classes: images to int[N], below num_classes: what a classifier sees.
            num_classes: coverage needs these three.
        """
        self._features, self._classes, self._labels = features, classes, labels
        self._num_classes = num_classes
        self._real = features(real)

    def __call__(self, generated: np.ndarray) -> Quality:
        """The quality of images [M, H, W, C]."""
        features = self._features(generated)
        coverage = None
        if self._classes is not None and self._labels is not None:
            seen = self._classes(generated)
            coverage = class_coverage(self._labels, seen, self._num_classes)
        precision, recall = precision_recall(self._real, features)
        distance = frechet_distance(self._real, features)
        return Quality(distance, precision, recall, coverage, len(generated))
