"""One mutant on trial: the golden runs and then the tests that can see its file, in a forked child that imports it.

The first difference, exception or failed test ends it. A program that a test starts anew imports the file as it stands on the
disk, and sees no mutant. A child has a limit of processor time (`LIMIT`), and one of ten times as much by the clock, for a
mutant that waits; sources without any edit must take less than half of it, before a death counts (`tools/studies/mutants.py`).
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib
import importlib.abc
import importlib.util
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from stageparity.golden import GoldenError
from tools.studies.edits import Mutant
from tools.studies.seen_by import tests_of

__all__ = ["LIMIT", "MISSED", "RUNS", "Child", "Goldens", "Run", "golden_cases", "runs_of"]

LIMIT = 120  #: seconds of processor time of one mutant, runs and tests together
#: what tests import, loaded once before the first fork
HEAVY = ("pytest", "hypothesis", "av", "PIL.Image", "tokenizers", "jinja2", "transformers", "transformers.models.gemma2",
         "transformers.models.mistral", "transformers.models.siglip", "transformers.models.whisper")  # fmt: skip
MISSED = "?"  #: all golden runs agree, or none enters the file


@dataclass(frozen=True)
class Run:
    """A chained run of a golden case, and of each stage alone where ``alone``: rounding in a wrong place is seen there.

    keys, streams, frames: tokens or frames in a chunk.
    """

    case: str
    dtype: str = "float64"
    fast: bool = False
    alone: bool = False
    unpadded: bool = False
    tower: str = ""
    keys: int = 0
    streams: int = 0
    frames: int = 0

    def __str__(self) -> str:
        own = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return " ".join(name if x is True else f"{name} {x}" if isinstance(x, int) else x for name, x in own)


NINE = (
    *(Run(f"small/{case}") for case in ("base", "decode", "absent", "pervideo", "train", "holes", "budget", "odd")),
    *(Run(f"small/{case}") for case in ("oddone", "oneframe", "noaudio", "novideo")),
    Run("small/base", frames=1, keys=5, streams=50),
    Run("small/pervideo", frames=2, keys=7, streams=20),
    Run("small/absent", unpadded=True),
    Run("small/base", tower="eager"),
    Run("small/absent", keys=3),
    Run("small/base", "float32"),
    Run("small/base", "bfloat16", alone=True),
    Run("small/decode", "bfloat16"),
    Run("official/loss", "float32"),  # gradients
)
SEVEN = (
    *(Run(f"small-7b/{case}") for case in ("base", "decode", "train", "absent", "trainvideo", "oneframe")),
    *(Run(f"small-7b/{case}") for case in ("noaudio", "textonly", "oneid")),
    Run("small-7b/base", "float16", alone=True),
    Run("official-7b/loss", "float32"),
)
FAST = (
    *(Run(f"small/{case}", fast=True) for case in ("base", "decode", "absent", "pervideo", "holes", "budget", "odd")),
    *(Run(f"small/{case}", fast=True) for case in ("oddone", "oneframe", "noaudio", "novideo")),
    *(Run(f"small/{case}", "bfloat16", fast=True) for case in ("base", "decode")),
)
BOTH = (*NINE[:1], *SEVEN[:1], *NINE[1:], *SEVEN[1:])  # one of each model first

#: the runs that enter a file, by the first pattern that fits it
RUNS: dict[str, tuple[Run, ...]] = {
    "vidi/bridge/conv_pool.py": SEVEN,
    "vidi/*_7b.py": SEVEN,
    "vidi/fast/*": FAST,
    "vidi/precision.py": (*BOTH, *FAST),
    "vidi/inputs/batch.py": BOTH,
    "vidi/inputs/pixels.py": BOTH,
    "vidi/inputs/*": (),
    "vidi/retrieval.py": (),
    "vidi/checkpoint/*": NINE[:1] + SEVEN[:1],
    "vidi/*": BOTH,
}


def runs_of(file: str) -> tuple[Run, ...]:
    return next(runs for glob, runs in RUNS.items() if fnmatch.fnmatchcase(file, glob))


def golden_cases(folder: Path) -> list[Any]:
    """The cases that runs take, as `stageparity.store.list_cases` gives them."""
    from stageparity.store import list_cases

    taken = {run.case for runs in RUNS.values() for run in runs}
    sets = sorted({case.split("/")[0] for case in taken})
    return [ref for name in sets for ref in list_cases(folder / name) if f"{ref.set}/{ref.name}" in taken]


@dataclass(frozen=True)
class Goldens:
    """What all children share, read and verified once."""

    cases: Mapping[str, Any]
    tolerances: Any

    @classmethod
    def load(cls, folder: Path) -> Goldens:
        import torch

        from stageparity import tolerance
        from stageparity.store import open_case
        from vidi.parity.stages import STAGES

        torch.set_num_threads(1)
        for name in HEAVY:
            importlib.import_module(name)
        cases = {}
        for ref in golden_cases(folder):
            case = cases[f"{ref.set}/{ref.name}"] = open_case(ref.folder, ref.name)
            for variant in case.variants:
                list(case.variant(variant).items())
            weights, _ = case.weights(), case.inputs
            case.__dict__["weights"] = lambda weights=weights: weights
        return cls(cases, tolerance.load(folder, STAGES))


# ---- a child ------------------------------------------------------------------------------------------------------------


class Child:
    """A mutant in a process of its own. asked: its golden runs, and whether tests follow."""

    def __init__(self, mutant: Mutant, source: str, goldens: Goldens, *, runs: bool, tests: bool) -> None:
        self.mutant, self._start, self._said = mutant, time.monotonic(), b""
        self.reader, writer = os.pipe()
        self._pid = os.fork()
        if self._pid:
            os.close(writer)
            return
        os.close(self.reader)
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        try:
            verdict = _on_goldens(mutant.file, source, goldens, runs_of(mutant.file) if runs else ())
            if not verdict:
                os.write(writer, MISSED.encode())
                verdict = _by_tests(mutant.file) if tests else ""
        except BaseException as error:
            verdict = f"tests: {_told(error)}"
        os.write(writer, f"{verdict}\n".encode())
        os._exit(0)

    def ended(self) -> bool:
        """Hear what the child says, a second at most."""
        if select.select([self.reader], [], [], 1.0)[0]:
            said = os.read(self.reader, 65536)
            self._said += said
            if said and not self._said.endswith(b"\n"):
                return False
            self._bury()
        elif time.monotonic() - self._start < 10 * LIMIT:
            return False
        else:
            self.kill()
        return True

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        self._bury()

    def _bury(self) -> None:
        _, status, usage = os.wait4(self._pid, 0)
        self.seconds = usage.ru_utime + usage.ru_stime  #: of processor time
        self._crashed = os.WIFSIGNALED(status) and os.WTERMSIG(status) not in (signal.SIGKILL, signal.SIGXCPU)
        os.close(self.reader)

    @property
    def missed(self) -> bool:
        """Did its golden runs agree?"""
        return self._said.startswith(MISSED.encode())

    @property
    def verdict(self) -> str:
        """What kills it; nothing where nothing does."""
        said = self._said.decode().removeprefix(MISSED)
        if said.endswith("\n"):
            return said.rstrip()
        if self._crashed:
            return f"{'tests' if self.missed else 'goldens'}: the process crashed"
        return f"time: no end within {LIMIT} s"


class _Mutated(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from mutated source."""

    def __init__(self, module: str, source: str) -> None:
        self.module, self.source = module, source

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.util.spec_from_loader(name, self) if name == self.module else None

    def exec_module(self, module: Any) -> None:
        exec(compile(self.source, self.module, "exec"), module.__dict__)


