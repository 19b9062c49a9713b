"""Studies: many training runs of several kinds from the same seeds, measured alike.

`run_sweep` runs them in processes of their own and writes tables; `write_report` makes plots and a
page of these.
"""

from lpgan_jax.study.sweep.plan import Cell, Variant
from lpgan_jax.study.sweep.report import write_report
from lpgan_jax.study.sweep.run import run_sweep

__all__ = ["Cell", "Variant", "run_sweep", "write_report"]
