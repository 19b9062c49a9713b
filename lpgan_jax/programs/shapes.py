"""What a run would execute, as shapes: to be traced, counted, compiled, and not run.

A party's program is (function, secrets, public), as `party.simulate` takes them, where the secrets
are `jax.ShapeDtypeStruct`s. `cost.program_cost` and `audit.audit_program` take its parts.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from lpgan_jax.mpc.party import Program as PartyProgram
from lpgan_jax.mpc.share_trees import shapes_of, tree_of_shapes
from lpgan_jax.programs.secured import SecureProgram
from lpgan_jax.transform.function import Program as Traced


def state_shapes(program: SecureProgram) -> Any:
    """Of a secret state."""
    return tree_of_shapes(program.shapes, program.scales)


def batch_shapes(program: SecureProgram) -> Any:
    """Of all that a step takes."""
    return tree_of_shapes(program.batch, program.batch_scales)


def owned_shapes(program: SecureProgram) -> Any:
    """Of what an owner shares of it."""
    return program.batch_of(batch_shapes(program))


def dealt_noise_shapes(program: SecureProgram) -> Any:
    """Of what DS adds to that, whoever owns the batch: noise, or nothing."""
    return batch_shapes(program)[1] if program.deals_noise else None


def question_shapes(program: SecureProgram, name: str, num: int | None = None) -> Any:
    """Of a question, of so many rows instead of as many as the answer says."""
    asked = program.program.answers[name].question
    if num is not None:
        asked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((num, *x.shape[1:]), x.dtype), asked)
    return tree_of_shapes(asked, program.question_scales(name, asked))


def step_program(program: SecureProgram) -> PartyProgram:
    """What the servers run in a training step."""
    secrets = state_shapes(program), batch_shapes(program)
    return program.guarded_step, secrets, program.schedule(0)


def guard_program(program: SecureProgram) -> PartyProgram:
    """What they run to see whether a step's values were in range."""
    return program.guard, shapes_of((sum(of.count for of in program.watched),), 0), None


def answer_program(program: SecureProgram, name: str, num: int | None = None) -> PartyProgram:
    """What the servers run to answer a question (of so many rows)."""
    secrets = state_shapes(program), question_shapes(program, name, num)
    return program.answer(name), secrets, None


def told_shapes(program: SecureProgram) -> Any:
    """Of what SP is told of a step."""
    return _results(program.functions["step"])[1]


def answer_shapes(program: SecureProgram, name: str) -> Any:
    """Of an answer."""
    return _results(program.functions[f"answers[{name!r}]"])


def alarm_shapes(program: SecureProgram) -> Any:
    """Of what SP gets when a step's values were out of range: 1 or 0 for each tensor."""
    return shapes_of((len(program.watched),), 0)


def learnt_shapes(program: SecureProgram) -> Any:
    """Of what SP gets of the last state."""
    return program.learnt(state_shapes(program))


def _results(traced: Traced) -> Any:
    """Of what a function gives, at its scales; None for what is public."""
    scales = iter(traced.output_scales)
    leaves = [shapes_of(n.shape, next(scales)) if n.secret else None for n in traced.graph.outputs]
    return jax.tree.unflatten(traced.structure, leaves)


def rows_of(question: Any) -> int:
    """How many rows a question has.

    Raises:
        ValueError: its arrays have different numbers of them.
    """
    lengths = {np.shape(leaf)[0] if np.shape(leaf) else None for leaf in jax.tree.leaves(question)}
    if len(lengths) != 1 or None in lengths or 0 in lengths:
        raise ValueError(
            f"question: arrays of {sorted(map(str, lengths))} rows, expected the same number, and "
            "one at least"
        )
    (count,) = lengths
    assert count is not None
    return count
