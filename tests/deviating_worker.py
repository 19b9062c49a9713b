"""A worker of a server that adds to words of one message, in the second step."""

import numpy as np

from lpgan_jax.cluster import worker
from lpgan_jax.cluster.transcript import Witness

_swap = Witness.swap
_messages = 0


def _deviating(self, number, sent, received):
    global _messages
    _messages += number == 0
    if _messages == 3 and number == 2:  # after the sample and a step
        words = np.array(sent[0])
        words[:16] ^= 0x5A
        sent = [memoryview(words), *sent[1:]]
    _swap(self, number, sent, received)


if __name__ == "__main__":
    Witness.swap = _deviating
    worker.main()
