"""Every stage of every embedded golden: chained from raw inputs, and alone where the case can feed it.

One test per case, stage, backend and dtype, such as `batch-layer.2.t2v-eager-float32`; all tests of a case read one run.
Budgets: `goldens/tolerances.toml`.
"""

from __future__ import annotations

import re

import pytest

from tests.parity import runs

TASKS = list(runs.tasks())
SLOW = {"longvideo", "verylong"}  # hundreds of frames
# A layer's input is the output of the one before; what is decoded or differentiated is the work of all stages.
NOT_ALONE = re.compile(r"layer\.[1-9]\d*\.input|(decode|odd|oddone)\.|grad\.")


def marks(task: runs.Task) -> tuple[pytest.MarkDecorator, ...]:
    return (pytest.mark.slow,) if task.case in SLOW else ()


@pytest.mark.parametrize(
    ("task", "stage"),
    [pytest.param(t, stage, id=t.id(stage), marks=marks(t)) for t, stages in TASKS for stage in stages],
)
def test_stage(task: runs.Task, stage: str, request: pytest.FixtureRequest) -> None:
    row = runs.rows(task).get(stage)
    assert row is not None, f"the run of {task.case} judged no {stage}"
    assert any(r.count for r in row.results), "nothing was compared"
    if not row.ok:
        pytest.fail(runs.text_of(task, row, request.node.nodeid), pytrace=False)


@pytest.mark.parametrize(
    ("task", "stages"), [pytest.param(t, stages, id=t.id("all"), marks=marks(t)) for t, stages in TASKS]
)
def test_every_stage_is_judged_once(task: runs.Task, stages: list[str]) -> None:
    """What the manifest holds, the run judges: no stage falls out unseen, and small cases feed every stage alone."""
    judged = runs.rows(task)
    assert sorted(judged) == sorted(stages)
    if task.set == "small":
        assert [s for s in stages if judged[s].isolated is None and not NOT_ALONE.match(s)] == []
