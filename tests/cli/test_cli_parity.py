"""`vidi parity`: exit codes, what it prints, writes and dumps. And `vidi` itself: quick, and without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stageparity import evidence, store
from tests.cli.clock import quickest
from tests.parity.runs import GOLDENS
from vidi.cli import COMMANDS, main

ROOT = Path(__file__).parents[2]


def run(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    code = main(["parity", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_stage_of_decoding_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """No run hands it over, and it is named, judged and listed as any other."""
    assert main(["parity", "--case", "small/oneframe", "--stage", "layer.*.t2t.cached"]) == 0
    assert "3 stages of 1 cases in float32 with eager: all equal" in capsys.readouterr().out


def test_equal_is_0_with_a_row_for_every_stage(capsys):
    code, out, _ = run(capsys, "--case", "small/oneframe")
    assert code == 0
    assert "100 stages of 1 cases in float32 with eager: all equal" in out
    for stage in store.open_case(GOLDENS / "small", "oneframe").variant("cast"):
        assert stage in out


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong epsilon in the bridge's norm, the weakest fault that is known."""
    from vidi.bridge import norm

    monkeypatch.setattr(norm, "EPS", 1e-6)


def test_different_is_1_and_names_the_first_stage(capsys, spoiled, tmp_path):
    arguments = "--case", "small/base", "--dtype", "float64", "--json", str(tmp_path / "run.json")
    code, out, _ = run(capsys, *arguments, "--dump", str(tmp_path))
    assert code == 1
    assert [line.split(":")[0] for line in out.splitlines()[-3:]] == ["WRONG", "how sure", "next"]
    assert "WRONG: vision.norm{g} (vision.norm of small/base" in out
    assert out.splitlines()[-1].startswith("next: vidi parity --case small/base --stage vision.norm")
    told = json.loads((tmp_path / "run.json").read_text())
    assert (told["verdict"], told["exit_code"], told["dtype"]) == ("different", 1, "float64")
    assert told["first_divergence"] == {"case": "small/base", "stage": "vision.norm"}
    assert told["findings"][0]["kind"] == "stage"
    assert {"date", "backend", "path"} <= set(told)
    (case,) = told["cases"]
    assert len(case["golden"]) == 64
    assert case["first_divergence"] == "vision.norm"
    stages = {row["stage"]: row for row in case["stages"]}
    assert stages["vision.projector"]["ok"]
    assert not stages["vision.norm"]["alone"]["ok"]
    assert stages["vision.space_to_depth"]["alone"]["ok"]
    assert stages["vision.norm"]["alone"]["ratio"] > 1
    assert told["fingerprint"]["libraries"]["torch"] == torch.__version__
    assert told["fingerprint"]["vidi"] == "0.1.0"
    assert told["fingerprint"]["commit"] == (evidence.commit(ROOT) if (ROOT / ".git").exists() else "unknown")


def test_a_stage_alone_is_compared_alone(capsys, spoiled):
    code, out, _ = run(capsys, "--case", "small/base", "--dtype", "float64", "--stage", "vision.projector")
    assert code == 0
    assert "1 stages of 1 cases" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--case", "nowhere"], "no case 'nowhere'"),
        (["--goldens", "{tmp}"], "no goldens in"),
        (["--goldens", "{tmp}/nowhere"], "no goldens in"),
        (["--case", "small/base", "--backend", "sdpa"], "softcap"),
        (["--case", "small/base", "--backend", "magic"], "unknown attention backend 'magic'"),
        (["--case", "small/base", "--device", "nowhere"], "nowhere"),
    ],
)
def test_unusable_is_2_with_the_reason_on_stderr_alone(capsys, tmp_path, arguments, said):
    code, out, err = run(capsys, *(a.format(tmp=tmp_path) for a in arguments))
    assert code == 2
    assert out == ""
    assert said in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_cases_are_chosen_by_name_set_or_pattern_and_add_up(capsys):
    arguments = ("--case", "small/one*", "--case", "small/no*", "--stage", "logits", "--chained", "--quiet")
    assert "3 stages of 3 cases" in run(capsys, *arguments)[1]
    assert "12 stages of 12 cases" in run(capsys, "--case", "small", "--stage", "logits", "--chained", "--quiet")[1]


def test_dtypes_have_the_short_names_of_every_command(capsys):
    assert (
        "in bfloat16 with" in run(capsys, "--case", "oneframe", "--stage", "logits", "--chained", "--dtype", "bf16")[1]
    )
    for command in ("parity", "faults"):
        with pytest.raises(SystemExit) as ended:
            main([command, "--dtype", "half"])
        assert ended.value.code == 2
        assert "choose float64, float32, bfloat16, float16 (bf16, fp16 for short)" in capsys.readouterr().err


def test_debug_shows_where_an_error_is_from(capsys, tmp_path):
    for command in ("parity", "faults"):
        words = [command, "--goldens", str(tmp_path)]
        assert main(words) == 2
        err = capsys.readouterr().err
        assert (
            err
            == f"vidi {command}: no goldens in {tmp_path}: give --goldens DIR with CASE.json files or sets of them\n"
        )
        assert main([*words, "--debug"]) == 2
        shown = capsys.readouterr().err
        assert "Traceback" in shown
        assert shown.endswith(err)


def test_what_the_model_raises_is_told_with_the_case(capsys, monkeypatch):
    from vidi.bridge import norm

    monkeypatch.delattr(norm, "EPS")
    code, out, err = run(capsys, "--case", "oneframe")
    assert (code, out) == (2, "")
    assert err.startswith("vidi parity: small/oneframe: the model ends in NameError: name 'EPS' is not defined; ")
    assert err.endswith("a fault of the model, or inputs that do not fit it: --debug shows where\n")


