"""Dumps that anything wrote: read in every format, refused where they are stale, unfinished or mislabelled."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stageparity import manifest, store
from stageparity.golden import Whole
from stageparity.port import candidate, capsule
from stageparity.port.candidate import Unusable
from stageparity.run import CaseRun, Row
from stageparity.store import Case
from vidi import cli
from vidi.commands.candidate import judged
from vidi.parity import port
from vidi.parity.goldens import goldens_dir
from vidi.parity.port import load_table

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def case() -> Case:
    return store.open_case(goldens_dir() / "official", "single")


@pytest.fixture
def dump(case: Case, tmp_path: Path) -> Path:
    """The case's own goldens as a candidate."""
    folder = tmp_path / "dump"
    folder.mkdir()
    declare(folder, case)
    save_file(goldens(case), folder / "tensors.safetensors")
    return folder


def goldens(case: Case) -> dict[str, np.ndarray]:
    return {name: g.array for name, g in case.targets.items() if isinstance(g, Whole)}


def declare(folder: Path, held: Case, more: str = "", **changed: str) -> None:
    said = {"case": "official/single", "golden": held.identity, "dtype": "float32", **changed}
    text = "".join(f'{key} = "{value}"\n' for key, value in said.items())
    (folder / "candidate.toml").write_text(text + more)


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = load_file(folder / "tensors.safetensors")
    change(tensors)
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / "tensors.safetensors")


def test_goldens_are_their_own_candidate(dump: Path, case: Case) -> None:
    found = judged(candidate.folders(dump), goldens_dir())
    assert found.run.exit_code == 0
    assert {row.shown.ratio for row in found.run.cases[0].rows} == {0.0}
    assert (found.coverage.seen, found.coverage.of) == (len(goldens(case)), len(case.targets))


def test_a_dump_is_itself_whatever_lies_in_it(dump: Path) -> None:
    """Runs of its first wrong stage under other circumstances lie in a dump."""
    shutil.copytree(dump, dump / "again-float64")
    assert candidate.folders(dump) == [dump]
    assert candidate.folders(dump.parent) == [dump]
    _linked(dump, "other")
    assert candidate.folders(dump) == [dump]
    (dump / "candidate.toml").unlink()
    with pytest.raises(Unusable, match="link to a place outside"):
        candidate.folders(dump)


def test_a_trace_that_met_nothing_whole_says_what_it_met(dump: Path, case: Case) -> None:
    save_file({}, dump / "tensors.safetensors")
    (dump / "candidate.toml").unlink()
    _trace(dump, case, notes={"logits": "met inside jax.jit"})
    assert cli.main(["parity", "--candidate", str(dump)]) == 3
    assert (
        judged(candidate.folders(dump), goldens_dir()).candidates["official/single"].notes["logits"]
        == "met inside jax.jit"
    )


@pytest.mark.parametrize("form", ["h5", "npy", "bf16", "folder of one case"])
def test_every_format(form: str, dump: Path, case: Case, tmp_path: Path) -> None:
    tensors = {name: x for name, x in goldens(case).items() if name.startswith(("layer.0", "vision.norm"))}
    (dump / "tensors.safetensors").unlink()
    place = dump
    if form == "h5":
        with h5py.File(dump / "x.h5", "w", libver="v110") as file:
            for name, x in tensors.items():
                file[name] = x
    elif form == "npy":
        for name, x in tensors.items():
            np.save(dump / f"{name}.npy", x)
    elif form == "bf16":
        declare(dump, case, dtype="bfloat16")
        _save_bfloat16(dump / "x.safetensors", tensors)
    else:
        save_file(tensors, dump / "a.safetensors")
        place = tmp_path
    found = judged(candidate.folders(place), goldens_dir())
    real = [name for name, x in tensors.items() if form != "bf16" or x.dtype.kind == "f"]
    assert sorted(row.stage for row in found.run.cases[0].rows) == sorted(real)
    assert found.run.exit_code == 0
    rounding = max(row.shown.errors.get("max", 0.0) for row in found.run.cases[0].rows)
    assert (rounding > 0) == (form == "bf16")


def _save_bfloat16(path: Path, tensors: dict[str, np.ndarray]) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    save_torch(
        {name: torch.from_numpy(x.copy()).bfloat16() for name, x in tensors.items() if x.dtype.kind == "f"}, path
    )


