"""The servers' program on a mesh of devices: one a server, or several that share its batch.

Each server's devices form a row of the mesh. The protocol runs along the columns, between a device
of S1 and its counterpart of S2; along a row, XLA splits one server's own work, and may move that
server's shares between its own devices. The words are the same, bit for bit, on any number of
devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lpgan_jax.mpc.party import AXIS, Party, online
from lpgan_jax.mpc.prng import CHACHA20
from lpgan_jax.mpc.shares import PARTIES

BATCH_AXIS = "batch"


def server_mesh(devices: Sequence[Any] | None = None, per_server: int = 1) -> Mesh:
    """A mesh of two rows: S1's devices and S2's.

    Args:
        devices: S1's, then S2's; by default the first of `jax.devices()`.
        per_server: how many each server has.

    Raises:
        ValueError: there are fewer than 2 * per_server devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    needed = PARTIES * per_server
    if per_server < 1 or len(devices) < needed:
        raise ValueError(
            f"devices: {per_server} for each of two servers need {max(needed, PARTIES)}, "
            f"and there are {len(devices)} (on a CPU, set jax_num_cpu_devices={needed})"
        )
    return jax.make_mesh(
        (PARTIES, per_server),
        (AXIS, BATCH_AXIS),
        devices=devices[:needed],
        axis_types=(AxisType.Auto, AxisType.Auto),
    )


def server_program(
    function: Callable[[Party, Any, Any], Any],
    mesh: Mesh,
    *,
    donate: bool = False,
    compiler_options: dict[str, bool | str] | None = None,
) -> Any:
    """Both servers' programs, jitted: (seeds, corrections, secrets, public) -> outputs.

    Args:
        function: as in `party.simulate`.
        mesh: from `server_mesh`.
        donate: whether the secrets' memory may be used for the outputs.
        compiler_options: as of `jax.jit`.

    Returns:
        A function of paired arrays, leading axis 2, whose first half S1 alone gets and whose second
        half S2: the words of the servers' seeds, uint32[2, 8] (`jax.random.key_data`),
        `party.deal`'s corrections (zeros, or anything, for S1), and the secrets; and of what is
        public. Its outputs are paired arrays likewise.
    """
    paired, everywhere = PartitionSpec(AXIS), PartitionSpec()

    def server(seed_words: jax.Array, corrections: Any, secrets: Any, public: Any) -> Any:
        seed = jax.random.wrap_key_data(seed_words[0], impl=CHACHA20)
        corrections, secrets = jax.tree.map(lambda x: x[0], (corrections, secrets))
        outputs = online(function, seed, corrections, secrets, public)
        return jax.tree.map(lambda x: x[None], outputs)

    return jax.jit(
        jax.shard_map(
            server,
            mesh=mesh,
            in_specs=(paired, paired, paired, everywhere),
            out_specs=paired,
            axis_names={AXIS},
        ),
        donate_argnums=2 if donate else (),
        compiler_options=compiler_options,
    )


def whole_sharding(mesh: Mesh) -> NamedSharding:
    """Of paired arrays that each device of a server has whole: parameters, seeds, corrections."""
    return NamedSharding(mesh, PartitionSpec(AXIS))
