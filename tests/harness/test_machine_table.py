"""A machine whose exp gives another table of frequencies is reported as that; the chain runs with the stored one."""

from pathlib import Path

import numpy as np
import pytest
import torch

from stageparity import run as runs
from stageparity import store, tolerance
from vidi.bridge import position
from vidi.parity import feed
from vidi.parity.goldens import goldens_dir, position_table
from vidi.parity.stages import STAGES
from vidi.parity.subject import VidiSubject

GOLDENS = goldens_dir()
TRUE_TABLE = feed.machine_table


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    """A parity run of one case on a machine (or with a model) that makes ``table``."""

    def with_table(table, *, machine: bool) -> runs.CaseRun:
        monkeypatch.setattr(position, "frequencies", lambda width: table(width))
        if machine:
            monkeypatch.setattr(feed, "machine_table", lambda width: table(width))
        refs = store.select(GOLDENS, ["official/single"])
        return runs.run(VidiSubject(), refs, tolerance.load(GOLDENS, STAGES), alone=False).cases[0]

    return with_table


def one_ulp_off(width: int) -> torch.Tensor:
    table = TRUE_TABLE(width).clone()
    table[1] = float(np.nextafter(table[1].numpy(), np.float32(2)))
    return table


def test_a_machine_with_another_exp_is_named_and_all_else_is_equal(run) -> None:
    case = run(one_ulp_off, machine=True)
    assert case.first_divergence is None
    assert case.notes == ("pos.freq: this machine's libraries differ in 1 of 32 entries; the stored one was used",)


def test_a_model_with_another_table_than_its_machine_is_different(run) -> None:
    case = run(one_ulp_off, machine=False)
    assert case.first_divergence is not None
    assert case.first_divergence.stage == "pos.freq"
    assert [row.stage for row in case.rows if not row.ok] == ["pos.freq"]


def test_every_width_that_is_used_has_a_stored_table() -> None:
    widths = {store.open_case(ref.folder, ref.name).config["hidden_size"] for ref in store.list_cases(GOLDENS)}
    for width in widths | {3584}:
        table = position_table(width)
        assert table is not None, width
        assert table.shape == (width // 2,)


def test_a_folder_without_tables_has_none(tmp_path: Path) -> None:
    assert position_table(64, tmp_path) is None
