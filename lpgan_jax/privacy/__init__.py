"""Differential privacy: what a training spends of it, and the noise that it takes."""
