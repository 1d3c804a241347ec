"""What holds for every test. Tiers and markers: `stageparity_tiers` in pyproject.toml."""

from __future__ import annotations

import os

from hypothesis import settings

from tests.plugin.harness import BY_NAME

# The tensors of tests are small: a second thread costs more than it gives, and far more on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing a test does may reach a network, also not through a library's idea of a cache.
os.environ["HF_HUB_OFFLINE"] = "1"

pytest_plugins = ["pytester", *BY_NAME, "tests.plugin.tiers", "tests.plugin.evidence", "tests.plugin.seed"]

# The gate must not depend on luck; `--hypothesis-profile random` looks further and prints its seed.
settings.register_profile("gate", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("random", derandomize=False, deadline=None, print_blob=True, max_examples=300)
settings.load_profile("gate")
