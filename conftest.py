"""pytest's options and markers. What they do: `tests/plugin/tiers.py`."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# The tensors of tests are small: a second thread costs more than it gives, and far more on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing a test does may reach a network, also not through a library's idea of a cache.
os.environ["HF_HUB_OFFLINE"] = "1"

pytest_plugins = ["pytester", "tests.plugin.tiers", "tests.plugin.evidence", "tests.plugin.seed"]

MARKERS = {
    "slow": "takes more than its share of the CPU tier's two minutes; `tox -e py` runs it",
    "gpu": "needs a CUDA device: pytest -m gpu",
    "full": "needs the full-size model: pytest -m full",
    "bench": "measures time: pytest -m bench",
}

# The gate must not depend on luck; `--hypothesis-profile random` looks further and prints its seed.
settings.register_profile("gate", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("random", derandomize=False, deadline=None, print_blob=True, max_examples=300)
settings.load_profile("gate")


def pytest_configure(config: pytest.Config) -> None:
    for name, text in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {text}")
