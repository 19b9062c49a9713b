"""Measures of quality against SciPy, loops and distributions whose distance is known."""

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lpgan_jax.study import features as classifiers
from lpgan_jax.study import quality
from lpgan_jax.study.features import classifier, classifier_judge
from lpgan_jax.study.quality import Judge, class_coverage, frechet_distance, precision_recall
from lpgan_jax.training.config import DataConfig


def rows(seed, count, width, scale=1.0, shift=0.0):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(width, width))
    return scale * rng.normal(size=(count, width)) @ mixing + shift


# Fréchet distance


@pytest.mark.parametrize(("count", "width"), [(500, 1), (500, 8), (40, 64)])
def test_frechet_distance_is_the_formula(count, width):
    """With SciPy's root of the product itself; at 40 rows the covariances are singular."""
    a, b = rows(0, count, width), rows(1, count + 7, width, 1.5, 0.3)
    first, second = (np.atleast_2d(np.cov(x.T)) for x in (a, b))
    root = np.real(scipy.linalg.sqrtm(first @ second))
    mean = a.mean(0) - b.mean(0)
    expected = mean @ mean + np.trace(first + second - 2 * root)
    # A singular product's root is known to about the root of the precision.
    tolerance = 1e-9 if count > width else 1e-4
    assert frechet_distance(a, b) == pytest.approx(expected, rel=tolerance)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-6)


def test_frechet_distance_of_known_distributions():
    x = rows(2, 300, 5)
    assert abs(frechet_distance(x, x)) < 1e-9 * np.trace(np.cov(x.T))
    assert frechet_distance(x, x + 2.0) == pytest.approx(5 * 4.0)  # a shift alone
    doubled = x.mean(0) + 2 * (x - x.mean(0))  # C2 = 4 C1: tr(C1 + 4 C1 - 2 * 2 C1)
    assert frechet_distance(x, doubled) == pytest.approx(np.trace(np.cov(x.T)))


# Precision and recall


def naive_precision(real, generated, k):
    radii = [sorted(np.linalg.norm(real - r, axis=1))[k] for r in real]
    inside = 0
    for point in generated:
        inside += any(
            np.linalg.norm(point - r) <= radius for r, radius in zip(real, radii, strict=True)
        )
    return inside / len(generated)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.tuples(st.integers(5, 40), st.integers(5, 40)),
    width=st.integers(1, 6),
    k=st.integers(1, 4),
)
def test_precision_and_recall_are_the_loops(seed, sizes, width, k):
    real, generated = rows(seed, sizes[0], width), rows(seed + 1, sizes[1], width, 1.3)
    expected = naive_precision(real, generated, k), naive_precision(generated, real, k)
    assert precision_recall(real, generated, k) == pytest.approx(expected)


def test_precision_and_recall_tell_apart_what_they_should(monkeypatch):
    rng = np.random.default_rng(0)
    real = rng.normal(size=(300, 3))
    few = real[:20] + 1e-3 * rng.normal(size=(20, 3))
    precision, recall = precision_recall(real, few)
    assert precision == 1.0
    assert recall < 0.9
    assert precision_recall(real, real + 100.0) == (0.0, 0.0)
    assert precision_recall(real, real) == (1.0, 1.0)
    whole = precision_recall(real, rows(3, 200, 3))
    monkeypatch.setattr(quality, "_MOST_DISTANCES", 1000)  # in parts
    assert precision_recall(real, rows(3, 200, 3)) == whole


# Coverage


def test_class_coverage():
    real = np.repeat(np.arange(4), 25)
    assert class_coverage(real, real, 4) == 1.0
    assert class_coverage(real, np.zeros(10, int), 4) == 0.25
    # A tenth of the real share, a quarter, is 2.5 %.
    generated = np.repeat([0, 1, 2, 3], [900, 70, 26, 24])
    assert class_coverage(real, generated, 4) == 0.75
    # A class without real images does not count.
    assert class_coverage(np.array([0, 0, 2]), np.array([2, 2]), 3) == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: frechet_distance(x[0], x), r"real: shape \[3\] given, expected \[N, d\]"),
        (lambda x: frechet_distance(x, x[:1]), r"generated: shape \[1, 3\] given"),
        (lambda x: frechet_distance(x, x[:, :2]), "generated: 2 features an image, expected 3"),
        (lambda x: frechet_distance(x * np.nan, x), "real: expected finite features"),
        (lambda x: precision_recall(x, x, 9), "neighbours: 9 given, expected 1 to 8"),
        (lambda x: precision_recall(x, x, 0), "neighbours: 0 given"),
    ],
)
def test_bad_features(call, message):
    with pytest.raises(ValueError, match=message):
        call(rows(0, 9, 3))


def test_a_judge_needs_classes_for_coverage():
    def flat(images):
        return images.reshape(len(images), -1)

    real, labels = rows(0, 30, 4).reshape(30, 2, 2, 1), np.arange(30) % 3
    plain = Judge(real, flat)(real)
    assert (plain.frechet, plain.coverage) == (pytest.approx(0, abs=1e-9), None)
    judged = Judge(real, flat, labels, lambda images: np.full(len(images), 3), 4)(real)
    assert judged.coverage == 0.0  # a class that the real ones do not have


# The classifier


@pytest.fixture
def squares(monkeypatch, tmp_path):
    """Images of three classes, told apart by where a square is; and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(classifiers, "_LEAST_STEPS", 60)
    monkeypatch.setattr(classifiers, "_EPOCHS", 1)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    images = rng.normal(-0.8, 0.1, (300, 8, 8, 1)).astype(np.float32)
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 3, 2 * label : 2 * label + 3] += 1.5
    return images, labels


def test_a_classifier_learns_and_is_kept(squares, tmp_path):
    images, labels = squares
    lines = []
    first = classifier(images, labels, lines.append)
    assert first.accuracy > 0.9
    assert "30 images held out" in lines[-1]
    assert f"{100 * first.accuracy:.1f} %" in lines[-1]
    assert first.features(images[:7]).shape == (7, classifiers.FEATURES)
    assert np.mean(first.classes(images) == labels) > 0.9
    (file,) = (tmp_path / "lpgan_jax" / "classifiers").iterdir()
    again = classifier(images, labels, lines.append)
    assert len(lines) == 2  # nothing was trained
    assert again.accuracy == first.accuracy
    np.testing.assert_array_equal(again.features(images), first.features(images))
    # Other data make another classifier, also where a class is only among the images held out; a
    # damaged file is made again.
    assert classifier(images, (labels + 1) % 3, lines.append).accuracy > 0.9
    assert len(lines) == 4
    rare = labels.copy()
    rare[10] = 3
    assert classifier(images, rare, lines.append).num_classes == 4
    del lines[4:]
    file.write_bytes(file.read_bytes()[:-9])
    assert classifier(images, labels, lines.append).accuracy == first.accuracy
    assert len(lines) == 6


def test_bad_labels(squares, tmp_path):
    images, labels = squares
    with pytest.raises(ValueError, match="labels: 299 given for 300 images"):
        classifier(images, labels[:-1])
    with pytest.raises(ValueError, match="labels: -1 given, expected classes from 0"):
        classifier(images, labels - 1)
    Image.new("L", (8, 8)).save(tmp_path / "one.png")
    folder = DataConfig(dataset="folder", path=str(tmp_path), image_size=8, channels=1)
    with pytest.raises(ValueError, match="a folder has no classes"):
        classifier_judge(folder, images, 100)
