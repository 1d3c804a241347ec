"""What a stored result was measured on: a change of what it depends on makes it stale, and no other change does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from stageparity import evidence, ledger, store
from stageparity.evidence import Basis
from tools import studies, study
from tools.studies import gpu

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "goldens"
WORDS = {"code", "goldens", "budgets", "plan", "libraries", "device", "date", "commit"}


# ---- what is stored -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", studies.GATE)
def test_what_the_gate_needs_is_of_today(name: str) -> None:
    assert studies.stale_of(name, GOLDENS) == []


@pytest.mark.parametrize(
    "path", [*(GOLDENS / file for file in studies.LEDGER.values()), *sorted(gpu.FOLDER.iterdir())], ids=str
)
def test_every_stored_result_says_in_the_same_words_what_it_was_measured_on(path: Path) -> None:
    document = evidence.read(path)
    assert document is not None
    assert set(document["measured_on"]) <= WORDS
    assert {"code", "device", "date", "commit"} <= set(document["measured_on"])


def test_every_result_of_a_gpu_is_known() -> None:
    assert {path.name for path in gpu.FOLDER.iterdir()} == set(gpu.RESULTS)


def test_the_ledger_covers_every_study() -> None:
    for name, file in studies.LEDGER.items():
        assert ledger.stale(GOLDENS, name, ledger.file_sha256(GOLDENS / file)) is None


# ---- code ---------------------------------------------------------------------------------------------------------------

SOURCE = '''"""Words."""
from pkg.inner import deep

def f(x, y=None):
    """What it does."""
    # why
    return x + deep("a b")
'''


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    files = {
        "pyproject.toml": "",
        "pkg/__init__.py": "",
        "pkg/entry.py": SOURCE,
        "pkg/inner/__init__.py": "from pkg.inner.deep import deep\n",
        "pkg/inner/deep.py": "def deep(x):\n    from . import late\n    import numpy\n    return late.NAME\n",
        "pkg/inner/late.py": 'NAME = "pkg.named.code"\n',
        "pkg/named.py": "X = 1\n",
        "pkg/gpu.py": "X = 1\n",
        "pkg/aside.py": "from pkg import entry, gpu\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_code_is_what_an_entry_imports_or_names(tree: Path) -> None:
    inner = ["pkg/inner/__init__.py", "pkg/inner/deep.py", "pkg/inner/late.py"]
    assert list(evidence.code(["pkg/entry.py"], tree)) == ["pkg/__init__.py", "pkg/entry.py", *inner, "pkg/named.py"]
    assert list(evidence.code(["pkg/aside.py"], tree, ["pkg/inner/*", "pkg/g*"])) == [
        "pkg/__init__.py", "pkg/aside.py", "pkg/entry.py",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"pkg/gone\.py: no such file"):
        evidence.code(["pkg/gone.py"], tree)
    (tree / "pyproject.toml").unlink()
    assert evidence.code(["pkg/entry.py"], tree) == {}, "an installed package is known by its version"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("# why", "# another reason"),
        ("What it does.", "Other words."),
        ("x + deep", "x  +  deep"),
        ("\n    return", "\n\n    return"),
    ],
)
def test_words_and_layout_do_not_count(before: str, after: str) -> None:
    assert before in SOURCE
    assert evidence.code_of(SOURCE.replace(before, after)) == evidence.code_of(SOURCE)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("x + deep", "x - deep"),
        ("a b", "ab"),
        ("y=None", "y=0"),
        ("    return", "    if x:\n        return"),
        ("(x,", "(z,"),
    ],
)
def test_anything_else_does(before: str, after: str) -> None:
    assert before in SOURCE
    assert evidence.code_of(SOURCE.replace(before, after)) != evidence.code_of(SOURCE)


def test_hashes_are_those_of_every_version_of_python() -> None:
    """GPU results are hashed on another machine. The text must not depend on how `ast` prints trees."""
    said = evidence.code_of('def f(x: int) -> str:\n    return f"{x!r} is {x:.2f}" if x else None\n')
    assert said == (
        "(Module body=[(FunctionDef name='f' args=(arguments args=[(arg arg='x' annotation=(Name id='int'))]) body=[(Return"
        " value=(IfExp test=(Name id='x') body=(JoinedStr values=[(FormattedValue value=(Name id='x') conversion=114),(Constant"
        " value=' is '),(FormattedValue value=(Name id='x') conversion=-1 format_spec=(JoinedStr values=[(Constant"
        " value='.2f')]))]) orelse=(Constant value=None)))] returns=(Name id='str'))])"
    )


# ---- a planted change, and exactly what it makes stale --------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code of this checkout elsewhere, to be harmed."""
    root = tmp_path_factory.mktemp("checkout")
    asked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "*.py"],
        capture_output=True,
        text=True,
        check=True,
    )
    shutil.copy(ROOT / "pyproject.toml", root)
    for name in filter(lambda name: (ROOT / name).is_file(), asked.stdout.split()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    return root


def _bases(checkout: Path) -> dict[str, Basis]:
    """What each study and result depends on there."""
    every = {name: studies.study(name) for name in studies.NAMES}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("gpu", "baselines", "runs", "faults", "mutants", "sketches"):
            patch.setattr(sys.modules[f"tools.studies.{name}"], "ROOT", checkout)
        return {name: study.basis(GOLDENS) for name, study in every.items()} | {n: gpu.basis(n) for n in gpu.RESULTS}


@pytest.fixture(scope="module")
def documents(checkout: Path) -> dict[str, Any]:
    """Results as measured on the code unharmed."""
    return {name: {"measured_on": asdict(own)} for name, own in _bases(checkout).items()}


@pytest.fixture
def harmed(checkout: Path, documents: dict[str, Any]) -> Callable[[str, str], set[str]]:
    """harmed(FILE, TEXT): which studies and results are stale once TEXT stands at the end of FILE."""

    def go(file: str, text: str) -> set[str]:
        plain = (checkout / file).read_text()
        try:
            (checkout / file).write_text(plain + text)
            stale = {name: evidence.stale(documents[name], own, "AGAIN") for name, own in _bases(checkout).items()}
        finally:
            (checkout / file).write_text(plain)
        found = {name for name, lines in stale.items() if lines}
        assert all(stale[name] == [f"other code than it was measured on: {file}: AGAIN"] for name in found)
        return found

    return go


CPU = {"noise", "faults", "alarms", "mutants", "sketches"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "stale"),
    [
        ("vidi/bridge/fold.py", CPU | set(gpu.RESULTS) - {"read_video.json"}),
        ("vidi/parity/faults/masks.py", {"faults", "sketches", "gpu_tests.json"}),  # planted at full size too
        ("vidi/parity/stages/alone.py", CPU | {"gpu_tests.json", "parity-full.json"}),
        ("stageparity/run.py", CPU | {"gpu_tests.json", "kernels.json", "parity-full.json"}),
        # At full width and in long inputs the oracle is the reference; those tests judge mutants.
        ("goldens/oracle/decoder.py", {"baselines", "mutants", "gpu_tests.json"}),
        ("tools/studies/runs.py", {"noise", "alarms"}),
        ("tools/studies/edits.py", {"mutants"}),
        ("vidi/commands/retrieve.py", set()),
        ("tools/study.py", set()),
    ],
)
def test_a_change_of_code_makes_exactly_its_results_stale(file: str, stale: set[str], harmed: Any) -> None:
    assert harmed(file, "\nPLANTED = 1\n") == stale


