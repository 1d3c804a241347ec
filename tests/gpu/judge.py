"""One rule for every kernel: its error against float64 is bounded by a naive low-precision run's own error.

Factors and floors are those of `goldens/tolerances.toml` (gates DTYPE-cast): rms 1.5 (more in few rows, see `Rule`),
maximum, worst row and worst head 3 times the naive error, plus a floor in units in the last place. Rows that are 0 in
float64 must be exactly 0.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stageparity import tolerance
from stageparity.golden import Whole
from stageparity.result import Result, Rule
from tests.harness.judged import compare, rules

__all__ = ["BTNH", "GATES", "MEASURE", "array", "judge"]

BTNH = "xattn.0.v.out"  # a stage id that says: rows are (sample, token), heads on axis 2
GATES = {torch.float32: "float32-cast", torch.bfloat16: "bfloat16-cast", torch.float16: "float16-cast"}
MEASURE = Rule("measure", "no budget: the error itself is wanted", max=math.inf, zero_rows=False)


_tolerances = functools.cache(rules)


def array(x: Tensor) -> np.ndarray:
    x = x.detach().cpu()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


def judge(
    candidate: Tensor | np.ndarray,
    truth: Tensor | np.ndarray,
    naive: Sequence[Tensor | np.ndarray],
    dtype: torch.dtype,
    stage: str = BTNH,
    *,
    zero_rows: bool = True,
    fed: bool = False,
) -> Result:
    """Hold a run in ``dtype`` against ``truth`` (float64), measured by the worst error of the ``naive`` runs, which differ
    in order of summation, in formula, or in how a product is added up. Never raises for a difference.

    fed: the run was fed the truth's inputs, so that its error is its own (the gates' narrower numbers, `isolated`).
    zero_rows: rows of exact zeros must stay so; not for gradients, which may be 0 by cancellation (softmax of one key).
    """
    found, wanted, *plain = (array(x) if isinstance(x, Tensor) else x for x in (candidate, truth, *naive))
    golden = Whole(wanted, wanted.dtype.name)
    baseline = tolerance.baseline_of([compare(stage, x, golden, MEASURE) for x in plain])
    rule = _tolerances().rule(GATES[dtype], stage, baseline=baseline, kind=tolerance.KINDS[1 if fed else 0])
    return compare(stage, found, golden, dataclasses.replace(rule, zero_rows=zero_rows))
