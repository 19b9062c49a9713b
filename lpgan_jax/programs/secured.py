"""A program's step and answers under sharing, as programs of a party."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lpgan_jax.mpc import guard
from lpgan_jax.mpc.compiling import options_to_run_once
from lpgan_jax.mpc.fixed_point import check_range
from lpgan_jax.mpc.party import Party, simulate
from lpgan_jax.mpc.prng import key as make_key
from lpgan_jax.mpc.seat import Seat
from lpgan_jax.mpc.secret import Secret, is_secret
from lpgan_jax.mpc.share_trees import tree_of_shapes
from lpgan_jax.privacy.mechanism import Noise
from lpgan_jax.programs.program import Program
from lpgan_jax.transform.function import Program as Traced
from lpgan_jax.transform.function import Secure, secure
from lpgan_jax.transform.releases import Releases, Unhidden, releases


class Choice:
    """Leaves of a state, chosen by a function that is called once, and on no value.

    On shares it could compute: between two servers, an operation on both halves is a message.

    Attributes:
        name: what is chosen.
    """

    def __init__(self, name: str, function: Callable[[Any], Any], state: Any) -> None:
        """`state`: the tree that is chosen from.

        Raises:
            ValueError: the function does more than choose.
        """
        self.name = name
        leaves, structure = jax.tree.flatten(state)
        marks = [_Mark(place) for place in range(len(leaves))]
        try:
            chosen = function(jax.tree.unflatten(structure, marks))
        except Exception as error:
            raise ValueError(f"{name}: expected to choose leaves alone: {error}") from error
        found, self._structure = jax.tree.flatten(chosen)
        if not all(isinstance(mark, _Mark) for mark in found):
            kinds = sorted({type(m).__name__ for m in found if not isinstance(m, _Mark)})
            raise ValueError(f"{name}: expected leaves of the state alone, got {', '.join(kinds)}")
        self._places = [mark.place for mark in found]

    def __call__(self, state: Any) -> Any:
        """The same leaves of a state of this structure, each a `Secret` or an array."""
        leaves = jax.tree.leaves(state, is_leaf=is_secret)
        return jax.tree.unflatten(self._structure, [leaves[place] for place in self._places])

    def __str__(self) -> str:
        return f"{self._places} {self._structure}"


class _Mark:
    """In the place of a leaf."""

    def __init__(self, place: int) -> None:
        self.place = place


class SecureProgram:
    """What the servers run: `guarded_step`, `guard`, `answer`, (party, secrets, public) -> secrets.

    A secret state is a state in which public leaves (optimizers' step counters) are None: they
    follow from the step's number.

    Attributes:
        program: the same in the clear.
        frac_bits: fraction bits of what is not measured.
        batch: shapes of all that a step takes, its noise included.
        shapes: of a secret state.
        scales: the fraction bits at which each leaf of it is shared.
        batch_scales: the same of a batch.
    """

    def __init__(self, program: Program) -> None:
        """Traces the step."""
        self.program, self.batch, self.frac_bits = program, program.inputs, program.frac_bits
        self._example = program.init(np.random.default_rng(0))
        step = secure(program.run, carry={0: 0}, frac_bits=program.frac_bits)
        traced = step.program(self._example, self.batch)
        found = _released(program, traced)
        self._step = dataclasses.replace(traced, unwatched=found.before)
        self._weights = {str(node.place) for node in found.weights}
        values, structure = jax.tree.flatten(self._example)
        known, of_batch = self._step.leaves[: len(values)], self._step.leaves[len(values) :]
        scales = iter(self._step.scales)
        self._public = [v for v, leaf in zip(values, known, strict=True) if leaf.public]
        self.scales = jax.tree.unflatten(
            structure, [None if leaf.public else next(scales) for leaf in known]
        )
        if any(leaf.public for leaf in of_batch):
            raise ValueError("batch: expected secrets alone")
        told = self._step.graph.outputs[len(values) :]
        if not all(node.secret for node in told):
            raise ValueError("step: what SP is told is public in part, expected secrets alone")
        self.batch_scales = jax.tree.unflatten(jax.tree.structure(self.batch), list(scales))
        self._counted = 0, self._public
        self._watched: list[guard.Watched] | None = None
        self._tracing = threading.Lock()
        traced = self._step
        self._advance = jax.jit(
            lambda leaves: (traced.public(leaves), traced.next_public(leaves)),
            compiler_options=options_to_run_once(),
        )
        self.shapes = jax.eval_shape(lambda v: v, self.secret(self._example))
        self._learnt = Choice("learnt", program.learnt, self.shapes)
        self._parts = {
            name: Choice(f"answers[{name!r}].part", answer.part, self.shapes)
            for name, answer in program.answers.items()
        }

    def secret(self, state: Any) -> Any:
        """What is secret in a state."""
        return jax.tree.map(
            lambda scale, value: None if scale is None else value,
            self.scales,
            state,
            is_leaf=lambda x: x is None,
        )

    def init(self, rng: np.random.Generator) -> Any:
        """DS's initial state, what is secret in it."""
        return self.secret(self.program.init(rng))

    def learnt(self, state: Any) -> Any:
        """What SP gets of a secret state, of any kind of leaves."""
        return self._learnt(state)

    @property
    def choices(self) -> dict[str, str]:
        """Which leaves SP gets, and which an answer takes, as text."""
        return {choice.name: str(choice) for choice in (self._learnt, *self._parts.values())}

    def schedule(self, step: int) -> list[Any]:
        """What is public in a step, counted from 0: its number, and what the program computes."""
        done, leaves = self._counted if self._counted[0] <= step else (0, self._public)
        for _ in range(done, step):
            leaves = self._advance(leaves)[1]
        self._counted = step, leaves
        public: list[jax.Array] = self._advance(leaves)[0]
        return [np.uint64(step), *public]

    def train_step(self, party: Seat, secrets: Any, public: list[jax.Array]) -> tuple[Any, Any]:
        """A step. Nothing is opened but masked values.

        Args:
            party: this server's seat.
            secrets: (state, batch).
            public: `schedule` of this step.

        Returns:
            (the state after it, what SP is told of it or None).
        """
        after: tuple[Any, Any] = self._step(party, secrets, public[1:])
        return after

    def guarded_step(self, party: Seat, secrets: Any, public: list[Any]) -> tuple[Any, Any, Secret]:
        """A step, and shares of elements of what it truncates and compares, for `guard`."""
        assert isinstance(party, Party)
        party.samples = guard.Samples(public[0])
        state, told = self.train_step(party, secrets, public)
        self._watched, elements = party.samples.result(party)
        return state, told, elements

    @property
    def watched(self) -> list[guard.Watched]:
        """The tensors that a guarded step looks at, in the order of their elements."""
        with self._tracing:  # SP asks in several threads
            if self._watched is None:
                secrets = (
                    tree_of_shapes(self.shapes, self.scales),
                    tree_of_shapes(self.batch, self.batch_scales),
                )
                step = functools.partial(simulate, self.guarded_step)
                jax.eval_shape(step, make_key(0), secrets, self.schedule(0))
            assert self._watched is not None
            return self._watched

    def out_of_range(self, outside: np.ndarray) -> list[guard.Watched]:
        """The tensors of which the guard said 1."""
        return [of for of, bit in zip(self.watched, outside, strict=True) if bit]

    def guard(self, party: Seat, elements: Secret, public: None) -> tuple[Secret, Secret]:
        """Whether any of a step's elements is out of range: see `mpc.guard.check`."""
        return guard.check(party, self.watched, elements)

    def batch_of(self, inputs: Any) -> Any:
        """An owner's part of all that a step takes (values, shapes or scales): no noise."""
        return inputs if self.program.noise is None else inputs[0]

    @property
    def deals_noise(self) -> bool:
        """Whether a step has noise that DS deals."""
        return self.program.noise is not None and self.program.noise.source == "dealer"

    @property
    def servers_draw(self) -> Noise | None:
        """The noise of which each server draws its own."""
        return None if self.deals_noise else self.program.noise

    def check_batch(self, batch: Any) -> None:
        """Check an owner's batch, before it is shared.

        Raises:
            ValueError: it has other shapes, or a value is out of range; names it.
        """
        shapes, first = self.program.batch, len(jax.tree.leaves(self.shapes))
        _check("batch", shapes, batch, self._step, first)
        leaves = [leaf for leaf in self._step.leaves if not leaf.public][first:]
        for leaf, value in zip(leaves, jax.tree.leaves(batch), strict=False):
            if leaf.name in self._weights and not np.isin(value, (0, 1)).all():
                raise ValueError(f"{leaf.name}: expected 0 or 1: which examples count")

    def check_question(self, name: str, question: Any) -> None:
        """The same of a question of any number of rows, for the answer of a name."""
        self.check_rows(name, question)
        traced = self._answering(name, question)
        known = len(traced.scales) - len(jax.tree.leaves(question))
        _check("question", question, question, traced, known)

    def check_rows(self, name: str, question: Any) -> None:
        """Check the shapes of a question of any number of rows.

        Raises:
            ValueError: they are others than the answer's.
        """
        wanted = self.program.answers[name].question
        expected: Any = jax.tree.structure(wanted)
        if (found := jax.tree.structure(question)) != expected:
            raise ValueError(f"question: expected {expected}, got {found}")
        for like, given in zip(jax.tree.leaves(wanted), jax.tree.leaves(question), strict=True):
            if np.shape(given)[1:] != like.shape[1:] or not np.shape(given):
                rows = ", ".join(map(str, ("rows", *like.shape[1:])))
                raise ValueError(f"question: expected shape ({rows}), got {np.shape(given)}")

    def question_scales(self, name: str, question: Any) -> Any:
        """The fraction bits at which each leaf of a question is shared."""
        scales = self._answering(name, question).scales
        leaves, structure = jax.tree.flatten(question)
        return jax.tree.unflatten(structure, scales[len(scales) - len(leaves) :])

    def answer(self, name: str) -> Callable[[Seat, Any, None], Any]:
        """What the servers run for one of `Program.answers`: (party, (state, question), None).

        It gives the answer at its function's own scales, for whoever asked.
        """

        def function(party: Seat, secrets: Any, public: None) -> Any:
            state, question = secrets
            part = self._parts[name](state)
            return self._answering(name, question)(party, (part, question), [])

        function.__name__ = name  # in compiled modules and profiles
        return function

    @property
    def functions(self) -> dict[str, Traced]:
        """All that may be run, by name; answers to questions of the shapes that they say."""
        answers = self.program.answers
        return {"step": self._step} | {
            f"answers[{name!r}]": self._answering(name, answers[name].question) for name in answers
        }

    def _answering(self, name: str, question: Any) -> Traced:
        of = self.program.answers[name]
        shapes = jax.tree.map(
            lambda like, given: jax.ShapeDtypeStruct(np.shape(given), like.dtype),
            of.question,
            question,
            is_leaf=is_secret,
        )
        traced = self._answers[name].program(of.part(self._example), shapes)
        if traced.frontier:
            raise ValueError(f"answers[{name!r}].part: expected secrets alone, no step counters")
        rows = jax.tree.leaves(shapes)[0].shape[:1]
        for node in traced.graph.outputs:
            if not node.secret:
                raise ValueError(f"answers[{name!r}]: is public in part, expected secrets alone")
            if node.shape[:1] != rows:
                raise ValueError(
                    f"answers[{name!r}]: shape {node.shape}, expected {rows} rows, as the question"
                )
        return traced

    @functools.cached_property
    def _answers(self) -> dict[str, Secure]:
        f = self.frac_bits
        return {name: secure(of.function, frac_bits=f) for name, of in self.program.answers.items()}


def _released(program: Program, traced: Traced) -> Releases:
    """What a step releases of private examples.

    No range guard looks at what no noise hides yet, since an alarm would tell.

    Raises:
        Unhidden: a private sum is not made as the program's noise says, or something of private
            examples goes elsewhere.
    """
    paths = jax.tree_util.tree_leaves_with_path(program.batch)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    if unknown := sorted(set(program.unprotected) - set(names)):
        raise ValueError(
            f"unprotected: {unknown[0]!r} is no leaf of a batch, expected some of "
            f"{', '.join(map(repr, names))}"
        )
    noise = None if program.noise is None else traced.graph.inputs[-1]
    of_batch = traced.graph.inputs[len(traced.leaves) - len(names) - (noise is not None) :]
    private = [
        n for n, name in zip(of_batch, names, strict=False) if name not in program.unprotected
    ]
    found = releases(traced.graph, private, noise)
    if noise is None and found.sums:
        raise Unhidden("noise: the step has private sums, so expected the program's noise")
    for of in found.sums:
        assert program.noise is not None
        given, wanted = (of.clip, of.size), (program.noise.clip, program.noise.size)
        if given != wanted:
            raise Unhidden(
                f"noise: made for a clip of {wanted[0]:g} and {wanted[1]} elements, and a private "
                f"sum has {given[0]:g} and {given[1]}"
            )
    return found


@functools.lru_cache(8)
def secured(program: Program) -> SecureProgram:
    """What the servers run of a program: traced once, and the same object for all its runs."""
    return SecureProgram(program)


def _check(name: str, shapes: Any, values: Any, traced: Traced, first: int) -> None:
    """Values against the secret arguments of a traced function from the first one on."""
    wanted: Any = jax.tree.structure(shapes)
    given: Any = jax.tree.structure(values)
    if wanted != given:
        raise ValueError(f"{name}: expected {wanted}, got {given}")
    end = first + len(jax.tree.leaves(shapes))
    leaves = [leaf for leaf in traced.leaves if not leaf.public][first:end]
    ranges = zip(traced.scales[first:end], traced.log_ranges[first:end], strict=True)
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(values), strict=True)
    for (like, value), leaf, (scale, log_range) in zip(pairs, leaves, ranges, strict=True):
        if np.shape(value) != like.shape:
            raise ValueError(f"{leaf.name}: expected shape {like.shape}, got {np.shape(value)}")
        check_range(leaf.name, value, scale, log_range)
