"""Programs for two servers: a user's plain JAX functions, and what becomes of them on shares."""

from lpgan_jax.programs.program import Answer, Program
from lpgan_jax.programs.secured import SecureProgram

__all__ = ["Answer", "Program", "SecureProgram"]