def test_a_wrong_tensor_is_named_and_the_rest_is_not_told_apart(dump: Path) -> None:
    def wrong(tensors: dict[str, np.ndarray]) -> None:
        tensors["layer.1.t2v"] = tensors["layer.1.t2v"] * 1.001
        tensors["layer.1.output"] = tensors["layer.1.output"] * 1.001

    rewrite(dump, wrong)
    found = judged(candidate.folders(dump), goldens_dir())
    guilty = found.first()
    assert found.run.exit_code == 1
    assert guilty is not None
    assert guilty[1].stage == "layer.1.t2v"


def test_the_rerun_of_a_chained_dump_says_whose_error_as_the_whole_run_did(
    dump: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its line asks for one stage, and whose error that is hangs on what feeds it and on what reads it."""
    rewrite(dump, lambda tensors: tensors.update({"vision.norm": tensors["vision.norm"] * 1.01}))
    assert cli.main(["parity", "--candidate", str(dump), "--quiet"]) == 1
    wrong, _, again = capsys.readouterr().out.splitlines()[-3:]
    assert "its own error: in this run what feeds it is equal" in wrong
    assert cli.main(shlex.split(again)[2:]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-3] == wrong
    assert "1 stages of 1 cases" in out


def test_a_pattern_that_matches_no_stage_is_named(
    dump: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["parity", "--candidate", str(dump), "--quiet"]
    assert cli.main([*words, "--stage", "logitz"]) == 2
    assert "'logitz' matches none of the 94 stages" in capsys.readouterr().err
    budget = tmp_path / "budget.toml"
    budget.write_text('[[group]]\nstages = "logitz, layer.*"\nrms = 0.1\nreason = "8 bits"\n')
    assert cli.main([*words, "--budget", str(budget)]) == 0
    said = capsys.readouterr().out
    assert "group 1: 'logitz' matches none of the stages that were compared" in said
    assert "'layer.*'" not in said


def test_a_dtype_that_the_dump_is_not_in_is_refused(dump: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["parity", "--candidate", str(dump), "--quiet", "--dtype"]
    assert cli.main([*words, "bf16"]) == 2
    out, err = capsys.readouterr()
    said = f"vidi parity: {dump}: its tensors were computed in float32, --dtype says bfloat16; leave it out\n"
    assert (out, err) == ("", said)
    assert cli.main([*words, "float32"]) == 0


def test_another_layout_is_tracing_and_the_mapping_mends_it(dump: Path, case: Case) -> None:
    rewrite(dump, lambda tensors: tensors.update({"xattn.0.v.k": tensors["xattn.0.v.k"].transpose(0, 2, 1, 3)}))
    found = judged(candidate.folders(dump), goldens_dir())
    (row,) = [row for row in found.run.cases[0].rows if not row.ok]
    assert (found.run.exit_code, row.kind) == (2, "tracing")
    assert 'layout="a b c d -> a c b d"' in row.tracing
    declare(dump, case, '[layout]\n"xattn.{i}.{m}.k" = "a b c d -> a c b d"\n')
    rewrite(dump, lambda tensors: [tensors.pop(name) for name in list(tensors) if name != "xattn.0.v.k"])
    assert judged(candidate.folders(dump), goldens_dir()).run.exit_code == 0


Change = Callable[[Path, Case], Any]
BAD: dict[str, tuple[Change, str]] = {
    "stale": (lambda f, c: declare(f, c, golden="0" * 64), "made for another golden of official/single"),
    "no more than a letter of the hash": (lambda f, c: declare(f, c, golden=c.identity[:3]), "another golden"),
    "no golden": (
        lambda f, c: (f / "candidate.toml").write_text('case = "official/single"\ndtype = "float32"\n'),
        "its golden",
    ),
    "no such case": (lambda f, c: declare(f, c, case="official/none"), "no case 'official/none'"),
    "two cases": (lambda f, c: declare(f, c, case="official/s*"), "official/s* is 2 cases"),
    "dtype": (lambda f, c: declare(f, c, dtype="fp8"), "dtype 'fp8'; choose float64"),
    "unknown key": (lambda f, c: declare(f, c, "tolerance = 1\n"), "unknown key tolerance"),
    "no declaration": (lambda f, c: (f / "candidate.toml").unlink(), "neither candidate.toml nor trace.json"),
    "bad toml": (lambda f, c: (f / "candidate.toml").write_text("case ="), "candidate.toml"),
    "no tensors": (lambda f, c: (f / "tensors.safetensors").unlink(), "no tensors"),
    "not safetensors": (lambda f, c: (f / "tensors.safetensors").write_bytes(b"x" * 99), "unreadable"),
    "pickle": (lambda f, c: np.save(f / "layer.0.output.npy", np.array([{}], object), allow_pickle=True), "unreadable"),
    "twice": (lambda f, c: np.save(f / "logits.npy", np.zeros(3)), "logits stands in two files"),
    "a link": (lambda f, c: _link(f), "link"),
    "foreign keys": (
        lambda f, c: save_file({"x": np.zeros(3)}, f / "tensors.safetensors"),
        "none of its 1 keys is a stage",
    ),
    "unfinished": (lambda f, c: _trace(f, c, finished=False), "did not end, or still goes on"),
    "crashed": (
        lambda f, c: _trace(f, c, finished=False, failed={"step": "forced run", "last": "logits", "error": "OOM"}),
        "the port failed in its forced run, after stage logits: OOM",
    ),
    "one for all": (lambda f, c: _overlapping(f / "more.safetensors"), "those before it end at"),
    "no real numbers": (lambda f, c: np.save(f / "layer.0.output.npy", goldens(c)["layer.0.output"] + 1j), "complex"),
    "text": (lambda f, c: np.save(f / "layer.0.output.npy", np.array(["1.5"])), "holds <U3"),
    "an archive": (lambda f, c: _archive(f / "layer.0.output.npy"), "unreadable"),
    "more than there is": (lambda f, c: _claim(f / "layer.0.output.npy"), "its header tells of 12,000,000,"),
    "a header of millions": (lambda f, c: _millions(f / "more.safetensors"), "more than 1,000,000 values"),
    "one stage in two places": (lambda f, c: _two_places(f / "more.h5"), "one stage in two places"),
    "a link to a folder": (lambda f, c: _linked(f, "chained"), "link"),
    **{
        f"{key} of another form": (lambda f, c, key=key, value=value: _trace(f, c, **{key: value}), key)  # type: ignore[misc]
        for key, value in {
            "notes": 5,
            "unused": 5,
            "layout": {"logits": 5},
            "inside": {"logits": None},
            "fed": {"logits": [[[1], [1, 2], [3]]]},
        }.items()
    },
    "another tracer": (lambda f, c: _trace(f, c, version=99), "a tracer of version 99"),
}


def _link(folder: Path) -> None:
    shutil.move(folder / "tensors.safetensors", folder.parent / "elsewhere.safetensors")
    (folder / "tensors.safetensors").symlink_to(folder.parent / "elsewhere.safetensors")


def _archive(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, x=np.zeros(3))


def _claim(path: Path) -> None:
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (3_000_000_000,)}
        np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]


def _overlapping(path: Path) -> None:
    """500 tensors in the bytes of one: 130 kB that would become 100 MB."""
    entries = {f"x.{n}": {"dtype": "BF16", "shape": [50_000], "data_offsets": [0, 100_000]} for n in range(500)}
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(100_000))


def _millions(path: Path) -> None:
    text = b'{"BF16":[' + b"[]," * 1_000_000 + b"[]]}"
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def _two_places(path: Path) -> None:
    with h5py.File(path, "w", libver="v110") as file:
        file["layer.0.t2t"], file["layer/0/t2t"] = np.zeros(3), np.ones(3)


def _linked(folder: Path, name: str) -> None:
    """What lies elsewhere, a dump of its own, under a name of this one."""
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(folder / "candidate.toml", elsewhere)
    with h5py.File(elsewhere / "a.h5", "w", libver="v110") as file:
        file["layer.0.t2t"] = np.zeros(3)
    (folder / name).symlink_to(elsewhere)


def _trace(folder: Path, case: Case, **changed: Any) -> None:
    said = {
        "version": 1,
        "case": "official/single",
        "golden": case.identity,
        "dtype": "float32",
        "finished": True,
        **changed,
    }
    (folder / "trace.json").write_text(json.dumps(said))


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_judged_is_refused(
    name: str, dump: Path, case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    change, words = BAD[name]
    change(dump, case)
    assert cli.main(["parity", "--candidate", str(dump)]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": None}, {"num_hidden_layers": "x"}, {"sliding_window": {"a": 1}}]
)
def test_a_golden_of_an_impossible_config_is_named(
    change: dict[str, Any], case: Case, dump: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "goldens" / "official"
    folder.mkdir(parents=True)
    for path in (goldens_dir() / "official").glob("single.*"):
        shutil.copy(path, folder)
    altered = manifest.render(case.manifest | {"config": case.config | change})
    (folder / "single.json").write_bytes(altered)
    declare(dump, case, golden=json.loads(altered)["sha256"])
    assert cli.main(["parity", "--candidate", str(dump), "--goldens", str(folder.parent)]) == 2
    assert f"official/single: its config has {next(iter(change))} = " in capsys.readouterr().err


def test_a_capsule_replaces_nothing_but_a_capsule(tmp_path: Path) -> None:
    """Three names prove nothing: a folder may bear one, and a link is no capsule."""
    folder = tmp_path / "capsule"
    (folder / "capsule.npz").mkdir(parents=True)
    (folder / "capsule.json").write_text('{"stage": "", "row_axes": [], "budgets": {}}')
    with pytest.raises(ValueError, match="more than a capsule"):
        capsule.check(folder)
    (folder / "capsule.npz").rmdir()
    capsule.check(folder)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(ValueError, match="is a link"):
        capsule.check(tmp_path / "link")


def test_the_same_case_twice_is_refused(dump: Path, tmp_path: Path) -> None:
    shutil.copytree(dump, tmp_path / "again")
    with pytest.raises(Unusable, match="judged twice"):
        judged(candidate.folders(tmp_path), goldens_dir())


BLOCKED = """
import sys
ALLOWED = {{"numpy", "h5py", "safetensors", "stageparity", "vidi"}}
class Only:
    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        if root not in ALLOWED and root not in sys.stdlib_module_names and not root.startswith("_"):
            raise ImportError(f"{{name}} is not in this environment")
sys.meta_path.insert(0, Only())
from vidi.cli import main
sys.exit(main({argv!r}))
"""


def test_numpy_h5py_and_safetensors_are_enough(dump: Path, tmp_path: Path) -> None:
    """No torch, no rich: the same verdict, table and JSON."""
    rewrite(dump, lambda tensors: tensors.update({"logits": tensors["logits"] + 1}))
    argv = ["parity", "--candidate", str(dump), "--json", str(tmp_path / "out.json")]
    command = [sys.executable, "-c", BLOCKED.format(argv=argv)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("WRONG: logits (logits of official/single)")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["headline"].startswith("WRONG: logits")
    assert found["first_divergence"] == {"case": "official/single", "stage": "logits"}


def test_less_seen_than_required_is_4(dump: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["parity", "--candidate", str(dump), "--require", "90%", "--quiet"]) == 0
    assert "equal as far as seen: " in capsys.readouterr().out
    assert cli.main(["parity", "--candidate", str(dump), "--require", "varlen", "--quiet"]) == 4
    assert "the path varlen was not reached" in capsys.readouterr().out
    rewrite(dump, lambda tensors: [tensors.pop(name) for name in list(tensors) if not name.startswith("layer")])
    assert cli.main(["parity", "--candidate", str(dump), "--require", "90%", "--quiet"]) == 4
    assert cli.main(["parity", "--candidate", str(dump), "--require", "everything"]) == 2


def test_the_table_as_data_is_todays() -> None:
    from tools import stage_table

    assert (goldens_dir() / "stages.json").read_text("utf-8") == stage_table.text(), "run python tools/stage_table.py"
    table = load_table()
    assert table.stages.find("layer.3.output") is not None
    assert "model.layers.{i}.mlp.down_proj.weight" in table.weights["layer.{i}.output"]


# ---- which known fault, and which paths ---------------------------------------------------------------------------------


def uncapped(tensors: dict[str, np.ndarray]) -> None:
    tensors["logits"] = (30 * np.arctanh(tensors["logits"].astype(np.float64) / 30)).astype(np.float32)


def test_a_known_fault_is_named_from_tensors_alone(
    dump: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fault is made here by arithmetic, its sketch was made by the model."""
    assert cli.main(["port", "explain", str(dump)]) == 0
    assert "nothing to explain" in capsys.readouterr().out
    rewrite(dump, uncapped)
    assert cli.main(["port", "explain", str(dump), "--json", str(tmp_path / "why.json")]) == 1
    assert (
        "the same tensors as known fault `decoding.no_final_softcap` (the 7B's way) within" in capsys.readouterr().out
    )
    (found,) = json.loads((tmp_path / "why.json").read_text())["official/single"]
    assert (found["faults"], found["recognised"]) == (["decoding.no_final_softcap"], True)


def test_of_a_stage_whose_golden_is_rows_of_it_there_is_no_capsule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = store.open_case(goldens_dir() / "official", "silent")
    stage = "layer.1.image_stream"
    shape, golden = held.targets[stage].shape, held.targets[stage]
    assert not isinstance(golden, Whole)
    folder = tmp_path / "dump"
    folder.mkdir()
    declare(folder, held, case="official/silent")
    save_file({stage: np.zeros(shape, np.float32)}, folder / "tensors.safetensors")
    words = ["parity", "--candidate", str(folder), "--quiet", "--capsule", str(tmp_path / "capsule")]
    assert cli.main(words) == 1
    assert f"NOTE --capsule: {stage} of official/silent is not held whole" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "capsule").exists()


