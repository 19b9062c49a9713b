"""How values are kept under sharing: what examples tell, and what is said about it."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from secured import FAST, LSB

import lpgan_jax as lp

X = np.random.default_rng(3).normal(size=(4, 6))


def on_shares(step, *args):
    shared = step.share(lp.key(1), *args)
    return lp.reveal(FAST(step)(lp.key(2), *shared))


def small_and_large(x):
    """Factors of 2^-17 and 2^7 or so: with 18 bits for all of them, little is left of the first."""
    small = x * x[::-1] * 1e-5
    large = 30 * x
    return small * large, (small**2).sum(), large.sum()


def test_small_values_get_bits_and_large_ones_room():
    want = small_and_large(X)
    step = lp.secure(small_and_large, calibrate=(X,))
    flat = on_shares(lp.secure(small_and_large), X)
    got = on_shares(step, X)
    # Relative to the largest: 22 bits below it, a few roundings.
    errors = [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, want, strict=True)]
    assert max(errors) < 2.0**-19
    assert float(np.abs(flat[0] - want[0]).max() / np.abs(want[0]).max()) > 2.0**-10
    assert flat[1] == 0 or abs(flat[1] - want[1]) > 0.1 * abs(want[1])


def test_values_in_a_loop_have_formats_too():
    def function(x):
        return jax.lax.scan(lambda c, row: (c * row * 1e-3, (c * row).sum()), x[0], x[1:])

    step = lp.secure(function, calibrate=(X,))
    last, sums = on_shares(step, X)
    want, want_sums = function(X)
    # The carry has one format for all iterations: that of the largest.
    assert np.abs(last - want).max() < 2.0**-20
    assert np.abs(sums - want_sums).max() / np.abs(want_sums).max() < 2.0**-18


def test_a_plan_is_saved_and_serves_other_shapes(tmp_path):
    step = lp.secure(small_and_large, calibrate=(X,))
    step.plan.save(tmp_path / "plan.json")
    plan = lp.Plan.load(tmp_path / "plan.json")
    assert plan == step.plan
    again = lp.secure(small_and_large, plan=plan)
    assert [r.scale for r in again.explain(X).rows] == [r.scale for r in step.explain(X).rows]
    assert again.program(X[:2]).scales == step.program(X).scales


def test_a_plan_of_another_program_is_refused(tmp_path):
    plan = lp.secure(small_and_large, calibrate=(X,)).plan
    other = lp.secure(lambda x: jnp.exp(x), plan=plan)
    with pytest.raises(ValueError, match=r"plan: made for another program: it has .* where"):
        other.program(X)
    with pytest.raises(ValueError, match="plan: made for 18 fraction bits, not 20"):
        lp.secure(small_and_large, plan=plan, frac_bits=20)
    with pytest.raises(ValueError, match="expected one of them"):
        lp.secure(small_and_large, plan=plan, calibrate=(X,))
    for text in ("[]", "{", json.dumps({"frac_bits": 18, "values": [["mul", "many", 2]]})):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(ValueError, match=r"plan\.json: expected a plan"):
            lp.Plan.load(tmp_path / "plan.json")


def test_what_is_not_finite_is_not_a_number_to_plan_with():
    step = lp.secure(lambda x: jnp.log(x - 100.0), calibrate=(X,))
    with pytest.raises(NotImplementedError, match="log: nan on the examples"):
        step.plan  # noqa: B018
    masked = lp.secure(lambda x: jnp.where(x > 0, x, -1e9) * 1.5, calibrate=(X,))
    with pytest.raises(NotImplementedError, match=r"select_n: 1e\+09 on the examples leaves no"):
        masked.plan  # noqa: B018


def test_running_averages_are_kept_at_more_than_double_fraction():
    """A statistic that moves by 1 % of 1e-4 in a call: far below an LSB."""

    def function(average, x):
        return 0.99 * average + 0.01 * x.mean(), x * 2.0

    step = lp.secure(function, carry={0: 0})
    assert step.program(0.0, X).scales == (42, 18)
    assert step.program(0.0, X).output_scales == (42, 18)
    measured = lp.secure(function, carry={0: 0}, calibrate=(0.0, X))
    # What it becomes decides, and not the 0 that it starts with.
    steady = abs(X.mean())
    form = measured.program(0.0, X).scales[0]
    assert form == 22 - math.ceil(math.log2(steady)) + 18 + 6


def test_the_table_adds_up_to_the_cost():
    def function(w, x):
        with jax.named_scope("Layer"):
            y = jnp.tanh(x @ w)
        return (y**2).mean(), jnp.maximum(y, 0.0)

    args = X.T @ X[:, :2] / 4, X
    step = lp.secure(function)
    table, cost = step.explain(*args), lp.cost(step, *args)
    assert sum(row.bytes for row in table.rows) == cost.online_bytes
    assert sum(row.dealer_bytes for row in table.rows) == cost.dealer_bytes_s2
    assert table.too_large == []
    assert any(row.primitive == "tanh" and "Layer" in row.place for row in table.rows)
    assert "All else is secret" in str(table)
    assert json.loads(json.dumps(table.to_json()))["rows"][0]["scale"] in (0, 18)
    shapes = [jax.ShapeDtypeStruct(v.shape, np.float32) for v in args]
    unknown = step.explain(*shapes)
    assert [r.bytes for r in unknown.rows] == [r.bytes for r in table.rows]
    assert all(row.bits_left is None for row in unknown.rows)


def test_what_grows_too_large_is_named():
    """ReLU of 2^9: what is compared may be up to 2^8."""
    step = lp.secure(lambda x: jnp.maximum(x * 200.0, 0.0).sum())
    (row,) = step.explain(X).too_large
    assert row.primitive == "max"
    assert row.bits_left < 2
    assert "Too large: max" in str(step.explain(X))
    assert (
        lp.secure(lambda x: jnp.maximum(x * 200.0, 0.0).sum(), calibrate=(X,)).explain(X).too_large
        == []
    )


def test_what_is_handed_on_stays_secret():
    """A count of examples that starts anew is public, but the next call's argument is secret."""

    def function(state, x):
        return {"total": x.sum(), "best": jnp.zeros(2)}, state["total"] + state["best"].sum()

    state = {"total": 1.0, "best": np.array([2.0, 3.0])}
    step = lp.secure(function, carry={0: 0})
    after, value = step(lp.key(2), *step.share(lp.key(1), state, X))
    assert abs(lp.reveal(value) - 6) < 2 * LSB
    _, value = step(lp.key(3), after, step.share(lp.key(1), state, X)[1])
    assert abs(lp.reveal(value) - X.sum()) < 4 * LSB
    public = lp.secure(function, carry={0: 0}, public=("state",))
    with pytest.raises(ValueError, match=r"carry: state\['total'\] is public, but"):
        public.program(state, X)
    with pytest.raises(ValueError, match=r"carry: x has shape \(4, 6\), what follows it \(\)"):
        lp.secure(lambda x: x.sum(), carry={0: 0}).program(X)
