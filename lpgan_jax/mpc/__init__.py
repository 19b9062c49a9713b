"""The protocols as one server runs them: functions of a `Seat` and that server's `Secret`s.

Each is written once; `lpgan_jax.protocols` wraps them over paired arrays.
"""
