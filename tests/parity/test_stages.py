"""Every stage of every embedded golden: chained from raw inputs, forced, and alone where the case can feed it.

One test per case, stage, backend and dtype, such as `batch-layer.2.t2v-eager-float32`; all tests of a case read one run
(`stageparity.plugin`; what is held against what says the conftest.py beside this). Budgets: `goldens/tolerances.toml`.
"""

from stageparity.plugin import test_every_stage_is_judged_once, test_stage

__all__ = ["test_every_stage_is_judged_once", "test_stage"]
