"""Secure layers: forward and backward, on one server's shares."""
