"""Programs for two servers: a user's plain JAX functions, and what becomes of them on shares."""

from lpgan_jax.programs.program import Answer, Program
from lpgan_jax.programs.secured import SecureProgram, secured
from lpgan_jax.programs.training import Draw, Row, Sample, Training, initial_state

__all__ = [
    "Answer",
    "Draw",
    "Program",
    "Row",
    "Sample",
    "SecureProgram",
    "Training",
    "initial_state",
    "secured",
]
