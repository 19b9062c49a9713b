"""What is in a parcel, array after array: written by DS and other owners, read by S1 and S2.

| kind | S1's | S2's |
|---|---|---|
| state | its halves of the state's leaves | likewise |
| inputs (of another owner) | its halves of the batch's leaves | likewise |
| train | [inputs, if they are DS's], [noise, if DS deals it], seed | likewise, corrections |
| answer | [its half of the question, if DS shares it], seed | [question], seed, corrections |
| guard | seed | seed, corrections |
| checkpoint, finish, drop | nothing | nothing |

A correction is a value of DS's less S1's word of it (`Party._deal`), one array for each `correlate`
or `settle`, in the order of the trace. Masks are not sent: S2 expands them from its seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lpgan_jax.cluster.session import GUARD, TRAIN, Sizes
from lpgan_jax.cluster.settings import SERVERS, ServerName
from lpgan_jax.cluster.wire import Layout, buffers, half_shapes
from lpgan_jax.mpc.prng import KEY_WORDS
from lpgan_jax.mpc.server import ServerProgram
from lpgan_jax.programs import SecureProgram, shapes

Payloads = list[list[np.ndarray]]
"""What S1 and what S2 get, as bytes."""

_SEED = jax.ShapeDtypeStruct((KEY_WORDS,), np.uint32)


def halves(paired: Any) -> Payloads:
    """S1's and S2's shares of a pytree of paired arrays."""
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(paired)]
    return [buffers([array[place] for array in arrays]) for place in range(len(SERVERS))]


def with_material(inputs: Payloads, seeds: jax.Array, corrections: list[jax.Array]) -> Payloads:
    """Inputs, then each server's own seed (uint32[2, 8]), then for S2 the corrections."""
    words = np.asarray(seeds)
    for_s1 = [*inputs[0], *buffers([words[0]])]
    return [for_s1, [*inputs[1], *buffers([words[1], *map(np.asarray, corrections)])]]


def server_programs(program: SecureProgram) -> dict[str, ServerProgram]:
    """What a server runs for a step (`TRAIN`), the `GUARD` and each answer, traced."""

    def traced(function: Any, secrets: Any, public: Any) -> ServerProgram:
        return ServerProgram(function, half_shapes(secrets), public)

    # The step first: its trace says what the guard looks at.
    found = {TRAIN: traced(*shapes.step_program(program))}
    found[GUARD] = traced(*shapes.guard_program(program))
    for name in program.program.answers:
        found[name] = traced(*shapes.answer_program(program, name))
    return found


class Parcels:
    """How a server reads them.

    Attributes:
        state, inputs, noise: shapes of this server's halves.
        questions: the same, by the name of the answer.
        corrections: shapes of what is dealt for each of `server_programs`, of S2.
        sizes: bytes of each.
    """

    def __init__(
        self, program: SecureProgram, server: ServerName, programs: Mapping[str, ServerProgram]
    ) -> None:
        """`server`: whose; `programs`: of `server_programs`."""
        names = list(program.program.answers)
        self.corrections = {which: made.corrections for which, made in programs.items()}
        self.state = half_shapes(shapes.state_shapes(program))
        self.inputs = half_shapes(shapes.owned_shapes(program))
        self.noise = half_shapes(shapes.dealt_noise_shapes(program))
        self.questions = {
            name: half_shapes(shapes.question_shapes(program, name)) for name in names
        }
        corrected = server == "s2"
        self._material = {
            which: Layout([_SEED, *(of if corrected else ())])
            for which, of in self.corrections.items()
        }
        self.sizes = Sizes(
            state=Layout.of(self.state).size,
            inputs=Layout.of(self.inputs).size,
            noise=Layout.of(self.noise).size,
            questions={name: Layout.of(of).size for name, of in self.questions.items()},
            material={which: layout.size for which, layout in self._material.items()},
        )

    def material(self, which: str, payload: memoryview) -> tuple[np.ndarray, list[np.ndarray]]:
        """(the seed's words, S2's corrections) of a task."""
        seed, *corrections = self._material[which].split(payload)
        return seed, corrections
