"""What two servers compute on shares: a step of training, and answers of what was learnt."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from lpgan_jax.privacy.mechanism import Noise


def _all(state: Any) -> Any:
    return state


def read_npy(path: str) -> Any:
    """An array of a .npy file, or those of a .npz file, by name.

    Raises:
        ValueError: it is neither.
    """
    with open(path, "rb") as file:
        loaded = np.load(file, allow_pickle=False)
        return dict(loaded) if isinstance(loaded, np.lib.npyio.NpzFile) else loaded


@dataclass(frozen=True, eq=False)
class Answer:
    """A function of what was learnt and of a question, which whoever asks shares and nobody sees.

    Attributes:
        function: (part, question) -> answer, plain JAX; a row of the answer is one of the question.
        question: shapes and dtypes (a pytree of `jax.ShapeDtypeStruct`s); the first axis is as many
            rows as two servers answer at once.
        part: what it takes of a state; it must only choose among the leaves.
        read: the question in a file that a person gives.
        show: an answer as text for a person.
    """

    function: Callable[[Any, Any], Any]
    question: Any
    part: Callable[[Any], Any] = _all
    read: Callable[[str], Any] = read_npy
    show: Callable[[Any], str] = str


@dataclass(frozen=True, eq=False)
class Program:
    """What is computed on shares. Every role has the same one.

    Compared by identity: what is compiled for one is kept with it.

    Attributes:
        init: DS's: a random generator to the initial state, a pytree of arrays.
        step: (state, batch) -> (state after it, what SP is told of it, or None); plain JAX. With
            noise, (state, batch, noise).
        batch: shapes and dtypes of a batch, a pytree of `jax.ShapeDtypeStruct`s.
        learnt: what SP may get of the last state; it must only choose among the leaves.
        answers: what may be asked, by name.
        frac_bits: fraction bits of what is not measured.
        noise: of the step's private sums, if it has any. Nothing else of a batch may go into the
            state, or be told: that is looked at.
        unprotected: leaves of a batch, by name, that tell of no example, such as random numbers.
    """

    init: Callable[[np.random.Generator], Any]
    step: Callable[..., tuple[Any, Any]]
    batch: Any
    learnt: Callable[[Any], Any] = _all
    answers: Mapping[str, Answer] = field(default_factory=dict)
    frac_bits: int = 18
    noise: Noise | None = None
    unprotected: Collection[str] = ()

    @property
    def inputs(self) -> Any:
        """Shapes of all that a step takes: of a batch, or of (a batch, its noise)."""
        if self.noise is None:
            return self.batch
        return self.batch, jax.ShapeDtypeStruct(self.noise.shape, np.float32)

    def run(self, state: Any, batch: Any) -> tuple[Any, Any]:
        """The step, of all that it takes: a batch, or (a batch, its noise)."""
        return self.step(state, batch) if self.noise is None else self.step(state, *batch)

    def answer_named(self, name: str | None) -> tuple[str, Answer]:
        """(name, answer) of a name; of None, the only one.

        Raises:
            ValueError: there is none of this name, or not one alone.
        """
        if name is None and len(self.answers) == 1:
            (name,) = self.answers
        if name not in self.answers:
            known = ", ".join(map(repr, self.answers)) or "none"
            raise ValueError(f"answer: {name!r} given, expected one of the program's: {known}")
        assert name is not None
        return name, self.answers[name]

    def __post_init__(self) -> None:
        for name in self.answers:
            if not 0 < len(name) <= 64:
                raise ValueError(f"answers: {name!r}: expected a name of 1 to 64 characters")
        for name, shapes in {
            "batch": self.batch,
            **{f"answers[{name!r}].question": a.question for name, a in self.answers.items()},
        }.items():
            for leaf in jax.tree.leaves(shapes):
                if not isinstance(leaf, jax.ShapeDtypeStruct):
                    raise TypeError(
                        f"{name}: expected jax.ShapeDtypeStructs, got {type(leaf).__name__}"
                    )
