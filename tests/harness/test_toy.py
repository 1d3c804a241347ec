"""The harness holds a model that is not ours: a toy in NumPy gets all of it in a hundred lines, through public names alone."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.toy_project import TOY, Project

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "your-own-model.md"
GLUE = ["stages.py", "make_goldens.py", "goldens/tolerances.toml", "conftest.py", "test_parity.py", "faults.py"]
GLUE += ["report.py"]
LAYERS = [f"layer.{i}.{part}" for i in (0, 1) for part in ("norm", "q", "mix", "output")]
STAGES = ["mask", "embed", *LAYERS, "logits", "said"]
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def lines(path: Path) -> int:
    """Lines that say something: no blank ones, comments and docstrings."""
    if path.suffix != ".py":
        return sum(bool(line.strip()) for line in path.read_text("utf-8").splitlines())
    with open(path, encoding="utf-8") as file:
        tokens = [t for t in tokenize.generate_tokens(file.readline) if t.type not in SILENT]
    told = [t for t in tokens if not (t.type == tokenize.STRING and t.line.lstrip().startswith('"""'))]
    return len({line for t in told for line in range(t.start[0], t.end[0] + 1)})


def test_a_hundred_lines_of_glue() -> None:
    own = {"model.py", "oracle.py"}
    assert {str(path.relative_to(TOY)) for path in TOY.rglob("*.*") if path.suffix != ".pyc"} == {*GLUE, *own}
    assert sum(lines(TOY / name) for name in GLUE) <= 100
    assert lines(TOY / "model.py") <= 60


def private(path: Path) -> Iterator[str]:
    """Names of `stageparity` that a file takes though they are not public."""
    tree = ast.parse(path.read_text("utf-8"))
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stageparity"):
            for alias in node.names:
                try:
                    modules[alias.asname or alias.name] = importlib.import_module(f"{node.module}.{alias.name}")
                except ModuleNotFoundError:
                    if alias.name not in importlib.import_module(node.module or "").__all__:
                        yield f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        module = modules.get(node.value.id) if isinstance(node.value, ast.Name) else None
        if module is not None and node.attr not in module.__all__:
            yield f"{module.__name__}.{node.attr}"
        elif re.match(r"_(?!_)", node.attr):
            yield node.attr


def test_public_names_alone(tmp_path: Path) -> None:
    assert [name for file in GLUE if file.endswith(".py") for name in private(TOY / file)] == []
    planted = tmp_path / "x.py"
    text = "from stageparity import store\nfrom stageparity.run import _machine\nstore.Path, store.open_case()._held\n"
    planted.write_text(text, "utf-8")
    assert list(private(planted)) == ["stageparity.run._machine", "stageparity.store.Path", "_held"]


