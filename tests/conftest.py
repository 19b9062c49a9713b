"""Settings that must be made before JAX starts."""

import os
from importlib.metadata import version

import jax

if version("jaxlib") < "0.11":
    # Half the compile time, which is most of what the tests do. (Later versions have no such flag.)
    flag = "--xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()

jax.config.update("jax_num_cpu_devices", 4)  # for tests of deployed servers: one or two each
