"""`vidi port`: hold someone else's port against the goldens, in its own interpreter. Needs no torch here but for the full
size, whose inputs are rounded as the model rounds them.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

from stageparity import strict
from vidi.commands import arguments, traced

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    init = verbs.add_parser("init", help="write a case as files, and an adapter to fill in")
    init.add_argument(
        "case", metavar="CASE", help="golden case, such as official/single; full/frames60 is the full size"
    )
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
        names = "float64, float32, bfloat16, float16; bf16 and fp16 for short"
        arguments.add_dtype(verb, None, help=f"{names} (default: float32; full/frames60: bfloat16)")
    trace.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="of full/frames60: the weights that build() is given (`vidi synth --size full`)",
    )
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
    goldens, out = goldens_dir(args.goldens), Path(args.out)
    case = find_case(args.case, goldens)
    outputs.check_folder(out)
    traced.check_tracer(out)
    traced.check_case(out)
    dtype = _dtype(args, case, goldens)
    port.export(case, out / "case", dtype, stages)
    port.write_adapter(out, case, stages, dtype)
    again = shlex.join(["vidi", "port", "run", str(out / "adapter.py")])
    print(strict.printable(f"{out / 'adapter.py'}: fill in build, forward and STAGES, then: {again}"))
    return 0


def _dtype(args: argparse.Namespace, case: Any, goldens: Path) -> str:
    """What is asked for, or the dtype that a case is judged in where nobody says. Raises ValueError where it cannot be judged."""
    from stageparity.port.sketched import is_sketched
    from vidi.commands import candidate

    if not is_sketched(case):
        return args.dtype or "float32"
    candidate.budgets(goldens).check(case, args.dtype or "bfloat16")
    return args.dtype or "bfloat16"


def _trace(args: argparse.Namespace) -> int:
    from rich.markup import escape

    from stageparity import store
    from stageparity.port.sketched import is_sketched
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
    refs, stages = cases.for_ports(goldens, globs), port.load_table().stages
    if args.stage is not None:
        cases.check_stages(args.stage, refs, stages, "--stage")
    out = Path(args.out) if args.out else adapter.parent / "trace"
    traced.check_tracer(adapter.parent)
    folders = [out / f"{ref.set}-{ref.name}" for ref in refs]
    opened = [store.open_case(ref.folder, ref.name) for ref in refs]
    for folder, case in zip(folders, opened, strict=True):
        traced.check_case(folder)
        if args.capsule and is_sketched(case):
            name = f"{case.set}/{case.name}"
            raise ValueError(
                f"--capsule: {name} is known by sketches, and no capsule is made of sketches; leave it out"
            )
    dtypes = [_dtype(args, case, goldens) for case in opened]
    if len(set(dtypes)) > 1:
        raise ValueError(
            f"these cases are judged in {' and '.join(sorted(set(dtypes)))}: one run each, or --dtype for all"
        )
    traced.copy_tracer(adapter.parent)
    done: list[Path] = []
    failed: list[traced.Failed] = []
    with consoles.console(stderr=True).status(f"{len(refs)} cases") as line:
        for n, ref in enumerate(refs):
            name = f"{ref.set}/{ref.name}"
            line.update(escape(strict.printable(f"{n + 1} of {len(refs)}: the port runs {name}")))
            checkpoint = Path(args.checkpoint) if args.checkpoint else None
            port.export(opened[n], folders[n] / "case", dtypes[n], stages, checkpoint=checkpoint)
            said = traced.run_port(args, adapter, folders[n])
            done.append(folders[n]) if said is None else failed.append(
                traced.Failed(f"{name}: {said.text}", said.status)
            )
    if not done:
        for one in failed:
            print(strict.printable(f"FAILED {one.text}"), file=sys.stderr)
        return min(one.status for one in failed)
    found = candidate.judged(done, goldens, globs=args.stage, budget=args.budget)
    lines = [] if args.no_environment else traced.circumstances(args, adapter, found)
    command = ("vidi", "port", "run", args.adapter)
    given = (
        ("--python", args.python if args.python != sys.executable else None),
        ("--goldens", args.goldens),
        ("--checkpoint", args.checkpoint),
        ("--out", args.out),
        ("--budget", args.budget),
    )
    options = tuple(word for name, value in given if value for word in (name, value))
    return candidate.tell(found, args, command, options, goldens, failed=failed, lines=lines)


def _own_case(folder: Path) -> str:
    try:
        return str(strict.read_toml(folder / "candidate.toml")["case"])
    except (strict.Missing, KeyError):
        raise ValueError(f"{folder}: no candidate.toml says which case: give --case SET/NAME") from None