def test_json_to_a_pipe(capsys):
    code, out, err = run(capsys, "--case", "oneframe", "--stage", "logits", "--chained", "--json", "-")
    assert (code, json.loads(out)["verdict"]) == (0, "equal")
    assert "all equal" in err


def test_a_dump_of_two_cases_of_one_name_names_their_sets(capsys, tmp_path):
    goldens = tmp_path / "goldens"
    for folder in ("one", "two"):
        (goldens / folder).mkdir(parents=True)
        for name in ("oneframe.h5", "oneframe.json", "weights.safetensors"):
            (goldens / folder / name).write_bytes((GOLDENS / "small" / name).read_bytes())
    assert run(capsys, "--goldens", str(goldens), "--dump", str(tmp_path / "dump"))[0] == 0
    assert run(capsys, "--goldens", str(goldens), "--case", "two/oneframe", "--dump", str(tmp_path / "dump"))[0] == 0
    written = sorted(path.name for path in (tmp_path / "dump").iterdir())
    assert written == ["one-oneframe.safetensors", "oneframe.safetensors", "two-oneframe.safetensors"]


def test_a_model_without_cases_is_2(capsys):
    code, _, err = run(capsys, "--model", "7b", "--case", "official")
    assert code == 2
    assert "--model 7b: none of the" in err


def test_altered_goldens_are_2(capsys, tmp_path):
    for name in ("oneframe.h5", "oneframe.json", "weights.safetensors"):
        (tmp_path / name).write_bytes((GOLDENS / "small" / name).read_bytes())
    data = bytearray((tmp_path / "oneframe.h5").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "oneframe.h5").write_bytes(data)
    code, _, err = run(capsys, "--goldens", str(tmp_path))
    assert code == 2
    assert "oneframe.h5 is altered" in err


def test_nothing_compared_is_3(capsys):
    code, out, err = run(capsys, "--case", "small/base", "--stage", "no.such.stage")
    assert (code, out) == (2, "")
    assert "--stage 'no.such.stage' matches none of the" in err
    code, out, _ = run(capsys, "--case", "official/single", "--dtype", "float64")
    assert code == 3
    assert "nothing compared" in out
    assert "NOT RUN" in out


@pytest.mark.slow
def test_a_dump_holds_the_runs_own_tensors(capsys, tmp_path, spoiled):
    """Chained tensors of this run under the stage ids, not the goldens: a planted fault is in them."""
    code, out, _ = run(capsys, "--case", "small/base", "--dtype", "float64", "--dump", str(tmp_path / "dump"))
    assert code == 1
    size = (tmp_path / "dump" / "base.safetensors").stat().st_size
    assert f"{size / 1e6:,.1f} MB of tensors in {tmp_path / 'dump'}" in out
    path = tmp_path / "dump" / "base.safetensors"
    dumped = load_file(path)
    (tmp_path / "usual").touch()
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode  # what the umask says, no draft's 0600
    targets = store.open_case(GOLDENS / "small", "base").variant("none")
    assert set(targets) <= set(dumped)
    for stage in targets:
        assert tuple(dumped[stage].shape) == targets[stage].shape
    same = [s for s in targets if torch.equal(dumped[s], torch.from_numpy(targets[s].array))]
    assert "vision.mask" in same
    assert "logits" not in same
    off = (dumped["vision.norm"] - torch.from_numpy(targets["vision.norm"].array)).abs().max()
    assert off > 1e-8


def test_a_dump_of_decoding_holds_uncached_logits(capsys, tmp_path):
    assert run(capsys, "--case", "official/generate", "--dump", str(tmp_path))[0] == 0
    dumped = load_file(tmp_path / "generate.safetensors")
    case = store.open_case(GOLDENS / "official", "generate")
    assert {"generate", "generate_short", "generate_wide"} == {k.split(".")[0] for k in case.targets}
    for stage in case.targets:
        assert stage.endswith(".nocache.logits")
        golden = torch.from_numpy(case.targets[stage].array)
        assert (dumped[stage] - golden).abs().max() <= 1e-4 * golden.square().mean().sqrt()


def test_other_recordings_pass_unchanged(capsys, tmp_path):
    """A golden set somewhere else, by its folder: the embedded tolerances judge it."""
    for name in ("loss.h5", "loss.json", "weights.safetensors"):
        (tmp_path / name).write_bytes((GOLDENS / "official" / name).read_bytes())
    code, out, _ = run(capsys, "--goldens", str(tmp_path))
    assert code == 0
    assert "49 stages of 1 cases" in out


def test_weights_that_do_not_fit_are_2(capsys, tmp_path):
    """The manifest is the judge of the weights' content; a file that was swapped is named."""
    for name in ("oneframe.h5", "oneframe.json"):
        (tmp_path / name).write_bytes((GOLDENS / "small" / name).read_bytes())
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    code, _, err = run(capsys, "--goldens", str(tmp_path))
    assert code == 2
    assert "weights" in err


# ---- vidi itself ----------------------------------------------------------------------------------------------------


def test_help_is_quick_and_loads_no_torch():
    code = (
        "import sys; from vidi.cli import main\ntry: main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    )
    seconds, done = quickest([sys.executable, "-c", code])
    assert done.stdout.rstrip().endswith("False")
    for command in COMMANDS:
        assert command in done.stdout
    assert seconds < 0.3


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert "usage: vidi " + command in capsys.readouterr().out


def test_an_unknown_command_is_2(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["paint"])
    assert ended.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


def test_the_installed_command_is_this_one():
    script = Path(sys.executable).with_name("vidi")
    assert script.exists(), "the package is not installed beside this interpreter"
    done = subprocess.run([str(script), "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0.1.0"
