"""Networks built from the secure layers, and their plaintext twins."""
