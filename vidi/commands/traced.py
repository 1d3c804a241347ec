"""A port's own interpreter: the tracer beside its adapter, one case through it, the first wrong stage under other conditions."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stageparity import strict

__all__ = ["Failed", "check_case", "check_tracer", "circumstances", "copy_tracer", "run_port"]

LOG_BYTES = 1 << 16  # of what a failing port printed last
TRACER, TRACER_BEGINS, MAX_TRACER = "stagetrace.py", b'"""Traces a foreign model stage by stage', 1 << 20
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "VECLIB", "XLA")}
PLAIN = {
    "STAGETRACE_PLAIN": "1",
    "NVIDIA_TF32_OVERRIDE": "0",
    "ONEDNN_DEFAULT_FPMATH_MODE": "STRICT",
    "TORCHDYNAMO_DISABLE": "1",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
}


@dataclass(frozen=True)
class Failed:
    """What ended a port. status: 1 of a model that ends by itself, 2 where `build` gave none, which is no verdict on one."""

    text: str
    status: int = 1


def circumstances(args: argparse.Namespace, adapter: Path, found: Any) -> list[str]:
    """Code or environment, for the first wrong stage: the same case under other circumstances."""
    from safetensors.numpy import load

    from stageparity import environment
    from stageparity.compare import compare
    from stageparity.port.candidate import MAX_BYTES
    from stageparity.port.sketched import is_sketched
    from vidi.parity import port

    guilty = found.first()
    if guilty is None or guilty[1].kind == "tracing" or guilty[1].failed is None:
        return []
    run, row = guilty
    stages, case = port.load_table().stages, found.cases[run.name]
    if is_sketched(case):
        return ["code and environment are not told apart at this size"]
    golden, kind = found.targets(run.name)[row.stage], "chained" if row.forced is None else "forced"
    ratios: dict[str, float | None] = {}
    for name, more in (("float64", {}), ("one thread", ONE_THREAD), ("plain", PLAIN)):
        folder = found.candidates[run.name].folder / f"again-{name.replace(' ', '-')}"
        dtype = found.run.dtype
        port.export(case, folder / "case", "float64" if name == "float64" else dtype, stages, judged_in=dtype)
        ratios[name] = None
        try:
            ended = run_port(args, adapter, folder, more)
        except ValueError:  # of the adapter
            continue
        if ended is None:
            array = load(strict.read_bytes(folder / f"{kind}.safetensors", limit=MAX_BYTES)).get(row.stage)
            ratios[name] = compare(row.stage, array, golden, row.failed.rule, stages.axes(row.stage)).ratio
    return [environment.sentence(row.failed.ratio, ratios)]


def copy_tracer(folder: Path) -> None:
    """Adapter and tracer stand side by side: the port's interpreter knows nothing of this package."""
    from stageparity import atomic
    from stageparity.port import stagetrace

    text = Path(stagetrace.__file__).read_bytes()
    place = folder / TRACER
    if not place.exists() or strict.read_bytes(place, limit=MAX_TRACER) != text:
        atomic.write_bytes(place, text)


def check_tracer(folder: Path) -> None:
    """Raises ValueError where the tracer, which goes beside the adapter, would replace another file of that name."""
    tracer = folder / TRACER
    if os.path.lexists(tracer) and not strict.read_bytes(tracer, limit=MAX_TRACER).startswith(TRACER_BEGINS):
        raise ValueError(strict.one_line(f"{tracer} is another file than the tracer, which goes there; move it away"))


def check_case(folder: Path) -> None:
    """Raises ValueError where a case that is written anew would replace something else of that name."""
    case = folder / "case"
    if case.is_dir() and any(case.iterdir()) and not (case / "case.json").is_file():
        raise ValueError(strict.one_line(f"{case} holds something else than a case, which goes there; move it away"))


def _status(command: list[str], timeout: float, **options: Any) -> int:
    """Exit status of a command. With the wait all ends that it has started: an interpreter may be behind a wrapper."""
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        try:
            return process.wait(timeout)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing of it is left
                os.killpg(process.pid, signal.SIGKILL)


def run_port(args: argparse.Namespace, adapter: Path, folder: Path, more: Mapping[str, str] = {}) -> Failed | None:
    """Trace one case; None, or what ended the port. more: environment variables. Raises ValueError where the
    adapter is at fault."""
    from stageparity import atomic
    from vidi.parity import port

    for old in ("trace.json", "chained.safetensors", "forced.safetensors"):
        (folder / old).unlink(missing_ok=True)
    foreign = () if args.python == sys.executable else ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in foreign} | dict(more)
    command = [args.python, str(adapter.parent / "stagetrace.py"), str(adapter), str(folder / "case"), str(folder)]
    with tempfile.TemporaryFile() as log:
        try:
            status = _status(command, args.timeout, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        except subprocess.TimeoutExpired:
            return Failed(f"the port did not end within {args.timeout} seconds (--timeout)")
        except OSError as error:
            raise ValueError(f"{args.python}: {error.strerror}; --python names the port's interpreter") from None
        log.seek(max(0, log.tell() - LOG_BYTES))
        said_last = log.read().decode("utf-8", "replace")
    if status == 0 and (folder / "trace.json").exists():
        return None
    if status == 0:
        raise ValueError(f"{args.python}: left no trace.json; is it a Python interpreter? --python names the port's")
    atomic.write_text(folder / "port.log", said_last)
    try:
        said = strict.read_json(folder / "trace.json", inside=folder)
    except strict.Refused:
        said = {}
    if not isinstance(said.get("failed"), dict):
        ended = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        text = f"the port's interpreter {ended}: {' '.join(said_last.strip().splitlines()[-1:])}"
        return Failed(strict.one_line(text))
    if said["failed"].get("adapter"):
        raise ValueError(strict.one_line(f"{adapter}: {said['failed']['step']}: {said['failed']['error']}"))
    text = strict.one_line(f"{port.failure(said)} ({folder / 'trace.json'} holds the traceback)")
    return Failed(text, 2 if said["failed"].get("step") == "build" else 1)
