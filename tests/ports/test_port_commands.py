"""`vidi port`: from a port to the guilty stage, through a real interpreter; capsules, circumstances, declared budgets."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stageparity.port.declared import load
from vidi import cli

OURS = Path(__file__).with_name("ours.py")


@pytest.fixture
def port(tmp_path: Path) -> Path:
    """The folder of an adapter over our own model, begun by `vidi port init`."""
    folder = tmp_path / "port"
    assert cli.main(["port", "init", "official/single", str(folder)]) == 0
    shutil.copyfile(OURS, folder / "adapter.py")
    return folder


def plant(folder: Path, bug: str) -> None:
    text = OURS.read_text()
    (folder / "adapter.py").write_text(text.replace("def plant(model):\n    pass\n", f"def plant(model):\n{bug}"))


def run(folder: Path, *options: str) -> int:
    return cli.main(["port", "run", str(folder / "adapter.py"), "--no-environment", *options])


def test_init_begins_what_a_user_fills_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["port", "init", "official/single", str(tmp_path / "p")]) == 0
    names = {path.name for path in (tmp_path / "p").iterdir()}
    assert names == {"adapter.py", "candidate.toml", "README.md", "stagetrace.py", "case"}
    (tmp_path / "p" / "adapter.py").write_text("# mine")
    assert cli.main(["port", "init", "official/single", str(tmp_path / "p")]) == 0
    assert (tmp_path / "p" / "adapter.py").read_text() == "# mine", "what is there already stays"
    capsys.readouterr()
    assert cli.main(["port", "init", "official/none", str(tmp_path / "q")]) == 2
    assert not (tmp_path / "q").exists()


def test_what_is_no_tracer_and_no_case_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "p"
    tracer, words = folder / "stagetrace.py", ["port", "init", "official/single", str(folder)]
    (folder / "case").mkdir(parents=True)
    (folder / "case" / "weights.safetensors").write_text("mine")
    assert cli.main(words) == 2
    (folder / "case" / "weights.safetensors").unlink()
    tracer.write_bytes(b"mine \xff")
    assert cli.main(words) == 2
    (folder / "adapter.py").write_text("")
    assert run(folder, "--case", "official/single") == 2
    assert tracer.read_bytes() == b"mine \xff"
    assert not (folder / "trace").exists()
    (folder / "trace" / "official-single" / "case").mkdir(parents=True)
    (folder / "trace" / "official-single" / "case" / "mine").write_text("")
    tracer.unlink()
    assert run(folder, "--case", "official/single") == 2
    shutil.rmtree(folder / "trace")
    os.mkfifo(tracer)  # reading one would wait for ever
    assert run(folder, "--case", "official/single") == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(str(folder))[2].partition(" ")[0] for line in said] == [
        "/case",
        *["/stagetrace.py"] * 2,
        "/trace/official-single/case",
        "/stagetrace.py:",
    ]
    assert not list((folder / "case").iterdir())


def test_an_adapter_not_filled_in_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["port", "init", "official/single", str(tmp_path / "p")])
    assert run(tmp_path / "p") == 2
    assert "build: return your model with these weights" in capsys.readouterr().err


@pytest.mark.slow
def test_a_right_port_is_equal_as_far_as_seen(port: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(port) == 0
    out = capsys.readouterr().out
    assert "equal as far as seen: 25 of 94 stages; never reached: padding, varlen" in out
    assert run(port, "--require", "all", "--quiet") == 4


@pytest.mark.slow
def test_two_bugs_are_both_named_and_the_rest_inherits(
    port: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(
        port,
        "    norm, cross = model.bridge.image_norm.forward, model.decoder.layers[2].text_to_stream\n"
        "    model.bridge.image_norm.forward = lambda x: norm(x) * 1.01\n"
        "    model.decoder.layers[2].text_to_stream = lambda *a, **k: cross(*a, **k) * 1.02\n",
    )
    page, data, capsule = tmp_path / "page.html", tmp_path / "out.json", tmp_path / "capsule"
    assert run(port, "--json", str(data), "--html", str(page), "--capsule", str(capsule)) == 1
    out = capsys.readouterr().out.splitlines()
    assert (
        "WRONG: vision.norm{g} (vision.norm of official/single): 1.8e3× its budget, its own error (inputs equal)."
        in "".join(out[:2])
    )
    found = json.loads(data.read_text())
    assert [(f["stage"], f["kind"]) for f in found["findings"]] == [
        ("vision.norm{g}", "stage"),
        ("layer.{i}.t2{m}", "stage"),
    ]
    assert {row["kind"] for row in found["cases"][0]["stages"]} == {None, "stage", "inherited"}
    assert found["headline"] in out
    assert found["headline"].split(":")[1].strip()[:20] in page.read_text()
    _check_capsule(capsule)


def _check_capsule(folder: Path) -> None:
    """Its check runs where there is neither torch nor anything of ours, and can say both."""
    said = json.loads((folder / "capsule.json").read_text())
    assert (said["stage"], said["kind"], said["case"]) == ("vision.norm", "stage", "official/single")
    blocked = (
        "import sys, runpy\n"
        "class Only:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        root = name.partition('.')[0]\n"
        "        if root != 'numpy' and root not in sys.stdlib_module_names: raise ImportError(name)\n"
        "sys.meta_path.insert(0, Only())\n"
        "import numpy as np\n"
        "held = np.load('capsule.npz')\n"
        "assert {'input:vision.projector', 'weight:model.mm_rand_img_norm.weight'} < set(held.files), held.files\n"
        "np.save('golden.npy', held['golden'])\n"
        "np.save('other.npy', held['golden'][:1])\n"
        "sys.argv = ['check.py', *sys.argv[1:]]\n"
        "runpy.run_path('check.py', run_name='__main__')\n"
    )
    for given, status, words in (
        ((), 1, "vision.norm DIFFERENT"),
        (("golden.npy",), 0, "equal"),
        (("other.npy",), 1, "shape"),
    ):
        done = subprocess.run([sys.executable, "-I", "-c", blocked, *given], cwd=folder, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        assert words in done.stdout + done.stderr


@pytest.mark.slow
def test_what_lies_between_traced_stages_convicts_the_next(port: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The streams are scaled by the same function as the text, and the adapter does not trace them: what reads them is named."""
    plant(port, "    scaled = model.decoder.scaled\n    model.decoder.scaled = lambda x: scaled(x) / 8\n")
    assert run(port, "--quiet") == 1
    out = capsys.readouterr().out
    assert "WRONG: layer.0.input (layer.0.input of official/single)" in out
    assert "Also wrong by themselves: layer.{i}.t2{m}." in out
    assert "the same tensors as known fault `text.factor_omitted`" in out


