"""What capturing every stage costs beside the plain forward pass: a ratio in one run."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from stageparity import store
from stageparity.run import Trace
from vidi.parity import feed
from vidi.parity.goldens import goldens_dir

pytestmark = pytest.mark.bench


def fastest(run: Callable[[], object], rounds: int = 7) -> float:
    times = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


@pytest.mark.parametrize("name", ["single", "batch", "silent"])
def test_capture_beside_the_plain_pass(name: str, record_property: Callable[[str, object], None]) -> None:
    case = store.open_case(goldens_dir() / "official", name)
    model, batch = feed.load_model(case, torch.float32), feed.batch_of(case.inputs)

    def traced() -> None:
        tap = Trace()
        model(batch, last_stream=True, tap=tap)
        tap.tensors()

    with torch.no_grad():
        plain = fastest(lambda: model(batch, last_stream=True))
        ratio = fastest(traced) / plain
    record_property("trace_over_plain", round(ratio, 3))
    print(f"{name}: a traced pass takes {ratio:.2f} times the plain one ({1e3 * plain:.0f} ms)")
    assert ratio < 1.3
