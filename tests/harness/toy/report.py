"""python -m toy.report OUT: the table on the terminal, JSON and a page in OUT, and what the harness said of the faults."""

import json
import sys
from pathlib import Path

from rich.console import Console

from stageparity import run, store, tolerance
from stageparity.faults import judge
from stageparity.report import page, terminal, verdict
from toy.faults import FAULTS
from toy.stages import STAGES, Toy

goldens, out = Path(__file__).with_name("goldens"), Path(sys.argv[1])
tolerances = tolerance.load(goldens, STAGES)
found = run.run(Toy(), store.list_cases(goldens), tolerances)
context = verdict.Context(STAGES, faults=FAULTS, command=("python", "-m", "toy.report"))
terminal.print_run(found, Console(), context)
(out / "run.json").write_text(terminal.to_text(found, context))
(out / "run.html").write_text(page.render(found, context))
verdicts = judge.judge_all(list(FAULTS.values()), judge.Bench(Toy, goldens, tolerances)) if not found.exit_code else []
(out / "faults.json").write_text(json.dumps(judge.as_json(verdicts, 0)))
sys.exit(found.exit_code or judge.exit_code(verdicts))
