"""How many noised steps were begun: written down before each, so that none is forgotten."""

from __future__ import annotations

import json
import os
from pathlib import Path

from lpgan_jax.common.files import atomic_write


class Ledger:
    """The steps that a training has spent privacy on.

    A step that a crash or a stop made void was seen in part, and one that is done again is another
    one: all count.

    Attributes:
        steps: begun so far.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """`path`: the file; there are no steps if it is not there.

        Raises:
            ValueError: it is damaged.
        """
        self._path, self.steps = Path(path), 0
        if self._path.exists():
            try:
                self.steps = int(json.loads(self._path.read_bytes())["steps"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: expected the number of steps begun: {error}") from None

    def require(self, done: int) -> None:
        """Check that at least the steps that are done were counted.

        Raises:
            ValueError: they were not: the file is lost, or another one.
        """
        if self.steps < done:
            raise ValueError(
                f"{self._path}: {self.steps} steps were counted, and {done} are done: what they "
                "spent of privacy is not known any more"
            )

    def begin(self) -> int:
        """Count one more, before it begins: how many that are.

        Raises:
            OSError: it cannot be written, and then the step must not begin.
        """
        self.steps += 1
        atomic_write(self._path, f'{{"steps": {self.steps}}}\n'.encode())
        return self.steps