@pytest.mark.slow
def test_a_crash_is_the_ports(port: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(
        port,
        "    def broken(*a, **k): raise RuntimeError('no kernel')\n    model.decoder.layers[1].text_to_stream = broken\n",
    )
    assert run(port) == 1
    err = capsys.readouterr().err
    assert "the port's own: its chained run ended, after stage layer.1.t2t: RuntimeError: no kernel" in err


@pytest.mark.slow
def test_a_port_that_is_not_built_is_no_different_one(port: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1 is a verdict on a model; here there was none to judge."""
    text = OURS.read_text().replace("def plant(model):\n    pass\n", "def plant(model):\n{}\n")
    (port / "adapter.py").write_text(text.replace("{}", "    raise MemoryError('20 GB')"))
    assert run(port) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("FAILED official/single: the port's own: its build ended: MemoryError: 20 GB")
    # Beside a case that it is built for, both are told: equal where it ran is not equal.
    (port / "adapter.py").write_text(
        text.replace("{}", "    import sys\n    if 'batch' in sys.argv[2]: raise MemoryError('20 GB')")
    )
    assert run(port, "--case", "official/single", "--case", "official/batch", "--quiet") == 2
    out = capsys.readouterr().out
    assert "equal as far as seen: 25 of 94 stages" in out
    assert "FAILED official/batch: the port's own: its build ended" in out


@pytest.mark.slow
def test_a_stage_of_a_case_that_was_not_built_is_no_mistake(port: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The pattern is right, and what has that stage never ran: nothing was judged, and why is said."""
    text = "    import sys\n    if 'loss' in sys.argv[2]: raise MemoryError('20 GB')\n"
    plant(port, text)
    assert run(port, "--case", "official/single", "--case", "official/loss", "--stage", "loss.*", "--quiet") == 2
    out, err = capsys.readouterr()
    assert "FAILED official/loss: the port's own: its build ended: MemoryError: 20 GB" in out + err
    assert "did you mean" not in out + err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--python", "/no/such/python"), "/no/such/python: No such file or directory; --python names"),
        (("--case", "official/none"), "no case 'official/none'"),
        (("--json", "/no/such/folder/x.json"), "there is no folder"),
        (("--timeout", "0"), "a whole number"),
    ],
)
def test_bad_options(options: tuple[str, ...], words: str, port: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = run(port, *options)
    except SystemExit as stop:
        status = stop.code  # type: ignore[assignment]
    assert status == 2
    assert words in capsys.readouterr().err


def test_a_pattern_that_matches_no_stage_costs_no_run(port: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(port, "--stage", "logitz") == 2
    assert "did you mean logits?" in capsys.readouterr().err
    assert not (port / "trace").exists()


def test_cases_of_two_dtypes_cost_no_run(port: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(port, "--case", "official/single", "--case", "full/frames60") == 2
    assert "judged in bfloat16 and float32" in capsys.readouterr().err
    assert not (port / "trace").exists()


@pytest.mark.slow
def test_an_unknown_adapter_and_a_timeout(port: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["port", "run", str(port / "none.py")]) == 2
    plant(port, "    import time; time.sleep(60)\n")
    assert run(port, "--timeout", "4") == 1
    assert "did not end within 4 seconds" in capsys.readouterr().err


@pytest.mark.slow
def test_what_is_no_interpreter_is_no_port(port: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(port, "--python", "true") == 2
    assert "true: left no trace.json; is it a Python interpreter?" in capsys.readouterr().err


@pytest.mark.slow
def test_code_and_not_the_environment(port: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(
        port,
        "    layer = model.decoder.layers[0]\n    attend = layer.text_to_text\n"
        "    layer.text_to_text = lambda n, *a, **k: attend(n * 1.01, *a, **k)\n",
    )
    assert cli.main(["port", "run", str(port / "adapter.py"), "--quiet"]) == 1
    assert "how sure: code: it stays whatever it runs on; in float64 " in capsys.readouterr().out


@pytest.mark.slow
def test_the_environment_and_not_the_code(port: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A switch that a library has: with it off the stage is right."""
    plant(
        port,
        "    norm = model.bridge.image_norm.forward\n"
        "    reduced = lambda: torch.get_float32_matmul_precision() != 'highest'\n"
        "    model.bridge.image_norm.forward = lambda x: norm(x).bfloat16().to(x.dtype) if reduced() else norm(x)\n",
    )
    with open(port / "adapter.py", "a") as adapter:
        adapter.write("\ntorch.set_float32_matmul_precision('medium')\n")  # what the tracer has to switch off
    assert cli.main(["port", "run", str(port / "adapter.py"), "--quiet"]) == 1
    out = capsys.readouterr().out
    assert "how sure: environment: with reduced precision and fused kernels off it is right" in out


# ---- declared budgets -------------------------------------------------------------------------------------------------------

WIDE = '[[group]]\nstages = "vision.*, layer.*, logits"\nrms = 0.05\nmax = 1\nreason = "weights in 8 bits"\n'


@pytest.mark.slow
def test_a_declared_budget_is_wide_and_says_what_it_costs(
    port: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(
        port,
        "    norm = model.bridge.image_norm.forward\n    model.bridge.image_norm.forward = lambda x: norm(x) * 1.01\n",
    )
    budget = tmp_path / "budget.toml"
    budget.write_text(WIDE)
    assert run(port, "--quiet", "--budget", str(budget)) == 0
    out = capsys.readouterr().out
    assert "within the declared budget, as far as seen" in out
    assert "error along the depth, layer.{i}.output: layer.0.output" in out
    assert "best tokens change" in out
    budget.write_text(WIDE.replace("0.05", "0.001"))
    assert run(port, "--quiet", "--budget", str(budget)) == 1
    assert "budget declared: weights in 8 bits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "[[group]] tables are needed"),
        (WIDE.replace("reason", "why"), "unknown key why"),
        (WIDE.replace('"weights in 8 bits"', '" "'), "reason is needed"),
        (WIDE.replace("0.05", "-1"), "above 0"),
        (WIDE.replace("0.05", "true"), "above 0"),
        ('[[group]]\nstages = "*"\nreason = "x"\n', "rms or max is needed"),
        (WIDE + "chained = 0.1\n", "chained = 0.1 must be a table of rms and max"),
        (WIDE + "chained = {row = 0.1}\n", "must be a table of rms and max"),
        (WIDE + "chained = {rms = 0}\n", "above 0"),
    ],
)
def test_declarations_that_are_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "budget.toml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)):
        load(tmp_path / "budget.toml", None)  # type: ignore[arg-type]


def test_masks_and_ids_have_no_declared_budget(port: Path, tmp_path: Path) -> None:
    """Exact stages stay exact, whatever is declared."""
    from stageparity import tolerance
    from vidi.parity.goldens import goldens_dir
    from vidi.parity.port import load_table

    (tmp_path / "budget.toml").write_text(WIDE.replace("vision.*, layer.*, logits", "*"))
    declared = load(tmp_path / "budget.toml", tolerance.load(goldens_dir(), load_table().stages))
    assert declared.rule("float32-recorded", "vision.mask").name == "exact"
    assert declared.rule("float32-recorded", "logits").name == "declared"


def test_what_a_stage_adds_and_what_it_inherits_are_declared_apart(tmp_path: Path) -> None:
    from stageparity import tolerance
    from vidi.parity.goldens import goldens_dir
    from vidi.parity.port import load_table

    norm = '[[group]]\nstages = "vision.norm"\nchained = {rms = 0.01}\nreason = "no weight of its own in 8 bits"\n'
    (tmp_path / "budget.toml").write_text(norm + WIDE + "chained = {rms = 0.2, max = 2}\n")
    declared = load(tmp_path / "budget.toml", tolerance.load(goldens_dir(), load_table().stages))

    def rule(stage: str, kind: str) -> tuple[str, float | None, float | None]:
        found = declared.rule("float32-recorded", stage, "official/single", kind=kind)
        return found.name, found.rms, found.max

    assert rule("logits", "isolated") == ("declared", 0.05, 1)
    assert rule("logits", "chained") == ("declared", 0.2, 2)
    assert rule("vision.norm", "chained") == ("declared", 0.01, None)
    assert rule("vision.norm", "isolated")[0] == "float32-recorded"
