"""Fingerprints: equal in every process for equal functions, and differences are named."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lpgan_jax as lp
from lpgan_jax.transform.fingerprint import digests, first_difference

X = jax.ShapeDtypeStruct((3, 4), np.float32)


def mine(x, scale=2.0):
    def body(carry, row):
        return jnp.tanh(carry * scale + row), carry

    return jax.lax.scan(body, jnp.zeros(4), x)[1] @ jnp.ones((4, 2))


def traced(function, **options):
    return lp.secure(function, **options).program(X)


def test_equal_functions_have_equal_fingerprints():
    assert first_difference(traced(mine), digests(traced(lambda x: mine(x)))) is None


def test_it_is_the_same_in_a_process_with_other_hashes():
    code = (
        "import sys; sys.path[:0] = ['tests', 'tests/transform']\n"
        "from test_fingerprint import *; print(digests(traced(mine)))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "77"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == digests(traced(mine))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda x: mine(x) + 1, r"of 9 \(7 there\)"),
        (lambda x: mine(x, 3.0), "scan"),  # a number in the body of a loop
        (lambda x: mine(x[::-1]), "slice|rev|scan"),
        (lambda x: mine(jnp.sin(x)), "sin|scan"),
    ],
    ids=["one more", "a constant", "reversed", "another function"],
)
def test_a_difference_is_named(other, named):
    found = first_difference(traced(other), digests(traced(mine)))
    assert found is not None
    assert re.search(named, found)


def test_scales_are_part_of_it():
    example = (np.full((3, 4), 0.01, np.float32),)
    found = first_difference(traced(mine, calibrate=example), digests(traced(mine)))
    assert found is not None
