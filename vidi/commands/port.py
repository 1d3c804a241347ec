"""`vidi port`: hold someone else's port against the goldens, in its own interpreter. Needs no torch here."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stageparity import strict
from vidi.commands import arguments

__all__ = ["add_arguments", "run"]

LOG_BYTES = 1 << 16  # of what a failing port printed last
TRACER, TRACER_BEGINS, MAX_TRACER = "stagetrace.py", b'"""Traces a foreign model stage by stage', 1 << 20
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "VECLIB", "XLA")}
PLAIN = {
    "STAGETRACE_PLAIN": "1",
    "NVIDIA_TF32_OVERRIDE": "0",
    "ONEDNN_DEFAULT_FPMATH_MODE": "STRICT",
    "TORCHDYNAMO_DISABLE": "1",
}


@dataclass(frozen=True)
class Failed:
    """What ended a port. status: 1 of a model that ends by itself, 2 where `build` gave none, which is no verdict on one."""

    text: str
    status: int = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    init = verbs.add_parser("init", help="write a case as files, and an adapter to fill in")
    init.add_argument("case", metavar="CASE", help="golden case, such as official/single")
    init.add_argument("out", metavar="OUT", help="folder to write; what is in it already stays")
    trace = verbs.add_parser("run", help="trace a port through its adapter, and judge every stage that it shows")
    trace.add_argument("adapter", metavar="ADAPTER", help="adapter.py, as `vidi port init` begins it")
    trace.add_argument(
        "--python", metavar="PY", default=sys.executable, help="the port's own interpreter (default: this one)"
    )
    trace.add_argument(
        "--case", metavar="GLOB", action="append", default=[], help="golden cases (default: the adapter's)"
    )
    trace.add_argument("--stage", action=arguments.Joined, metavar="GLOB", help="judge only stages that match")
    trace.add_argument("--out", metavar="DIR", help="where dumps go (default: trace/ beside the adapter)")
    trace.add_argument(
        "--timeout", metavar="SECONDS", type=arguments.positive, default=600, help="of one case (default: 600)"
    )
    why = verbs.add_parser("explain", help="which known fault makes these tensors, told from stored sketches of all")
    why.add_argument(
        "dump", metavar="DIR", help="what `vidi port run` left (trace/ beside the adapter), or a candidate's folder"
    )
    why.add_argument(
        "--case", metavar="GLOB", action="append", default=[], help="golden cases (default: all of the dump)"
    )
    why.add_argument("--goldens", metavar="DIR", help="folder of golden cases or sets (default: the embedded ones)")
    why.add_argument("--json", metavar="FILE", help="write the matches as JSON; - is standard output")
    for verb in (init, trace):
        verb.add_argument(
            "--goldens", metavar="DIR", help="folder of golden cases or sets (default: the embedded ones)"
        )
        arguments.add_dtype(verb, "float32")
    trace.add_argument(
        "--no-environment", action="store_true", help="do not run the first wrong stage again in float64, one thread, …"
    )
    add_judged(trace)
    _add_report(trace)


def add_judged(parser: argparse.ArgumentParser) -> None:
    """What a foreign model's tensors are judged with."""
    parser.add_argument(
        "--require", metavar="COVERAGE",
        help="of a candidate: a share of the stages (90%%, all), paths (padding,varlen); less is exit 4",
    )  # fmt: skip
    parser.add_argument(
        "--budget", metavar="FILE", help="of a candidate: declared budgets, for one approximate on purpose"
    )
    parser.add_argument(
        "--capsule",
        metavar="DIR",
        help="of a candidate: its first wrong stage as files, with a check.py",
    )


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the whole result as JSON; - is standard output")
    parser.add_argument("--html", metavar="FILE", help="write a self-contained page")
    parser.add_argument("--quiet", action="store_true", help="no table, only what differs and the verdict")


def run(args: argparse.Namespace) -> int:
    """Returns 0 equal, 1 the model differs or ends by itself, 2 it cannot be built or is traced in another way, 3 nothing
    compared, 4 less seen than required."""
    return {"init": _init, "run": _trace, "explain": _explain}[args.verb](args)


