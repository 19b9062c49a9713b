"""What S1 and S2 run: one program for both, for one device or for several of one server.

Several devices of a server form an axis of a mesh, along which XLA splits this server's own work.
The line to the other server is the first one's. The words are the same, bit for bit, on any number
of devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh

from lpgan_jax.mpc.exchange import first_token, round_call, round_call_of_both, round_call_on
from lpgan_jax.mpc.party import Party, online
from lpgan_jax.mpc.prng import CHACHA20, KEY_WORDS
from lpgan_jax.mpc.rounds import planned

BATCH_AXIS = "batch"
S1, S2 = 0, 1


def server_mesh(per_server: int) -> Mesh:
    """A mesh of a server's own devices, the first of `jax.devices()`.

    Raises:
        ValueError: there are fewer.
    """
    devices = jax.devices()
    if not 0 < per_server <= len(devices):
        raise ValueError(
            f"devices: {per_server} of a server, expected 1 to {len(devices)}, which there are "
            f"(on a CPU, set jax_num_cpu_devices={max(per_server, 1)})"
        )
    return jax.make_mesh(
        (per_server,), (BATCH_AXIS,), devices=devices[:per_server], axis_types=(AxisType.Auto,)
    )


class ServerProgram:
    """A server's side of a program, planned in rounds; S1 and S2 compile the same one.

    Attributes:
        plan: its rounds.
        corrections: shapes of what S2 needs of DS, as `party.deal` gives it.
        shapes: of all that `run` takes but its first argument.
    """

    def __init__(
        self,
        function: Callable[[Party, Any, Any], Any],
        secrets: Any,
        public: Any = None,
        mesh: Mesh | None = None,
    ) -> None:
        """Traces. Arrays may be given as shapes.

        Args:
            function: as in `party.simulate`.
            secrets: a pytree of one server's shares.
            public: what both servers know.
            mesh: from `server_mesh`, if the server has several devices.

        Raises:
            ValueError: something is exchanged in a branch, or in a loop of unknown length.
        """

        def server(is_s1: jax.Array, words: jax.Array, secrets: Any, public: Any) -> Any:
            seed = jax.random.wrap_key_data(words, impl=CHACHA20)
            return online(function, is_s1, seed, None, secrets, public)

        is_s1 = jax.ShapeDtypeStruct((), jnp.bool_)
        words = jax.ShapeDtypeStruct((KEY_WORDS,), jnp.uint32)
        tracing = jax.make_jaxpr(server, return_shape=True)
        traced, outputs = tracing(is_s1, words, secrets, public)
        self.plan = planned(traced)
        self.corrections = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in self.plan.corrections]
        self.shapes = (words, self.corrections, secrets, public)
        self._structure = jax.tree.structure(outputs)
        self._call = round_call if mesh is None else round_call_on(mesh, BATCH_AXIS)

    def run(
        self, place: jax.Array, words: jax.Array, corrections: Any, secrets: Any, public: Any
    ) -> tuple[jax.Array, Any]:
        """The program: to be jitted.

        Args:
            place: uint32[2]: which server this is (`S1`, `S2`), and the number of its line.
            words: of this server's seed, uint32[8] (`jax.random.key_data`).
            corrections: of S2; S1's (zeros, or anything) are ignored.
            secrets: this server's shares.
            public: what both servers know.

        Returns:
            (the number of messages, this server's outputs).
        """
        operands = jax.tree.leaves((place[0] == S1, words, secrets, public, corrections))
        token, results = self.plan.run(self._call, first_token(place[1]), operands)
        return token[1], jax.tree.unflatten(self._structure, results)

    def run_both(
        self, line: jax.Array, words: jax.Array, corrections: Any, secrets: Any, public: Any
    ) -> tuple[jax.Array, Any]:
        """Both servers' sides at once, for somebody who knows both shares: to be jitted.

        Args:
            line: uint32[]: the number of a line that has both servers' words in each part of a
                message, S1's first.
            words: of both seeds, uint32[2, 8].
            corrections: of S2.
            secrets: paired arrays.
            public: what both servers know.

        Returns:
            (the number of messages, paired outputs).
        """

        def side(is_s1: jax.Array, words: jax.Array, secrets: Any) -> tuple[jax.Array, Any]:
            operands = jax.tree.leaves((is_s1, words, secrets, public, corrections))
            token, results = self.plan.run(round_call_of_both, first_token(line), operands)
            return token[1], jax.tree.unflatten(self._structure, results)

        return jax.vmap(side, out_axes=(None, 0))(jnp.asarray([True, False]), words, secrets)

    def compile(self, donate: bool = False, options: Any = None) -> jax.stages.Compiled:
        """For arrays on one device.

        Args:
            donate: whether the secrets' memory may be used for the outputs.
            options: as `compiler_options` of `jax.jit`.
        """
        return self.lower(donate, options).compile()

    def lower(self, donate: bool = False, options: Any = None) -> jax.stages.Lowered:
        """The same, not yet compiled."""
        place = jax.ShapeDtypeStruct((2,), jnp.uint32)
        return self.jitted(donate, options).lower(place, *self.shapes)

    def jitted(self, donate: bool = False, options: Any = None) -> Any:
        """The same, of any arrays."""
        run = functools.wraps(self.run)(lambda *args: self.run(*args))
        return jax.jit(run, donate_argnums=3 if donate else (), compiler_options=options)
