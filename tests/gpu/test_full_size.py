"""The released size: the fast bfloat16 path against the stored case, within 1.2 times the plain path's own error."""

from __future__ import annotations

import pytest

from tests.not_run import not_run
from vidi.parity import full

pytestmark = pytest.mark.full


def test_fast_is_plain_at_full_size(device):
    if device.type != "cuda":
        not_run("the full-size model needs a GPU of 80 GB")
    found = full.run(device=str(device))
    assert found.exit_code == 0, found.text()
