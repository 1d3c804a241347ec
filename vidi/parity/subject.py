"""Vidi as a subject of the harness (`stageparity.subject`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from stageparity import evidence, fingerprint
from stageparity.stage import NotHeld
from stageparity.store import Case, Targets
from stageparity.subject import Subject
from vidi import __version__
from vidi.fast import accelerate, refusal
from vidi.parity import feed, varlen
from vidi.parity.bench import Bench
from vidi.parity.stages import SECTIONS, STAGES

__all__ = ["VidiSubject"]


class VidiSubject(Subject):
    """Our model in one dtype, on one device, with one attention backend, on the plain path or the fast one.

    The fast path hands its stages over as copies, so it can be judged chained alone, and it does not train.
    """

    stages, sections = STAGES, SECTIONS

    def __init__(
        self, dtype: str = "float32", *, device: str = "cpu", backend: str = "eager", fast: bool = False
    ) -> None:
        self.dtype, self.device, self.backend, self.fast = dtype, device, backend, fast
        self.about = {"backend": backend, "path": "fast" if fast else "plain"}
        self.forces = not fast

    def build(self, case: Case) -> feed.Runner:
        if self.fast and "inputs.labels" in case.inputs:
            raise NotHeld("the fast path is for inference: no loss, no gradients, no position noise")
        model = feed.load_model(case, feed.DTYPES[self.dtype], self.device, self.backend)
        if self.fast and (refused := refusal(model.config, model.device)):
            raise NotHeld(f"the fast path: {refused}")
        return accelerate(model) if self.fast else model

    def bench(self, case: Case, model: Any, targets: Targets) -> Bench:
        return Bench(case, model, targets, self.stages)

    @contextmanager
    def setting(self, name: str) -> Iterator[None]:
        with varlen.route(name == "unpadded"):
            yield

    def scope(self) -> AbstractContextManager[None]:
        return fingerprint.ieee()

    def fingerprint(self) -> Mapping[str, Any]:
        root = Path(__file__).parents[2]
        commit = evidence.commit(root) if (root / ".git").exists() else "unknown"
        return {"vidi": __version__, "commit": commit, **fingerprint.fingerprint(self.device)}
