from pathlib import Path

from stageparity import store, tolerance
from stageparity.plugin import Held
from toy.faults import FAULTS
from toy.stages import STAGES, Toy

GOLDENS = Path(__file__).with_name("goldens")


def pytest_stageparity_subjects():
    return [Held("numpy", Toy, ["float64", "float32"], store.list_cases(GOLDENS), tolerance.load(GOLDENS, STAGES), faults=FAULTS)]
