"""Which goldens our model is held against, in which dtypes (`stageparity.plugin`)."""

from __future__ import annotations

import pytest

from stageparity import store, tolerance
from stageparity.plugin import Held
from tests.parity.runs import GOLDENS
from vidi.parity.faults import FAULTS
from vidi.parity.stages import STAGES
from vidi.parity.subject import VidiSubject

SLOW = {case: [pytest.mark.slow] for case in ("longvideo", "verylong")}  # hundreds of frames
# A layer's input is the output of the one before; what is decoded or differentiated is the work of all stages.
NOT_ALONE = r"layer\.[1-9]\d*\.input|(decode|odd|oddone)\.|grad\."


def pytest_stageparity_subjects() -> list[Held]:
    tolerances, low = tolerance.load(GOLDENS, STAGES), ("float32", "bfloat16", "float16")

    def held(name: str, dtypes: tuple[str, ...], prefix: str = "", not_alone: str | None = None) -> Held:
        return Held(
            "eager", VidiSubject, dtypes, store.list_cases(GOLDENS / name), tolerances, prefix, SLOW, not_alone, FAULTS,
            ("vidi", "parity"), ("--backend", "eager"),
        )  # fmt: skip

    return [
        held("official", low),
        held("small", ("float64", *low), "small.", NOT_ALONE),
        held("official-7b", ("float32", "float16"), "7b."),  # its release ran in no bfloat16
        held("small-7b", ("float64", "float32", "float16"), "7b.small.", NOT_ALONE),
    ]
