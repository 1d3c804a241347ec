"""`vidi parity`: arguments and what they run. Loads torch only when it runs."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stageparity import strict
from vidi.commands import arguments
from vidi.commands.port import add_judged

__all__ = ["add_arguments", "run"]

NOTHING = 3
#: Options that are not read in a run of a model, of a candidate, at full size, and what they are where they are not given.
MODEL = {"require": None, "budget": None, "capsule": None}
CANDIDATE: dict[str, Any] = {
    "model": None,
    "backend": None,
    "device": "cpu",
    "path": "plain",
    "size": "tiny",
    "dump": None,
    "chained": False,
}
FULL: dict[str, Any] = {
    "case": [],
    "model": None,
    "stage": None,
    "backend": None,
    "dtype": None,
    "path": "plain",
    "dump": None,
    "html": None,
    "chained": False,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--goldens", metavar="DIR", help="folder of golden cases or sets (default: the embedded ones)")
    parser.add_argument(
        "--case", metavar="GLOB", action="append", default=[],
        help="only cases whose name, set or SET/NAME matches; may be repeated (default: all)",
    )  # fmt: skip
    parser.add_argument("--model", choices=("9b", "7b"), help="only cases of Vidi 1.5 9B or of Vidi 7B (default: both)")
    parser.add_argument(
        "--stage",
        action=arguments.Joined,
        metavar="GLOB",
        help="only stages that match, such as 'layer.*.t2v,logits'; may be repeated",
    )
    parser.add_argument("--backend", help="attention of the plain path: eager (default), sdpa, flash, flex")
    names = ", ".join(arguments.DTYPES)
    arguments.add_dtype(parser, None, help=f"{names}; bf16 and fp16 for short (default: float32, or the candidate's)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    parser.add_argument("--path", choices=("plain", "fast"), default="plain", help="the readable path, or vidi.fast")
    parser.add_argument(
        "--size",
        choices=("tiny", "full"),
        default="tiny",
        help="full: the 9B sizes on a GPU, fast against plain by ratio",
    )
    parser.add_argument(
        "--candidate", metavar="DIR", help="judge tensors that anything wrote, no model run: see docs/ports/README.md"
    )
    add_judged(parser)
    parser.add_argument("--chained", action="store_true", help="only from raw inputs on: no forced run, no stage alone")
    parser.add_argument("--json", metavar="FILE", help="write the whole result as JSON; - is standard output")
    parser.add_argument("--html", metavar="FILE", help="write a self-contained page")
    parser.add_argument("--dump", metavar="DIR", help="write this run's chained tensors to DIR/CASE.safetensors")
    parser.add_argument("--quiet", action="store_true", help="no table, only what differs and the verdict")


def run(args: argparse.Namespace) -> int:
    """Returns 0 equal, 1 different, 3 nothing compared. Raises what `cli.guarded` tells as 2, unusable input."""
    if args.candidate:
        arguments.unread(args, "beside --candidate, which runs no model", **CANDIDATE)
        return _candidate(args)
    if args.size == "full":
        arguments.unread(args, "with --size full", **FULL)
    arguments.unread(args, "without --candidate", **MODEL)
    arguments.check_path(args.path, args.backend)
    from rich.markup import escape

    from stageparity import run as runs
    from stageparity import tolerance
    from stageparity.dump import Dump
    from stageparity.report import console as consoles
    from stageparity.report import page, terminal
    from vidi import device
    from vidi.commands import cases, outputs
    from vidi.parity.goldens import goldens_dir, of_model
    from vidi.parity.stages import STAGES
    from vidi.parity.subject import VidiSubject

    to_stdout = args.json == "-"
    console, status = consoles.console(stderr=to_stdout), consoles.console(stderr=True)
    outputs.check(None if to_stdout else args.json, args.html)
    outputs.check_folder(args.dump)
    if args.size == "full":
        return _full(args, console)
    device.check(args.device)
    backend, dtype = args.backend or "eager", args.dtype or "float32"
    goldens = goldens_dir(args.goldens)
    outputs.apart(goldens, None if to_stdout else args.json, args.html, args.dump)
    refs = of_model(cases.select(goldens, args.case), args.model)
    # Imported recordings bring no tolerances of their own: the embedded ones judge them.
    judged_by = goldens if (goldens / "tolerances.toml").exists() else goldens_dir()
    tolerances = tolerance.load(judged_by, STAGES)
    if args.stage is not None:
        cases.check_stages(args.stage, refs, STAGES, "--stage")
    files = _files([f"{ref.set}/{ref.name}" for ref in refs])
    dump = Dump(Path(args.dump), list(files.values())) if args.dump else None
    subject = VidiSubject(dtype, device=args.device, backend=backend, fast=args.path == "fast")
    explained: dict[str, Any] = {}
    context = _context(args, dtype, judged_by, explained)
    waiting = [f"{ref.set}/{ref.name}" for ref in reversed(refs)]
    with _named(waiting), status.status(f"{len(refs)} cases") as line:

        def on_case(case: runs.CaseRun, tensors: Mapping[str, Any]) -> None:
            waiting.pop()
            line.update(escape(terminal.encodable(f"{case.name} done", status)))
            if dump is not None:
                dump.write(files[case.name], tensors)
            if case.first_divergence is not None:
                ref = next(ref for ref in refs if (ref.set, ref.name) == (case.set, case.case))
                explained[case.name] = _explained(ref, tensors, judged_by, tolerances, dtype)

        found = runs.run(subject, refs, tolerances, globs=args.stage, alone=not args.chained, on_case=on_case)
    if said := _circumstances(subject, found, refs):
        context = dataclasses.replace(context, sure=(said,))
    if dump is not None:  # the last lines are the verdict's
        terminal.say(console, f"{dump.bytes / 1e6:,.1f} MB of tensors in {dump.folder}")
    terminal.print_run(found, console, context, verbose=not args.quiet)
    if to_stdout:
        print(terminal.to_text(found, context), end="")
    outputs.write(None if to_stdout else args.json, lambda: terminal.to_text(found, context))
    outputs.write(args.html, lambda: page.render(found, context))
    return found.exit_code


def _circumstances(subject: Any, found: Any, refs: Any) -> str:
    """Code or environment, of what is wrong first; nothing where nothing is, or where it cannot be run again alone."""
    from stageparity import store
    from stageparity.report.verdict import findings
    from vidi.parity.again import circumstances

    guilty = [] if subject.fast else findings(found, subject.stages)
    if not guilty:
        return ""
    ref = next(ref for ref in refs if f"{ref.set}/{ref.name}" == guilty[0].first[0].name)
    return circumstances(subject, guilty[0], store.open_case(ref.folder, ref.name))


def _candidate(args: argparse.Namespace) -> int:
    from stageparity.port.candidate import folders
    from vidi.commands import candidate, outputs
    from vidi.parity.goldens import goldens_dir

    written, goldens = (None if args.json == "-" else args.json, args.html), goldens_dir(args.goldens)
    outputs.check(*written)
    for read in (goldens, args.candidate, *([args.budget] if args.budget else [])):
        outputs.apart(read, *written, args.capsule)
    candidate.check(args)
    dumps = folders(Path(args.candidate))
    if args.stage is not None:
        candidate.check_globs(dumps, goldens, args.stage)
    found = candidate.judged(dumps, goldens, globs=args.stage, only=args.case, budget=args.budget, dtype=args.dtype)
    given = (("--goldens", args.goldens), ("--budget", args.budget))
    options = tuple(word for name, value in given if value for word in (name, value))
    return candidate.tell(found, args, ("vidi", "parity", "--candidate", args.candidate), options, goldens)


def _files(cases: list[str]) -> dict[str, str]:
    """SET/CASE -> what its file is called: CASE, or SET-CASE where two sets have one of that name."""
    names = [case.rpartition("/")[2] for case in cases]
    return {
        case: name if names.count(name) == 1 else case.replace("/", "-")
        for case, name in zip(cases, names, strict=True)
    }


@contextlib.contextmanager
def _named(waiting: list[str]) -> Iterator[None]:
    """An exception of the model's own code is told with its case, the last one: only a person can tell whose fault it is."""
    try:
        yield
    except (ValueError, OSError, ImportError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError" or not waiting:
            raise
        said = strict.one_line(f"{waiting[-1]}: the model ends in {type(error).__name__}: {error}", 600)
        raise ValueError(f"{said}; a fault of the model, or inputs that do not fit it: --debug shows where") from error


def _explained(ref: Any, tensors: Mapping[str, Any], judged_by: Path, tolerances: Any, dtype: str) -> Any:
    """The known fault whose tensors these are, from what is stored of all."""
    from stageparity import store
    from stageparity.port.explain import explain_case
    from vidi.parity import mixed

    sketches = _sketches(judged_by)
    if sketches is None:
        return []
    case = store.open_case(ref.folder, ref.name)
    return mixed.named(explain_case(sketches, case, {"chained": tensors}, tolerances, dtype=dtype))


@functools.cache
def _sketches(goldens: Path) -> Any:
    from stageparity.port.sketches import Sketches

    return Sketches.load(goldens)


def _context(args: argparse.Namespace, dtype: str, judged_by: Path, explained: Mapping[str, Any]) -> Any:
    """What the report says beside figures; a rerun of one stage needs these options beside case, stage and dtype."""
    from stageparity.report.verdict import Context, References
    from vidi.parity.faults import FAULTS
    from vidi.parity.stages import SECTIONS, STAGES

    backend = None if args.path == "fast" else args.backend or "eager"
    given = [("--backend", backend), ("--goldens", args.goldens)]
    given += [("--device", args.device if args.device != "cpu" else None)]
    given += [("--path", args.path if args.path != "plain" else None)]
    options = tuple(word for name, value in given if value for word in (name, value))
    references = References.load(judged_by / "measured", dtype, STAGES)
    return Context(STAGES, SECTIONS, FAULTS, references, ("vidi", "parity"), options, explained=explained)


def _full(args: argparse.Namespace, console: Any) -> int:
    import torch

    from stageparity import evidence
    from stageparity.report import terminal
    from vidi.commands import outputs
    from vidi.parity import full

    if not torch.cuda.is_available():
        print("NOT RUN full size: no CUDA device; 9B parameters in float32 need a GPU of 80 GB")
        return NOTHING
    whole = full.run(args.goldens, device=args.device if args.device != "cpu" else "cuda")
    for line in whole.text().splitlines():
        terminal.say(console, line)
    if args.json:
        text = evidence.render(whole.as_json())
        if args.json == "-":
            print(text, end="")
        else:
            outputs.write(args.json, lambda: text)
    return whole.exit_code