def test_a_capsule_of_chained_tensors_alone(dump: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What feeds the stage was equal: it is wrong by itself, though no forced run says so. An older capsule is replaced,
    anything else is not, and that is said before anything is judged."""

    def wrong(tensors: dict[str, np.ndarray]) -> None:
        tensors["layer.0.t2v"] *= 1.5

    rewrite(dump, wrong)
    capsule = tmp_path / "capsule"
    words = ["parity", "--candidate", str(dump), "--quiet", "--capsule", str(capsule)]
    for _ in range(2):
        assert cli.main(words) == 1
        assert {path.name for path in capsule.iterdir()} == {"capsule.npz", "capsule.json", "check.py"}
        done = subprocess.run([sys.executable, "check.py"], cwd=capsule, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout.split()[:2]) == (1, ["layer.0.t2v", "DIFFERENT"])
        (capsule / "check.py").write_text("raise SystemExit('old')")
    mine, foreign = capsule / "mine.npy", tmp_path / "foreign"
    mine.write_text("my tensor")
    foreign.mkdir()
    (foreign / "capsule.json").write_text('{"stage": "of a rocket"}')
    (foreign / "check.py").write_text("mine")
    for folder in (capsule, foreign):
        capsys.readouterr()
        assert cli.main([*words[:-1], str(folder)]) == 2
        out, err = capsys.readouterr()
        assert (out, err) == (
            "",
            f"vidi parity: {folder} holds more than a capsule; give a new folder for the capsule\n",
        )
    assert (mine.read_text(), (foreign / "check.py").read_text()) == ("my tensor", "mine")


def test_another_bug_is_no_known_fault(dump: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(dump, lambda tensors: tensors.update({"logits": tensors["logits"][..., ::-1]}))
    assert cli.main(["port", "explain", str(dump)]) == 1
    assert "no known fault fits" in capsys.readouterr().out


def test_damaged_sketches_cost_no_verdict(dump: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    goldens = tmp_path / "goldens"
    (goldens / "official").mkdir(parents=True)
    (goldens / "measured").mkdir()
    for name in ("official/single.h5", "official/single.json", "official/weights.safetensors", "tolerances.toml"):
        shutil.copyfile(goldens_dir() / name, goldens / name)
    (goldens / "measured" / "sketches.json").write_text("{}")
    rewrite(dump, uncapped)
    assert cli.main(["parity", "--candidate", str(dump), "--goldens", str(goldens), "--quiet"]) == 1
    out = capsys.readouterr().out
    assert "NOTE known faults were not asked" in out
    assert "WRONG: logits" in out


@pytest.mark.parametrize(
    ("name", "reached"),
    [
        ("single", {"window"}),
        ("batch", {"padding", "varlen", "window", "several videos"}),
        ("silent", {"padding", "silent modality"}),
        ("longvideo", {"resize"}),
    ],
)
def test_the_paths_that_a_case_goes_through(name: str, reached: set[str]) -> None:
    """Told from the case's inputs and the stages that were compared; a path whose stages were not is not reached."""
    case = store.open_case(goldens_dir() / "official", name)
    run = CaseRun(name, "official", "recorded", tuple(Row(stage) for stage in case.targets))
    found = port.paths(case, run)
    assert reached <= found <= set(port.PATHS)
    assert port.paths(case, CaseRun(name, "official", "recorded", ())) == set()
    for path in ("padding", "varlen", "resize", "silent modality"):
        assert (path in found) == (path in reached), path
