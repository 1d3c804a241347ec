"""What the harness makes of every known fault, stored in goldens/faults.json (`vidi/parity/faults/stored.py`).

    python tools/measure_faults.py              is the stored result of today's faults, goldens and tolerances? exit 1 if not
    python tools/measure_faults.py --measure    plant them all, each in its own dtype and in every lower one (minutes)

A fault that has been seen in some dtype must stay so: a result where it lies below the noise is refused, unless it is
named by --invisible "DTYPE NAME" (and the reason belongs into the commit).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from stageparity.golden import GoldenError  # noqa: E402
from tools.made_from import budgets_of, code_of  # noqa: E402
from vidi.parity import faults  # noqa: E402
from vidi.parity.faults import stored  # noqa: E402

__all__ = ["grown", "made_from", "main", "measure", "stale"]

SOURCES = ("vidi/parity/faults/*.py", "vidi/parity/registry/*.py")  # the faults, and where they must be seen


def made_from(goldens: Path) -> dict[str, str]:
    """16 hex digits for each source file, and for the golden, baselines and tolerances of each case that faults use."""
    files = sorted(path for pattern in SOURCES for path in ROOT.glob(pattern))
    code = {str(path.relative_to(ROOT)): _digest(code_of(path.read_text("utf-8"))) for path in files}
    cases = sorted({_name(fault.case) for fault in faults.FAULTS.values()})
    return code | {case: budgets_of(goldens, [case]) for case in cases}


def _name(case: str) -> str:
    return case if "/" in case else f"small/{case}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def stale(document: Mapping[str, Any], goldens: Path) -> list[str]:
    """What has changed since the stored verdicts were measured, a line each."""
    then, now = document["made_from"], made_from(goldens)
    changed = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
    return [f"{name} has changed since the faults were measured: {_AGAIN}" for name in changed]


_AGAIN = "python tools/measure_faults.py --measure"


def grown(old: Mapping[str, Any] | None, new: Mapping[str, Any], allowed: Collection[str] = ()) -> list[str]:
    """'DTYPE NAME' of every fault that was seen in a dtype and now lies below its noise."""
    found = []
    for dtype, own in (old or {}).get("dtypes", {}).items():
        found += [f"{dtype} {name}" for name in new["dtypes"][dtype]["invisible"] if name in own["margins"]]
    return [name for name in found if name not in allowed]


def measure(goldens: Path) -> dict[str, Any]:
    """Run them all; what faults.json holds."""
    import torch

    torch.set_num_threads(1)
    start, bench, every = time.perf_counter(), faults.Bench.open(goldens), list(faults.FAULTS.values())
    before = made_from(goldens)
    result = faults.as_json(verdicts := faults.judge_all(every, bench), time.perf_counter() - start)
    if faults.exit_code(verdicts):
        raise GoldenError(f"{result['killed']} of {result['total']} seen, {result['localised']} localised: vidi faults")
    dtypes = {dtype: stored.by_dtype(faults.judge_all(every, bench, dtype)) for dtype in stored.LOWER}
    if made_from(goldens) != before:
        raise GoldenError(f"sources changed while the faults ran: {_AGAIN}")
    return {"made_from": before, **result, "dtypes": dtypes}


def _rendered(document: Mapping[str, Any]) -> str:
    """JSON with a line for every fault and dtype, without a space too many."""

    def flat(value: Any) -> str:
        return json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)

    parts = []
    for key, value in document.items():
        if key == "faults":
            parts.append('"faults":[\n' + ",\n".join(map(flat, value)) + "\n]")
        elif key == "dtypes":
            parts.append('"dtypes":{\n' + ",\n".join(f"{flat(k)}:{flat(v)}" for k, v in value.items()) + "\n}")
        else:
            parts.append(f"{flat(key)}:{flat(value)}")
    return "{" + ",\n".join(parts) + "}\n"


def main(arguments: list[str] | None = None) -> int:
    """Command line; exits 0, 1 where the stored result is not current, 2 for what is refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--goldens", type=Path, default=ROOT / "goldens")
    parser.add_argument("--measure", action="store_true", help="plant all faults and write faults.json")
    parser.add_argument("--invisible", metavar="DTYPE NAME", action="append", default=[])
    args = parser.parse_args(arguments)
    try:
        old = stored.read(args.goldens)
        if args.measure:
            if "pytest" in sys.modules:
                raise GoldenError("faults are measured outside pytest")
            new = measure(args.goldens)
            if lost := grown(old, new, args.invisible):
                raise GoldenError(f"seen before, now below the noise: {', '.join(lost)}")
            draft = args.goldens / "faults.json.tmp"
            draft.write_text(_rendered(new), "utf-8")
            os.replace(draft, args.goldens / "faults.json")
            old = new
        if old is None:
            raise GoldenError(f"no faults.json in {args.goldens}: {_AGAIN}")
    except (GoldenError, ValueError) as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    print(f"{old['killed']} of {old['total']} seen, {old['localised']} first at their own stage")
    for dtype, own in old["dtypes"].items():
        print(
            f"{dtype}: {own['killed']} of {own['total']} seen; below the noise: {', '.join(own['invisible']) or 'none'}"
        )
    changed = stale(old, args.goldens)
    print("\n".join(changed) or "current")
    return int(bool(changed))


if __name__ == "__main__":
    raise SystemExit(main())