def _import_anew(file: str, source: str) -> None:
    """Forget all of the model and of its stages; the harness knows them by name alone, and stays."""
    for name in [name for name in sys.modules if name.split(".")[0] == "vidi"]:
        del sys.modules[name]
    module = file.removesuffix(".py").replace("/", ".")
    sys.meta_path.insert(0, _Mutated(module, source))
    importlib.import_module(module)


def _on_goldens(file: str, source: str, goldens: Goldens, runs: tuple[Run, ...]) -> str:
    """What of the golden runs kills the mutant: a stage of a run, or an exception; nothing where nothing does."""
    try:
        _import_anew(file, source)
    except Exception as error:
        return f"import: {_told(error)}"
    try:
        for run in runs:
            if stage := _differs(run, goldens):
                return f"goldens: {run}: {stage}"
    except Exception as error:
        return f"goldens: {_told(error)}"
    return ""


def _told(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return " ".join(f"{type(error).__name__} in {where.name}: {error}".split())[:160]


def _differs(run: Run, goldens: Goldens) -> str:
    """The first stage that differs. Raises GoldenError where the run compares nothing."""
    from stageparity.run import run_case
    from vidi.parity.subject import VidiSubject

    subject, case = VidiSubject(run.dtype, fast=run.fast), goldens.cases[run.case]
    with subject.scope(), subject.setting("unpadded" if run.unpadded else ""), _chunks(run):
        model: Any = subject.build(case)
        if not run.fast:
            model.frame_chunk = run.frames or model.frame_chunk
            model.tower_backend = run.tower or model.tower_backend
        done, _ = run_case(subject, case, model, goldens.tolerances, alone=run.alone)
    if not done.rows:
        raise GoldenError(f"{run}: nothing was compared")
    return done.first_divergence.stage if done.first_divergence else ""


@contextlib.contextmanager
def _chunks(run: Run) -> Iterator[None]:
    """Other chunk sizes of keys and streams."""
    from unittest import mock

    from vidi.attention import eager
    from vidi.decoder import decoder

    with (
        mock.patch.object(eager, "KEY_CHUNK", run.keys or eager.KEY_CHUNK),
        mock.patch.object(decoder, "STREAM_CHUNK", run.streams or decoder.STREAM_CHUNK),
    ):
        yield


def _by_tests(file: str) -> str:
    """The first test that the mutant fails, "" where it passes all."""
    import pytest

    failed: list[str] = []

    class Listen:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed:
                failed.append(report.nodeid)

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                failed.append(report.nodeid)

    without = ("-p", "no:cacheprovider", "-p", "no:tests.plugin.evidence")
    loaded = ("-W", "ignore::pytest.PytestAssertRewriteWarning")  # plugins' modules, by the parent
    code = pytest.main(["-x", "-q", *without, *loaded, *tests_of(file)], plugins=[Listen()])
    return "" if code == 0 else f"tests: {failed[0] if failed else f'pytest ends with {int(code)}'}"