def _explain(args: argparse.Namespace) -> int:
    """0 where nothing differs, 1 where something does, whether a fault is recognised or not."""
    from dataclasses import asdict

    from stageparity.port.candidate import folders
    from vidi.commands import candidate, outputs
    from vidi.parity.goldens import goldens_dir

    written, goldens = None if args.json == "-" else args.json, goldens_dir(args.goldens)
    outputs.check(written)
    for read in (goldens, args.dump):
        outputs.apart(read, written)
    found = candidate.judged(folders(Path(args.dump)), goldens, only=args.case)
    explained = found.explained(goldens)
    if args.json:
        matches = {
            case: [asdict(one) | {"faults": one.faults, "text": one.text()} for one in several]
            for case, several in explained.items()
        }
        text = json.dumps(_finite(matches), indent=1) + "\n"
        print(text, end="") if args.json == "-" else outputs.write(args.json, lambda: text)
    if args.json != "-":
        for run in found.run.cases:
            said = explained.get(run.name)
            if run.first_divergence is None:
                print(strict.printable(f"{run.name}: equal as far as seen, nothing to explain"))
            elif not said:
                print(strict.printable(f"{run.name}: no sketches of known faults for this case: NOT RUN"))
            for one in said or ():
                where = one.stages[0] + (f" and {len(one.stages) - 1} more" if len(one.stages) > 1 else "")
                print(strict.printable(f"{run.name}: {where}: {one.text()}"))
    return int(any(run.first_divergence is not None for run in found.run.cases))


