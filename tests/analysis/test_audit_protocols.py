"""The audit of every public protocol: its program is caught on its way to `simulate`."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

import lpgan_jax as lp
from lpgan_jax import protocols as P
from lpgan_jax.analysis.audit import audit, audit_program
from lpgan_jax.transform import function as transformed

FXP = lp.FixedPoint(18)
LOCAL = {"sec_add", "sec_xor"}


def values(*shape):
    return jax.ShapeDtypeStruct((2, *shape), jnp.uint64)


def bits(*shape):
    return jax.ShapeDtypeStruct((2, *shape), jnp.uint8)


# Shapes that no other test uses, so that no trace is cached.
V, B = values(67), bits(67)
CALLS = {
    "bit_decompose": (P.bit_decompose, V),
    "range_conversion": (lambda k, u: P.range_conversion(k, u, FXP), V),
    "sec_and": (P.sec_and, B, B),
    "sec_batch_norm": (lambda k, *a: P.sec_batch_norm(k, *a, FXP), values(13, 3), *[values(3)] * 2),
    "sec_cmp": (P.sec_cmp, V, V),
    "sec_conv": (lambda k, *a: P.sec_conv(k, *a, FXP), values(1, 6, 6, 3), values(4, 4, 3, 2)),
    "sec_deconv": (lambda k, *a: P.sec_deconv(k, *a, FXP), values(1, 3, 3, 3), values(4, 4, 3, 2)),
    "sec_div": (lambda k, *a: P.sec_div(k, *a, FXP), V, V),
    "sec_exp": (lambda k, x: P.sec_exp(k, x, FXP), V),
    "sec_fc": (
        lambda k, *a: P.sec_fc(k, a[0], a[1], FXP, a[2]),
        values(3, 7),
        values(7, 2),
        values(2),
    ),
    "sec_inv": (lambda k, u: P.sec_inv(k, u, FXP), V),
    "sec_inv_sqrt": (lambda k, u: P.sec_inv_sqrt(k, u, FXP), V),
    "sec_leaky_relu": (lambda k, x: P.sec_leaky_relu(k, x, FXP), V),
    "sec_log": (lambda k, u: P.sec_log(k, u, FXP), V),
    "sec_matmul": (lambda k, *a: P.sec_matmul(k, *a, FXP), values(3, 11), values(11, 2)),
    "sec_msb": (P.sec_msb, bits(5, 67)),
    "sec_mul": (lambda k, *a: P.sec_mul(k, *a, FXP), V, V),
    "sec_or": (P.sec_or, B, B),
    "sec_relu": (P.sec_relu, V),
    "sec_sigmoid": (lambda k, x: P.sec_sigmoid(k, x, FXP), V),
    "sec_softplus": (lambda k, x: P.sec_softplus(k, x, FXP), V),
    "sec_sqrt": (lambda k, u: P.sec_sqrt(k, u, FXP), V),
    "sec_square": (lambda k, x: P.sec_square(k, x, FXP), V),
    "sec_tanh": (lambda k, x: P.sec_tanh(k, x, FXP), V),
    "truncate": (lambda k, x: P.truncate(k, x, 18), V),
}


def test_every_protocol_is_here():
    assert CALLS.keys() | LOCAL == set(P.__all__)


@pytest.mark.parametrize("name", [*CALLS, "sec_cmp (patent)"])
def test_the_audit_passes(name, monkeypatch):
    """As a program of DS and two servers, and as a function that is simulated."""
    programs, simulate = [], P.simulate

    def recorded(function, key, secrets, public=None):
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), secrets)
        programs.append((function, shapes, public))
        return simulate(function, key, secrets, public)

    for module in (P, transformed):  # where protocols are simulated
        monkeypatch.setattr(module, "simulate", recorded)
    function, *shapes = CALLS.get(name) or (partial(P.sec_cmp, variant="patent"), V, V)
    report = audit(function, *shapes)
    assert report.ok, report.problems
    assert programs
    of_programs = [audit_program(*program) for program in programs]
    for deployed in of_programs:
        assert deployed.ok, deployed.problems
    sent = [(o.name, o.shape) for deployed in of_programs for o in deployed.openings]
    assert sent == [(o.name, o.shape) for o in report.openings]
    assert sent


@pytest.mark.parametrize("name", sorted(LOCAL))
def test_local_protocols_send_nothing(name):
    report = audit(lambda key, x, y: getattr(P, name)(x, y), *[B if name == "sec_xor" else V] * 2)
    assert report.ok, report.problems
    assert not report.openings
