"""Regeneration: nothing is written by accident, and nothing half; the ledger covers what lies on disk."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from goldens import recipes
from stageparity import evidence, ledger, store, tolerance
from stageparity.golden import GoldenError, whole
from stageparity.manifest import set_sha256
from stageparity.writer import NewCase, locked, replaced, write_case
from tests.harness.golden_set import make_set
from tools import regen_goldens, regen_plan
from tools.studies import LEDGER, ROOT, again, baselines
from vidi.parity.stages import STAGES

GOLDENS = ROOT / "goldens"
CASE, STAGE = "oneframe", "final.norm"
POINTS = ("copied", "written", "synced", "exchanged", "cleaned", "ledger")


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The tool in this process, its guard against pytest and the model lifted: the guard has tests of its own."""
    out, err, given = io.StringIO(), io.StringIO(), list(map(str, arguments))
    unguarded = mock.patch.object(regen_goldens, "_refuse_where_unsafe")
    with unguarded, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = regen_goldens.main(given)
    return subprocess.CompletedProcess(given, code, out.getvalue(), err.getvalue())


def _apart(*arguments: object, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """The tool in a process of its own, outside pytest."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    start = ["-c", code] if code else [str(ROOT / "tools" / "regen_goldens.py")]
    command = [sys.executable, *start, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=clean)


def _snapshot(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def goldens(tmp_path: Path) -> Path:
    """A golden folder whose one small case differs from the oracle in one value."""
    folder = tmp_path / "goldens"
    (folder / "small").mkdir(parents=True)
    for name in (f"{CASE}.json", f"{CASE}.h5", "weights.safetensors"):
        shutil.copy(GOLDENS / "small" / name, folder / "small" / name)
    _rewrite(folder / "small", 0.25)
    ledger.append(folder, "small", set_sha256(folder / "small"), "as the test made it")
    return folder


def _rewrite(folder: Path, step: float) -> None:
    case = store.open_case(folder, CASE)
    targets = {variant: dict(case.variant(variant)) for variant in case.variants}
    value = targets["none"][STAGE].array.copy()
    value[0, 1, 2] += step
    targets["none"][STAGE] = whole(value)
    recipe = recipes.cases()[CASE]
    own = (case.provenance, case.config, recipe.inputs, targets, case.manifest["weights"], case.info)
    write_case(folder, NewCase(CASE, *own))


@pytest.mark.slow
def test_the_goldens_in_the_repository_are_what_the_oracle_makes_and_the_ledger_says() -> None:
    assert regen_goldens.check(GOLDENS) == []


def test_it_prints_old_and_new_and_writes_nothing(goldens: Path) -> None:
    before = _snapshot(goldens / "small")
    shown = _run("--goldens", goldens, "--case", CASE)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("\n") == 1
    assert shown.stdout.startswith(f"{CASE}/none/{STAGE}: 1 of 144 values, at [0, 1, 2] ")
    assert shown.stdout.rstrip().endswith("-> 0")
    assert _run("--goldens", goldens, "--case", CASE, "--stage", "logits").stdout == "nothing would change\n"
    assert _snapshot(goldens / "small") == before


def test_a_ledger_does_not_outgrow_its_reader(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="would not be read again"):
        ledger.append(tmp_path, "small", "0" * 64, "as it is", ["x" * 900] * 1300)
    assert not (tmp_path / "ledger.toml").exists()


def test_accept_writes_and_appends_to_the_ledger(goldens: Path) -> None:
    written = _run("--goldens", goldens, "--case", CASE, "--accept", "--reason", "the test's step is undone")
    assert written.returncode == 0, written.stderr
    assert store.verify(goldens / "small")
    entries = ledger.entries(goldens)
    assert [entry["why"] for entry in entries] == ["as the test made it", "the test's step is undone"]
    assert entries[1]["changes"][0].startswith(f"{CASE}/none/{STAGE}: 1 of 144 values")
    assert ledger.stale(goldens, "small", set_sha256(goldens / "small")) is None
    assert _run("--goldens", goldens, "--case", CASE).stdout == "nothing would change\n"


def test_what_counts_as_changed(goldens: Path) -> None:
    def line(variant: str, step: float) -> object:
        value = np.array([3.0, -4.0, 0.0])
        return regen_plan._compare_tensor(CASE, variant, STAGE, whole(value), value + step, value + step)

    rms = np.sqrt(25 / 3)
    assert line("none", 0.9e-10 * rms) is None
    assert line("none", 1.1e-10 * rms) is not None
    assert line("cast", 0.9 * 4 * 2.0**-23) is None
    assert line("cast", 1.1 * 4 * 2.0**-23) is not None


@pytest.mark.parametrize("stage", ["vision.tower", "vision.projector", "vision.resize.1", "audio.pool", "text.embeds"])
def test_before_any_float32_step_a_float32_ulp_is_a_change(stage: str) -> None:
    value = np.array([3.0, -4.0, 0.0])
    moved = regen_plan._compare_tensor(CASE, "cast", stage, whole(value), value + 1e-9, value + 1e-9)
    assert moved is not None
    assert _pure(stage)
    assert not any(map(_pure, ("vision.norm", "vision.pos_h.embed", "audio.norm", "layer.0.input", "logits")))


def _pure(stage: str) -> bool:
    return STAGES.tagged(stage, "no-float32-step")


@pytest.mark.slow
def test_stages_before_float32_are_those_of_the_tolerances() -> None:
    tables = tolerance.load(GOLDENS, STAGES)
    stages = {stage for ref in store.list_cases(GOLDENS) for stage in store.open_case(ref.folder, ref.name).targets}
    for gate in ("float64-cast", "float64-recorded"):
        strict = {stage for stage in stages if tables.rule(gate, stage).max == 1e-11}
        assert strict == set(filter(_pure, stages))


def test_a_candidate_is_no_other_tensor_than_the_oracles(goldens: Path, tmp_path: Path) -> None:
    before = _snapshot(goldens / "small")
    right = store.open_case(goldens / "small", CASE).variant("none")[STAGE].array

    def said(stage: str, value: np.ndarray) -> str:
        save_file({stage: value}, tmp_path / "candidate.safetensors")
        answer = _run("--goldens", goldens, "--case", CASE, "--candidate", tmp_path / "candidate.safetensors")
        assert answer.returncode == 2, answer.stdout
        return answer.stderr

    head = f"regen_goldens.py: {CASE}/none/{STAGE}: the candidate is"
    shape = list(right.shape)
    assert (
        said(STAGE, np.float32(1.5 * right)) == f"{head} float32 {shape}, the oracle's float64 {shape}: it is refused\n"
    )
    assert said(STAGE, right[:, :-1].copy()).startswith(f"{head} float64 [1, ")
    assert said("vision.nonsense", right) == (
        f"regen_goldens.py: {CASE}/none/vision.nonsense: the oracle computes no such stage; the candidate is refused\n"
    )
    # A stage that the golden lacks has no old value to be nearer than: it must be the oracle's own.
    case = store.open_case(goldens / "small", CASE)
    targets = {variant: dict(case.variant(variant)) for variant in case.variants}
    del targets["none"][STAGE]
    own = (case.provenance, case.config, recipes.cases()[CASE].inputs, targets, case.manifest["weights"], case.info)
    write_case(goldens / "small", NewCase(CASE, *own))
    before = _snapshot(goldens / "small")
    assert "further from the oracle" in said(STAGE, 1.5 * right)
    assert "no old one to compare with" in said(STAGE, 1.5 * right)
    assert _snapshot(goldens / "small") == before


def test_it_refuses(goldens: Path, tmp_path: Path) -> None:
    before = _snapshot(goldens / "small")

    def said(*arguments: object) -> str:
        answer = _run("--goldens", goldens, *arguments)
        assert answer.returncode == 2
        assert _snapshot(goldens / "small") == before
        return answer.stderr

    assert "needs --reason" in said("--accept")
    assert "needs --reason" in said("--accept", "--reason", "  ")
    assert "no small case named nothing" in said("--case", "nothing")
    new = {STAGE: store.open_case(goldens / "small", CASE).variant("none")[STAGE].array + 0.5}
    save_file(new, tmp_path / "worse.safetensors")
    worse = said("--case", CASE, "--candidate", tmp_path / "worse.safetensors", "--accept", "--reason", "x")
    assert "is further from the oracle" in worse
    save_file({STAGE: new[STAGE] * np.nan}, tmp_path / "nan.safetensors")
    nan = said("--case", CASE, "--candidate", tmp_path / "nan.safetensors", "--accept", "--reason", "x")
    assert "holds NaN or Inf and is refused" in nan


def test_it_refuses_recordings(goldens: Path) -> None:
    shutil.copytree(GOLDENS / "official", goldens / "official")
    before = _snapshot(goldens / "official")
    answer = _run("--goldens", goldens, "--case", "single", "--accept", "--reason", "x")
    assert answer.returncode == 2
    assert "single of official is a recording of the official release" in answer.stderr
    assert _snapshot(goldens / "official") == before
    shutil.copytree(GOLDENS / "official", goldens / "small", dirs_exist_ok=True)
    with pytest.raises(GoldenError, match="batch is a recording of the official release"):
        regen_plan.plan(goldens / "small", ["batch"])


def test_it_cannot_be_reached_from_pytest(goldens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = _snapshot(goldens / "small")
    assert regen_goldens.main(["--goldens", str(goldens), "--case", CASE, "--accept", "--reason", "x"]) == 2
    assert "not written from within pytest" in capsys.readouterr().err
    inherited = subprocess.run(
        [sys.executable, ROOT / "tools" / "regen_goldens.py", "--goldens", goldens, "--accept", "--reason", "x"],
        capture_output=True, text=True, timeout=120, env=os.environ | {"PYTEST_CURRENT_TEST": "a test"},
    )  # fmt: skip
    assert inherited.returncode == 2
    assert _snapshot(goldens / "small") == before


@pytest.mark.slow
def test_it_never_loads_the_model(goldens: Path) -> None:
    loaded = _apart(
        "--goldens", goldens, "--case", CASE, "--accept", "--reason", "x",
        code="import sys; sys.path.insert(0, '.'); from tools import regen_goldens as r; code = r.main();"
        "print([n for n, m in sys.modules.items() if n == 'torch' or n.startswith('vidi.') and '__init__' not in m.__file__]);"
        "sys.exit(code)",
    )  # fmt: skip
    assert loaded.returncode == 0, loaded.stderr
    assert "torch" not in loaded.stdout.splitlines()[-1]
    names = eval(loaded.stdout.splitlines()[-1])
    assert not [name for name in names if name in regen_goldens.MODEL or name.startswith(regen_goldens.FOLDERS)]
    beside = _apart(
        "--goldens", goldens, "--case", CASE, "--accept", "--reason", "x",
        code="import sys, torch; sys.path.insert(0, '.'); from tools import regen_goldens as r; sys.exit(r.main())",
    )  # fmt: skip
    assert beside.returncode == 2
    assert "torch is loaded" in beside.stderr


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_moment_a_whole_set_is_there(goldens: Path, point: str) -> None:
    old = _snapshot(goldens / "small")
    code = (
        "import os, signal, sys; sys.path.insert(0, '.'); from tools import regen_goldens as r\n"
        f"def at(p):\n    if p == {point!r}: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"sys.exit(r.main(sys.argv[1:], at))"
    )
    killed = _apart("--goldens", goldens, "--case", CASE, "--accept", "--reason", "killed", code=code)
    assert killed.returncode == -signal.SIGKILL
    assert store.verify(goldens / "small")
    is_old = _snapshot(goldens / "small") == old
    assert is_old == (point in ("copied", "written", "synced"))
    # The next run finishes the work, and sweeps up what the dead one left.
    again = _run("--goldens", goldens, "--case", CASE, "--accept", "--reason", "again")
    assert again.returncode == 0, again.stderr
    assert {path.name for path in goldens.iterdir()} == {"small", "ledger.toml"}
    assert ledger.stale(goldens, "small", set_sha256(goldens / "small")) is None
    assert _run("--goldens", goldens, "--case", CASE).stdout == "nothing would change\n"


def test_two_writers_do_not_meet(goldens: Path) -> None:
    refused = pytest.raises(GoldenError, match="another process is writing goldens here")
    with replaced(goldens / "small"), refused, replaced(goldens / "small"):
        pass


def test_the_ledger_is_written_under_the_lock(goldens: Path) -> None:
    """Two tools that accept at once would else lose an entry, or enter them in the wrong order."""
    tried = []

    def at(point: str) -> None:
        if point == "ledger":
            entries = len(ledger.entries(goldens))
            with pytest.raises(GoldenError, match="another process is writing goldens here"), locked(goldens):
                pass
            tried.append(entries)

    with mock.patch.object(regen_goldens, "_refuse_where_unsafe"), contextlib.redirect_stdout(io.StringIO()):
        regen_goldens.main(["--goldens", str(goldens), "--case", CASE, "--accept", "--reason", "undone"], at)
    assert tried == [2]
    with locked(goldens):
        answer = _run("--goldens", goldens, "--accept-tolerances", "--reason", "x")
    assert "another process is writing goldens here" in answer.stderr


@pytest.mark.parametrize("reason", ["faster \U0001f680", "a\x7fb\x1b[2J\n\\x", "caf\udce9", "x" * 2000])
def test_whatever_the_reason_the_ledger_is_read_again(reason: str, tmp_path: Path) -> None:
    for number in range(2):
        ledger.append(tmp_path, "small", str(number), reason, [reason])
    assert [entry["sha256"] for entry in ledger.entries(tmp_path)] == ["0", "1"]
    assert ledger.entries(tmp_path)[0]["why"] == reason.replace("\udce9", "\\udce9")


def test_a_ledger_that_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    ledger.append(tmp_path, "small", "0", "the first")
    before = (tmp_path / "ledger.toml").read_bytes()
    for reason, changes in (("x" * 2001, []), ("long", ["x" * 20_000])):
        with pytest.raises(ValueError, match=r"at most 2,000|a line of more than"):
            ledger.append(tmp_path, "small", "1", reason, changes)
    assert (tmp_path / "ledger.toml").read_bytes() == before


def test_an_error_of_the_body_keeps_its_name(goldens: Path) -> None:
    with pytest.raises(BlockingIOError, match="a pipe is full"), replaced(goldens / "small"):
        raise BlockingIOError("a pipe is full")


def test_an_error_while_writing_leaves_the_set(goldens: Path) -> None:
    before = _snapshot(goldens / "small")

    def fail() -> None:
        with replaced(goldens / "small") as draft:
            (draft / f"{CASE}.h5").write_bytes(b"")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert _snapshot(goldens / "small") == before
    assert not list(goldens.glob(".*"))


def test_byte_identical_twice(tmp_path: Path) -> None:
    for name in ("one", "two"):
        made = _apart("--goldens", tmp_path / name, "--case", CASE, "--accept", "--reason", "first")
        assert made.returncode == 0, made.stderr
    assert _snapshot(tmp_path / "one" / "small") == _snapshot(tmp_path / "two" / "small")
    assert (tmp_path / "one" / "ledger.toml").read_bytes() == (tmp_path / "two" / "ledger.toml").read_bytes()


@pytest.mark.slow
def test_the_gate_sees_a_tolerance_without_ledger_entry(goldens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = {CASE: recipes.cases()[CASE]}
    monkeypatch.setattr(recipes, "cases", lambda: one)
    _rewrite(goldens / "small", -0.25)
    measured = evidence.measured_on(baselines.basis(goldens), ROOT)
    stored = goldens / LEDGER["baselines"]
    evidence.write(stored, {"measured_on": measured})
    path = goldens / "tolerances.toml"
    path.write_text((GOLDENS / "tolerances.toml").read_text())
    for subject, sha256 in (
        ("small", set_sha256(goldens / "small")),
        ("tolerances", ledger.file_sha256(path)),
        ("baselines", ledger.file_sha256(stored)),
    ):
        ledger.append(goldens, subject, sha256, "the test's start")
    assert regen_goldens.check(goldens) == []
    path.write_text(path.read_text().replace("max = 1e-9", "max = 1e-8"))
    (problem,) = regen_goldens.check(goldens)
    assert problem.startswith("tolerances: changed since its last ledger entry (")
    assert _run("--goldens", goldens, "--accept-tolerances", "--reason", "the test loosens it").returncode == 0
    assert regen_goldens.check(goldens) == []
    for known, said in (
        ({}, [f"baselines: does not say what it was measured on: {again('baselines')}"]),
        ({"measured_on": measured}, []),
        (
            {"measured_on": measured | {"goldens": {"small/gone": "0"}}},
            [f"baselines: other goldens than it was measured on: small/gone, small/oneframe: {again('baselines')}"],
        ),
        ({"measured_on": measured}, []),
    ):
        evidence.write(stored, known)
        ledger.append(goldens, "baselines", ledger.file_sha256(stored), "the test measures")
        assert regen_goldens.check(goldens) == said
    (goldens / "small" / "spare.h5").write_bytes(b"")
    (problem,) = regen_goldens.check(goldens)
    assert problem.startswith("spare.h5: orphaned")
    (goldens / "small" / "spare.h5").unlink()
    make_set(goldens / "large" / "full")
    assert regen_goldens.check(goldens) == ["large/full: no ledger entry"]
    ledger.append(goldens, "large/full", set_sha256(goldens / "large" / "full"), "the test makes it")
    assert regen_goldens.check(goldens) == []
    raw = bytearray((goldens / "large" / "full" / "tiny.h5").read_bytes())
    raw[-9] ^= 1
    (goldens / "large" / "full" / "tiny.h5").write_bytes(raw)
    (problem,) = regen_goldens.check(goldens)
    assert problem.startswith("tiny: data file tiny.h5 is altered")
    shutil.rmtree(goldens / "large")
    (problem,) = regen_goldens.check(goldens)
    assert problem == "large/full: in the ledger, but no such golden set lies here: restore it"


def test_the_gate_sees_missing_recipes_and_cases(goldens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipes.cases()
    one = {CASE: made[CASE]}
    monkeypatch.setattr(recipes, "cases", lambda: one)
    (step,) = regen_plan.plan(goldens / "small")[0]
    assert step.line().startswith(f"{CASE}/none/{STAGE}: ")
    monkeypatch.setattr(recipes, "cases", lambda: {})
    assert [c.line() for c in regen_plan.plan(goldens / "small")[0]] == [
        f"{CASE}/: gone: no recipe makes this case any more"
    ]
    other = replace(made[CASE], inputs={**made[CASE].inputs, "inputs.audio_sizes": np.array([14])})
    monkeypatch.setattr(recipes, "cases", lambda: {CASE: other})
    lines = [c.line() for c in regen_plan.plan(goldens / "small")[0]]
    assert f"{CASE}/inputs/inputs.audio_sizes: differs from the recipe's" in lines


def test_pos_freq_is_data() -> None:
    tables = load_file(GOLDENS / "pos_freq.safetensors")
    assert set(tables) == {"20", "24", "64", "3584"}
    np.testing.assert_array_equal(tables["24"], recipes.POS_FREQ)
    assert all(len(table) == int(width) // 2 and table[0] == 1 for width, table in tables.items())