def _finite(value: Any) -> Any:
    """Plain values for JSON; infinities become null."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _init(args: argparse.Namespace) -> int:
    from vidi.commands import outputs
    from vidi.commands.candidate import find_case
    from vidi.parity import port
    from vidi.parity.goldens import goldens_dir

    stages = port.load_table().stages
    case, out = find_case(args.case, goldens_dir(args.goldens)), Path(args.out)
    outputs.check_folder(out)
    _check_replaced(out)
    port.export(case, out / "case", args.dtype, stages)
    port.write_adapter(out, case, stages, args.dtype)
    again = shlex.join(["vidi", "port", "run", str(out / "adapter.py")])
    print(strict.printable(f"{out / 'adapter.py'}: fill in build, forward and STAGES, then: {again}"))
    return 0


def _trace(args: argparse.Namespace) -> int:
    from rich.markup import escape

    from stageparity import store
    from stageparity.report import console as consoles
    from vidi.commands import candidate, cases, outputs
    from vidi.parity import port
    from vidi.parity.goldens import goldens_dir

    adapter, goldens = Path(args.adapter), goldens_dir(args.goldens)
    if not adapter.is_file():
        raise ValueError(f"{adapter}: there is no such file; `vidi port init CASE OUT` begins one")
    written = (None if args.json == "-" else args.json, args.html)
    outputs.check(*written)
    outputs.check_folder(args.out)
    outputs.apart(goldens, *written, args.capsule, args.out)
    for read in (adapter, adapter.with_name("candidate.toml"), *([args.budget] if args.budget else [])):
        outputs.apart(read, *written)
    candidate.check(args)
    globs = args.case or [_own_case(adapter.parent)]
    refs, stages = cases.select(goldens, globs), port.load_table().stages
    if args.stage is not None:
        cases.check_stages(args.stage, refs, stages, "--stage")
    out = Path(args.out) if args.out else adapter.parent / "trace"
    _check_replaced(adapter.parent)
    _copy_tracer(adapter.parent)
    done: list[Path] = []
    failed: list[Failed] = []
    with consoles.console(stderr=True).status(f"{len(refs)} cases") as line:
        for n, ref in enumerate(refs):
            name = f"{ref.set}/{ref.name}"
            line.update(escape(strict.printable(f"{n + 1} of {len(refs)}: the port runs {name}")))
            folder = out / f"{ref.set}-{ref.name}"
            port.export(store.open_case(ref.folder, ref.name), folder / "case", args.dtype, stages)
            said = _run_port(args, adapter, folder)
            done.append(folder) if said is None else failed.append(Failed(f"{name}: {said.text}", said.status))
    if not done:
        for one in failed:
            print(strict.printable(f"FAILED {one.text}"), file=sys.stderr)
        return min(one.status for one in failed)
    found = candidate.judged(done, goldens, globs=args.stage, budget=args.budget)
    lines = [] if args.no_environment else _circumstances(args, adapter, found)
    command = ("vidi", "port", "run", args.adapter)
    given = (
        ("--python", args.python if args.python != sys.executable else None),
        ("--goldens", args.goldens),
        ("--out", args.out),
        ("--budget", args.budget),
    )
    options = tuple(word for name, value in given if value for word in (name, value))
    return candidate.tell(found, args, command, options, goldens, failed=failed, lines=lines)


def _circumstances(args: argparse.Namespace, adapter: Path, found: Any) -> list[str]:
    """Code or environment, for the first wrong stage: the same case under other circumstances."""
    from safetensors.numpy import load

    from stageparity import environment
    from stageparity.compare import compare
    from stageparity.port.candidate import MAX_BYTES
    from vidi.parity import port

    guilty = found.first()
    if guilty is None or guilty[1].kind == "tracing" or guilty[1].failed is None:
        return []
    run, row = guilty
    stages, case = port.load_table().stages, found.cases[run.name]
    golden, kind = found.targets(run.name)[row.stage], "chained" if row.forced is None else "forced"
    ratios: dict[str, float | None] = {}
    for name, more in (("float64", {}), ("one thread", ONE_THREAD), ("plain", PLAIN)):
        folder = found.candidates[run.name].folder / f"again-{name.replace(' ', '-')}"
        port.export(case, folder / "case", "float64" if name == "float64" else args.dtype, stages, judged_in=args.dtype)
        ratios[name] = None
        try:
            ended = _run_port(args, adapter, folder, more)
        except ValueError:  # of the adapter
            continue
        if ended is None:
            array = load(strict.read_bytes(folder / f"{kind}.safetensors", limit=MAX_BYTES)).get(row.stage)
            ratios[name] = compare(row.stage, array, golden, row.failed.rule, stages.axes(row.stage)).ratio
    return [environment.sentence(row.failed.ratio, ratios)]


def _own_case(folder: Path) -> str:
    try:
        return str(strict.read_toml(folder / "candidate.toml")["case"])
    except (strict.Missing, KeyError):
        raise ValueError(f"{folder}: no candidate.toml says which case: give --case SET/NAME") from None


def _copy_tracer(folder: Path) -> None:
    """Adapter and tracer stand side by side: the port's interpreter knows nothing of this package."""
    from stageparity import atomic
    from stageparity.port import stagetrace

    text = Path(stagetrace.__file__).read_bytes()
    place = folder / TRACER
    if not place.exists() or strict.read_bytes(place, limit=MAX_TRACER) != text:
        atomic.write_bytes(place, text)


def _check_replaced(folder: Path) -> None:
    """Raises ValueError where what `vidi port` writes anew, tracer and case, would replace something else of that name."""
    tracer, case = folder / TRACER, folder / "case"
    if os.path.lexists(tracer) and not strict.read_bytes(tracer, limit=MAX_TRACER).startswith(TRACER_BEGINS):
        raise ValueError(strict.one_line(f"{tracer} is another file than the tracer, which goes there; move it away"))
    if case.is_dir() and any(case.iterdir()) and not (case / "case.json").is_file():
        raise ValueError(strict.one_line(f"{case} holds something else than a case, which goes there; move it away"))


def _status(command: list[str], timeout: float, **options: Any) -> int:
    """Exit status of a command. Whatever ends the wait ends all that it has started: an interpreter may be behind a wrapper."""
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        try:
            return process.wait(timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def _run_port(args: argparse.Namespace, adapter: Path, folder: Path, more: Mapping[str, str] = {}) -> Failed | None:
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