def test_a_comment_makes_none_stale(harmed: Any) -> None:
    assert harmed("stageparity/compare.py", "\n# a comment\n") == set()
    assert {"baselines", *CPU} <= harmed("stageparity/compare.py", "\nPLANTED = 1\n")


@pytest.mark.slow
def test_a_run_enters_no_file_whose_hash_is_not_kept() -> None:
    """Follow the calls of judged runs: imports are told from text, and a file that they miss would never make anything stale."""
    entered: set[str] = set()

    def watch(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            entered.add(frame.f_code.co_filename)

    import vidi.parity.subject  # noqa: F401  (bodies of classes run while a module is loaded, and are no calls)
    from tools.studies import runs

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        runs.run(runs.Setting("bfloat16", ("small/oneframe",), towers="sdpa"), GOLDENS)
        runs.run(runs.Setting("float64", ("small/oneframe",), towers="eager", key_order=1), GOLDENS)
    finally:
        sys.setprofile(before)
    ours = {Path(name).relative_to(ROOT).as_posix() for name in entered if Path(name).is_relative_to(ROOT)}
    ours = {name for name in ours if name.split("/")[0] in ("vidi", "stageparity", "tools", "goldens")}
    assert len(ours) > 30
    # The commit that a report names is asked for aside of every number.
    assert ours - set(evidence.ASIDE) <= set(studies.study("noise").basis(GOLDENS).code)


# ---- goldens, budgets, plan -----------------------------------------------------------------------------------------------


@pytest.fixture
def goldens(tmp_path: Path) -> Path:
    """Goldens whose numbers can be changed: manifests and files are the repository's own."""
    shutil.copytree(GOLDENS, tmp_path / "goldens", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "goldens"


def _parts(then: Basis, now: Basis) -> list[str]:
    lines = evidence.stale({"measured_on": asdict(then)}, now, "AGAIN")
    return [
        line.removeprefix("other ").replace(" than it was measured on", "").removesuffix(": AGAIN") for line in lines
    ]


def test_a_changed_tolerance_and_a_changed_baseline(goldens: Path) -> None:
    noise, path = studies.study("noise"), goldens / "tolerances.toml"
    plain, then = path.read_text(), noise.basis(goldens)
    path.write_text(
        plain.replace('why = "same mathematics', 'why = "the same mathematics').replace(
            "schema = 1", "# words\nschema = 1"
        )
    )
    assert path.read_text() != plain
    assert _parts(then, noise.basis(goldens)) == []
    path.write_text(plain.replace("max = 1e-9", "max = 1e-8"))
    assert _parts(then, noise.basis(goldens)) == ["budgets: tolerances"]
    path.write_text(plain)
    stored = goldens / studies.LEDGER["baselines"]
    body = json.loads(stored.read_text())
    body["errors"]["small/base"]["logits"][0][0] *= 2
    stored.write_text(json.dumps(body))
    assert _parts(then, noise.basis(goldens)) == ["budgets: baselines of small/base"]


def test_a_changed_golden(goldens: Path) -> None:
    from stageparity.manifest import render

    path = goldens / "small" / "novideo.json"
    thens = {name: studies.study(name).basis(goldens) for name in ("baselines", "noise", "mutants")}
    body = json.loads(path.read_text())
    body["provenance"]["commit"] = "another"
    path.write_bytes(render(body))
    for name, then in thens.items():
        assert _parts(then, studies.study(name).basis(goldens)) == []
    body["info"]["note"] = 1
    path.write_bytes(render(body))
    for name, then in thens.items():
        assert _parts(then, studies.study(name).basis(goldens)) == ["goldens: small/novideo"]


def test_many_changes_are_counted() -> None:
    then, now = Basis({f"a{i}.py": "1" for i in range(20)}), Basis({})
    (line,) = evidence.stale({"measured_on": evidence.measured_on(then, ROOT)}, now, "AGAIN")
    assert line.endswith(" and 12 more: AGAIN")
    assert evidence.stale(None, now, "AGAIN") == ["missing: AGAIN"]
    assert evidence.stale({}, now, "AGAIN") == ["does not say what it was measured on: AGAIN"]


def test_a_document_comes_back_one_entry_a_line(tmp_path: Path) -> None:
    document = {
        "measured_on": {"code": {}},
        "rows": {f"stage.{i}": [[0.1, 2e-7], 0, None] for i in range(60)},
        "é": [1] * 400,
    }
    evidence.write(tmp_path / "new" / "x.json", document)
    text = (tmp_path / "new" / "x.json").read_text("utf-8")
    assert json.loads(text) == evidence.read(tmp_path / "new" / "x.json") == document
    assert '\n"stage.7":[[0.1,2e-07],0,null],\n' in text
    with pytest.raises(ValueError, match="not JSON compliant"):
        evidence.write(tmp_path / "new" / "x.json", {"x": float("nan")})
    assert (tmp_path / "new" / "x.json").read_text("utf-8") == text
    (tmp_path / "new" / "x.json").write_text("[1")
    with pytest.raises(ValueError, match=r"x\.json: "):
        evidence.read(tmp_path / "new" / "x.json")


# ---- the command ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_is_accepted_within_pytest_without_a_reason_or_in_part(capsys: pytest.CaptureFixture[str]) -> None:
    before = (GOLDENS / studies.LEDGER["noise"]).read_bytes()
    assert study.main(["noise", "--accept", "--reason", "green"]) == 2
    assert "within pytest" in capsys.readouterr().err
    assert (GOLDENS / studies.LEDGER["noise"]).read_bytes() == before
    for arguments, said in (
        (["noise", "--accept"], '--accept needs --reason "..."'),
        (["noise", "--accept", "--stored", "--reason", "x"], "argument --stored: not allowed with argument --accept"),
        (["noise", "--dtype", "float64", "--accept", "--reason", "x"], "--dtype float64 is a part of the study"),
        (["alarms", "--count", "3", "--accept", "--reason", "x"], "--count 3 is a part of the study"),
        (["mutants", "--only", "*", "--accept", "--reason", "x"], "--only * is a part of the study"),
        (["baselines", "--case", "small/none"], "no case named small/none: there are "),
    ):
        asked = subprocess.run([sys.executable, "tools/study.py", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert asked.returncode == 2
        assert said in asked.stderr


@pytest.mark.slow
def test_an_accepted_study_is_written_and_entered_and_moves_nothing_when_measured_again(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    for name in ("small/novideo.json", "small/novideo.h5", "small/weights.safetensors", "pos_freq.safetensors"):
        shutil.copy(GOLDENS / name, tmp_path / name)

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "tools/study.py",
            "baselines",
            "--goldens",
            str(tmp_path),
            "--accept",
            "--reason",
            "first",
            *more,
        ]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)

    assert run().returncode == 0
    path = tmp_path / studies.LEDGER["baselines"]
    (entry,) = ledger.entries(tmp_path)
    assert (entry["subject"], entry["why"], entry["sha256"]) == ("baselines", "first", ledger.file_sha256(path))
    assert studies.stale_of("baselines", tmp_path) == []
    stored, found = evidence.read(GOLDENS / studies.LEDGER["baselines"]), evidence.read(path)
    assert stored is not None
    assert found is not None
    assert set(found["errors"]) == {"small/novideo"}
    assert list(found["errors"]["small/novideo"]) == list(stored["errors"]["small/novideo"])
    again = run()
    assert "no figure moved" in again.stdout
    assert len(ledger.entries(tmp_path)) == 2


def test_check_names_what_is_missing_and_exits_1(goldens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (goldens / studies.LEDGER["alarms"]).unlink()
    assert study.main(["--check", "--goldens", str(goldens), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["alarms"] == [f"missing: {studies.again('alarms')}"]


def test_two_cases_measured_with_two_oracles_do_not_stand_in_one_file() -> None:
    from tools.studies import baselines

    now = Basis({"goldens/oracle/a.py": "2"}, {"s/a": "1", "s/b": "1"})
    with pytest.raises(store.GoldenError, match="the oracle is another now"):
        baselines._refuse_mixture(
            {"measured_on": {"code": {"goldens/oracle/a.py": "1"}, "goldens": now.goldens}}, now, ["s/a"]
        )
    old = {"measured_on": {"code": dict(now.code), "goldens": {"s/a": "1", "s/b": "0"}}}
    with pytest.raises(store.GoldenError, match=r"their goldens are others now \(s/b\)"):
        baselines._refuse_mixture(old, now, ["s/a"])
    baselines._refuse_mixture(old, now, ["s/b"])


# ---- the end of every run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("missing: AGAIN", 1, ["STALE alarms: missing: AGAIN", "FAILED: alarms: missing: AGAIN"]),
        ("other code: AGAIN", 0, ["STALE alarms: other code: AGAIN"]),
    ],
)
def test_every_run_names_what_is_stale_and_fails_where_a_file_is_missing(
    line: str, code: int, said: list[str], pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "stale", lambda goldens: {"alarms": [line]})
    pytester.makepyfile("def test_good(): pass")
    result = pytester.runpytest_inprocess("-p", "tests.plugin.evidence")
    assert result.ret == code
    result.stdout.fnmatch_lines(said)
    assert ("FAILED" in result.stdout.str()) is bool(code)
