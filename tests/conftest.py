"""Settings that must be made before JAX starts."""

import os
from importlib.metadata import version

import jax

# Half the compile time, which is most of what the tests do.
flags = ["--xla_backend_optimization_level=0"]
if version("jaxlib") < "0.11":  # later versions have no such flag
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()

jax.config.update("jax_num_cpu_devices", 4)  # for tests of deployed servers: one or two each