def test_report_and_faults(toy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    toy.python("toy.make_goldens")
    assert toy.python("toy.report", ".") == 0
    told = json.loads((toy.toy.parent / "run.json").read_text())
    (case,) = told["cases"]
    assert [row["stage"] for row in case["stages"]] == STAGES
    passes = {row["stage"]: [name for name in ("chained", "forced", "alone") if row[name]] for row in case["stages"]}
    assert passes.pop("said") == ["chained"]
    assert set(map(tuple, passes.values())) == {("chained", "forced", "alone")}
    faults = json.loads((toy.toy.parent / "faults.json").read_text())
    assert (faults["total"], faults["killed"], faults["localised"]) == (10, 10, 10)
    kinds = [fault["kind"] for fault in faults["faults"]]
    assert [kinds.count(kind) for kind in ("stage", "wiring", "chained")] == [6, 3, 1]
    assert min(fault["margin"] for fault in faults["faults"] if fault["margin"]) > 1e6
    page = (toy.toy.parent / "run.html").read_text()
    assert all(stage.replace(".", ".<wbr>") in page for stage in STAGES)
    assert "12 stages of 1 cases in float64: all equal" in capsys.readouterr().out


def test_the_ledger_holds_the_set(toy: Project) -> None:
    from stageparity import ledger, manifest, store

    toy.python("toy.make_goldens")
    goldens = toy.toy / "goldens"
    assert ledger.stale(goldens, "small", manifest.set_sha256(goldens / "small")) is None
    assert store.verify(goldens / "small") == len(STAGES) + 1 + 9  # ids, weights


def test_a_test_for_each_stage_and_dtype(toy: Project) -> None:
    toy.python("toy.make_goldens")
    result = toy.pytest("toy", "-v")
    dtypes = ("float64", "float32")
    wanted = [f"test_stage[base-{stage}-numpy-{dtype}]" for dtype in dtypes for stage in STAGES]
    wanted += [f"test_every_stage_is_judged_once[base-all-numpy-{dtype}]" for dtype in dtypes]
    found = [line.split("::")[1].split()[0] for line in result.outlines if " PASSED" in line]
    assert (result.ret, sorted(found)) == (0, sorted(wanted))


def test_a_case_runs_once_however_many_tests_read_it(toy: Project) -> None:
    toy.python("toy.make_goldens")
    toy.edit("stages.py", "        built.forward(", "        print(file=open('ran', 'a'))\n        built.forward(")
    assert toy.pytest("toy", "-W", "ignore").ret == 0
    assert (toy.toy.parent / "ran").read_text() == "\n" * 4  # chained and forced, in two dtypes


def test_a_stage_costs_model_entry_and_oracle(toy: Project) -> None:
    """Ids, order, tests, report and faults of a new stage follow from its entry."""
    end = '        return tap("logits"'
    toy.edit("model.py", end, f'        x_BTD = tap("final", bend(x_BTD))\n{end}')
    toy.edit("model.py", "def logits(", "def bend(x_BTD):\n    return np.tanh(x_BTD)\n\n\ndef logits(")
    toy.edit("oracle.py", '    out["logits"]', '    x = out["final"] = np.vectorize(math.tanh)(x)\n    out["logits"]')
    entry = (
        'Stage("final", "bent", inputs=("layer.1.output",), code=(model.bend,), run=lambda s: model.bend(*s.inputs)),'
    )
    toy.edit("stages.py", '    Stage("logits"', f'    {entry}\n    Stage("logits"')
    toy.edit("stages.py", 'inputs=("layer.1.output",), code=(model.logits,)', 'inputs=("final",), code=(model.logits,)')
    toy.edit("faults.py", "\n)}", '\n    Fault("bend.not", "not bent", (model.bend,), lambda f: lambda x: x),\n)}')
    toy.python("toy.make_goldens")
    assert toy.python("toy.report", ".") == 0
    (case,) = json.loads((toy.toy.parent / "run.json").read_text())["cases"]
    assert [row["stage"] for row in case["stages"]] == [*STAGES[:-2], "final", *STAGES[-2:]]
    faults = json.loads((toy.toy.parent / "faults.json").read_text())
    assert (faults["total"], faults["localised"]) == (11, 11)
    assert [f["stage"] for f in faults["faults"] if f["name"] == "bend.not"] == ["final"]
    result = toy.pytest("toy", "-v")
    assert result.ret == 0
    assert sum("[base-final-numpy-" in line for line in result.outlines) == 2


def test_the_page_is_the_project(toy: Project) -> None:
    """Its code blocks are the toy's files, nothing else: written anew from the page, they run by the page's commands."""
    text = PAGE.read_text("utf-8")
    blocks = dict(re.findall(r"^`toy/([\w./]+)`:\n\n```\w+\n(.*?)```$", text, re.M | re.S))
    assert blocks == {name: (TOY / name).read_text("utf-8") for name in GLUE}
    for name, block in blocks.items():
        (toy.toy / name).write_text(block, "utf-8")
    commands = [line.split()[2:] for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()]
    assert len(commands) == 3
    for module, *arguments in commands:
        assert (toy.pytest(*arguments).ret if module == "pytest" else toy.python(module, *arguments)) == 0


def test_the_failure_on_the_page_is_a_real_one(toy: Project) -> None:
    (shown,) = re.findall(r"how to run just it again:\n\n```\n(.*?)```", PAGE.read_text("utf-8"), re.S)
    toy.edit("model.py", "+ 1e-6)", "+ 1e-5)")
    toy.python("toy.make_goldens")
    found = "\n".join(toy.pytest("toy", "-q").outlines)
    assert shown.strip() in found


def test_no_tensor_library_but_numpy(toy: Project) -> None:
    """Goldens, report and faults, in a process of its own: this one has torch."""
    script = (
        f"import runpy, sys; sys.path[:0] = [{str(ROOT)!r}, {str(toy.toy.parent)!r}]; sys.argv[1:] = ['.']\n"
        "runpy.run_module('toy.make_goldens')\n"
        "try: runpy.run_module('toy.report')\n"
        "except SystemExit as end: print(end.code, [name for name in ('torch', 'vidi') if name in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.splitlines()[-1] == "0 []"
