"""Print the README's parity table: every embedded case, its stages, and its worst error. Run: python tools/parity_table.py"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from stageparity import run as runs
from stageparity import store, tolerance
from vidi import cli
from vidi.parity.goldens import goldens_dir
from vidi.parity.stages import STAGES
from vidi.parity.subject import VidiSubject


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    return cli.guarded(_run, arguments, name="parity_table.py")


def _run(arguments: list[str]) -> None:
    cli.parser(description=__doc__).parse_args(arguments)
    goldens = goldens_dir()
    tolerances = tolerance.load(goldens, STAGES)
    print("| goldens | dtype | cases | stages | different | worst max\\|d\\| / rms | at |")
    print("|---|---|---|---|---|---|---|")
    low = ("float32", "bfloat16", "float16")
    sets = {
        "official": low[:1],
        "small": ("float64", *low),
        "official-7b": low[::2],
        "small-7b": ("float64", *low[::2]),
    }
    for name, dtypes in sets.items():
        refs = store.select(goldens, [name])
        for dtype in dtypes:
            run = runs.run(VidiSubject(dtype), refs, tolerances)
            rows = [(case, row) for case in run.cases for row in case.rows]
            numeric = [
                (row.chained.errors["max"], f"{case.case} {row.stage}")
                for case, row in rows
                if row.chained and row.chained.errors
            ]
            error, place = max(numeric)
            different = sum(not row.ok for _, row in rows)
            print(f"| {name} | {dtype} | {len(refs)} | {len(rows)} | {different} | {error:.1e} | `{place}` |")


if __name__ == "__main__":
    sys.exit(main())
