"""Which goldens our model is held against, in which dtypes (`stageparity.plugin`)."""

from __future__ import annotations

import pytest

from stageparity import store, tolerance
from stageparity.plugin import Held
from tests.parity.runs import GOLDENS
from vidi.parity.faults import FAULTS
from vidi.parity.stages import STAGES
from vidi.parity.subject import VidiSubject

LONG = ("longvideo", "verylong")  # hundreds of frames
# A layer's input is the output of the one before; what is decoded or differentiated is the work of all stages.
NOT_ALONE = r"layer\.[1-9]\d*\.input|(decode|odd|oddone)\.|grad\."


def pytest_stageparity_subjects() -> list[Held]:
    tolerances = tolerance.load(GOLDENS, STAGES)

    def held(
        name: str, first: tuple[str, ...], rest: tuple[str, ...], prefix: str = "", not_alone: str | None = None
    ) -> list[Held]:
        """first: the dtypes of the fast tier; the slow one has the rest, and the long cases."""
        cases = store.list_cases(GOLDENS / name)
        slow = {ref.name: [pytest.mark.slow] for ref in cases}
        long = {case: marks for case, marks in slow.items() if case in LONG}
        return [
            Held(
                "eager", VidiSubject, dtypes, cases, tolerances, prefix, marks, not_alone, FAULTS,
                ("vidi", "parity"), ("--backend", "eager"),
            )
            for dtypes, marks in ((first, long), (rest, slow))
        ]  # fmt: skip

    return [
        *held("official", ("float32",), ("bfloat16", "float16")),
        # the mathematics in float64; in bfloat16 where it rounds
        *held("small", ("float64", "bfloat16"), ("float32", "float16"), "small.", NOT_ALONE),
        *held("official-7b", ("float32",), ("float16",), "7b."),  # its release ran in no bfloat16
        *held("small-7b", ("float64",), ("float32", "float16"), "7b.small.", NOT_ALONE),
    ]
