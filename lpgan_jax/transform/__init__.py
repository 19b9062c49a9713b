"""Any JAX function under sharing.

A function is traced as it is, its jaxpr becomes a graph of operations, which is rewritten and
planned, and then run from a server's seat by one rule for each operation.

| file | holds |
|---|---|
| `graph`, `control` | the graph: calls inlined, constants folded, loops and branches |
| `definitions`, `lookups` | primitives that are defined by others; secret indices |
| `plain` | what operations mean, in float64 |
| `private`, `releases` | noised sums of clipped gradients; that nothing else tells of these |
| `rewrites`, `fuse` | idioms that have a cheaper form |
| `bounds`, `plan` | what is known without data: intervals, scales |
| `values` | secret values: what is computed, and in which form |
| `rules` | what each operation is under sharing |
| `evaluate` | the run of a graph |
| `function`, `shared` | `secure`, and what it takes and gives |
| `storage` | the same on disk |
"""

from lpgan_jax.transform.function import Secure, secure
from lpgan_jax.transform.plan import Plan
from lpgan_jax.transform.private import private_sum
from lpgan_jax.transform.shared import Shared, is_shared, reveal
from lpgan_jax.transform.storage import load, save

__all__ = [
    "Plan",
    "Secure",
    "Shared",
    "is_shared",
    "load",
    "private_sum",
    "reveal",
    "save",
    "secure",
]
