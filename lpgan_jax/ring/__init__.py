"""Exact linear algebra modulo 2^64: matrix products and convolutions of unsigned words."""

from lpgan_jax.ring.convolution import Convolution
from lpgan_jax.ring.matmul import matmul

__all__ = ["Convolution", "matmul"]
