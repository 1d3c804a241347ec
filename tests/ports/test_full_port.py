"""Ports of the full-size case at tiny size, traced as sketches: equal as they are; of a wrong one its first stage is named."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from stageparity.port.candidate import Unusable
from stageparity.port.stagetrace import read_tensors, write_tensors
from tests.ports import large
from tests.ports.doctor import Examined, examine
from tests.ports.large import CASE, Small
from tests.ports.planted import Planted
from vidi import cli
from vidi.commands.candidate import judged

HERE, PYTHON = Path(__file__).parent, Path(sys.executable)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return large.make(tmp_path_factory.mktemp("large"))


def examined(
    port: str, at: Path, small: Small, *more: str, fault: Planted | None = None, checkpoint: bool = True
) -> Examined:
    given = ["--goldens", str(small.goldens), *(["--checkpoint", str(small.checkpoint)] if checkpoint else [])]
    return examine(HERE / port, at, PYTHON, [CASE], *given, *more, fault=fault)


def planted(bug: str, guilty: dict[str, str]) -> Planted:
    return Planted("", (("adapter.py", "def plant(model):\n    pass\n", f"def plant(model):\n{bug}"),), guilty)


NORM = planted(
    "    norm = model.bridge.image_norm.forward\n    model.bridge.image_norm.forward = lambda x: norm(x) * 1.1\n",
    {"vision.norm{g}": "stage"},
)
#: of both kinds of tensors that are kept: sketches of the streams, whole ones of the text
LAYER = planted(
    "    layer = model.decoder.layers[2]\n    cross = layer.text_to_stream\n"
    "    layer.text_to_stream = lambda *a, **k: cross(*a, **k) * 1.2\n",
    {"layer.{i}.t2{m}": "stage"},
)
#: a stage that only raw inputs feed, beside one of another path
TOWER = planted(
    "    tower, norm = model.vision_tower.forward, model.bridge.audio_norm.forward\n"
    "    model.vision_tower.forward = lambda *a, **k: tower(*a, **k) * 1.1\n"
    "    model.bridge.audio_norm.forward = lambda x: norm(x) * 1.1\n",
    {"vision.tower": "stage", "audio.norm": "stage"},
)
FIRST = {"norm": (NORM, "vision.norm"), "layer": (LAYER, "layer.2.t2v"), "tower": (TOWER, "vision.tower")}


@pytest.mark.slow
def test_a_port_is_equal_by_sketches_and_what_is_kept_of_it_is_small(small: Small, tmp_path: Path) -> None:
    seen = examined("full_port", tmp_path, small, "--require", "all", "--html", str(tmp_path / "page.html"))
    assert seen.status == 0
    (case,) = seen.report["cases"]
    assert [note.partition(":")[0] for note in case["notes"]] == ["chained only"]
    assert "chained only: the goldens are sketches" in (tmp_path / "page.html").read_text()
    assert {row["chained"]["rule"] for row in case["stages"]} == {"bfloat16-self", "exact"}
    assert all(row["forced"] is None for row in case["stages"])
    dump = tmp_path / "trace" / "full-frames60"
    assert {path.name for path in dump.iterdir()} == {"case", "chained.safetensors", "trace.json"}
    assert {path.name for path in (dump / "case").iterdir()} == {"case.json", "inputs.safetensors"}
    kept = read_tensors(str(dump / "chained.safetensors"))
    assert "layer.0.image_stream/blocks" in kept
    assert "layer.0.image_stream" not in kept
    _stale_dumps_are_refused(dump, small)


def _stale_dumps_are_refused(dump: Path, small: Small) -> None:
    said = json.loads((dump / "trace.json").read_text())
    for change, words in (
        ({"sketch": {**said["sketch"], "seed": 1}}, "sketched with seed 1, the golden has 0: trace again"),
        ({"sketch": {**said["sketch"], "version": 2}}, "sketched with version 2, the golden has 1: trace again"),
        ({"sketch": []}, "does not say by which rule"),
        ({"golden": "0" * 64}, "made for another golden of full/frames60"),
        ({"dtype": "float32"}, "known of bfloat16 alone"),
    ):
        (dump / "trace.json").write_text(json.dumps({**said, **change}))
        with pytest.raises(ValueError, match=words):
            judged([dump], small.goldens)
    (dump / "trace.json").write_text(json.dumps(said))
    tensors = read_tensors(str(dump / "chained.safetensors"))
    del tensors["layer.0.image_stream/blocks"]
    write_tensors(str(dump / "chained.safetensors"), tensors)
    with pytest.raises(Unusable, match=r"layer\.0\.image_stream: its sketch has no blocks"):
        judged([dump], small.goldens)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST)
def test_the_first_wrong_stage_is_named(name: str, small: Small, tmp_path: Path) -> None:
    fault, stage = FIRST[name]
    seen = examined("full_port", tmp_path, small, fault=fault)
    assert seen.status == 1
    assert seen.guilty == dict(fault.guilty)
    assert seen.kinds == {"stage", "chained"}
    assert seen.report["first_divergence"] == {"case": CASE, "stage": stage}
    assert "its own error: in this run what feeds it is equal" in seen.report["headline"]


@pytest.mark.slow
def test_a_port_in_pieces_with_weights_under_its_own_names(small: Small, tmp_path: Path) -> None:
    """Frames four at a time, aliases; in float32, which errs less than the budget knows. Then a stage that it does not trace is
    wrong, beside another path: the next that it traces is named, with what lies between."""
    seen = examined("hf_port", tmp_path / "right", small, "--require", "all")
    assert seen.status == 0
    wrong = Planted(
        "",
        (
            ("model.py", 'tap("vision.pos_h.embed", ', "(lambda x: x.flip(1))("),
            ("model.py", "self.mm_rand_aud_projector(x)", "self.mm_rand_aud_projector(x * 1.1)"),
        ),
        {"vision.pos_h{g}": "stage", "audio.projector": "stage"},
    )
    seen = examined("hf_port", tmp_path / "wrong", small, fault=wrong)
    assert seen.guilty == dict(wrong.guilty)
    assert "or that of vision.pos_h.embed" in seen.report["headline"]
    assert seen.report["first_divergence"]["stage"] == "vision.pos_h"


@pytest.mark.slow
def test_what_cannot_be_used_is_said_in_a_line(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(HERE / "full_port", tmp_path / "port", ignore=shutil.ignore_patterns("__pycache__"))
    run = ["port", "run", str(tmp_path / "port" / "adapter.py"), "--case"]
    given, weights = ["--goldens", str(small.goldens)], ["--checkpoint", str(small.checkpoint)]
    for words, said in (
        ([*run, CASE, *given, *weights, "--dtype", "float32"], "is known of bfloat16 alone: --dtype bfloat16"),
        ([*run, CASE, *weights], "not the weights of full/frames60"),
        ([*run, CASE, *given, "--checkpoint", str(tmp_path)], "no config.json"),
        ([*run, "official/single", *weights], "has weights of its own; leave it out"),
        ([*run, CASE, *given, *weights, "--capsule", str(tmp_path / "c")], "no capsule is made of sketches"),
        ([*run, "full/frames61", *given], "no case 'full/frames61'"),
    ):
        assert cli.main(words) == 2, words
        error = capsys.readouterr().err
        assert said in error, error
        assert error.count("\n") == 1
    seen = examined("full_port", tmp_path / "none", small, checkpoint=False)
    assert seen.status == 2
    assert "`vidi synth CHECKPOINT --size full` makes them (21 GB)" in capsys.readouterr().err


def test_init_says_where_weights_come_from(small: Small, tmp_path: Path) -> None:
    assert cli.main(["port", "init", CASE, str(tmp_path / "p"), "--goldens", str(small.goldens)]) == 0
    assert {path.name for path in (tmp_path / "p" / "case").iterdir()} == {"case.json", "inputs.safetensors"}
    assert "vidi synth CHECKPOINT --size full" in (tmp_path / "p" / "README.md").read_text()
    assert "images_u8.0" in (tmp_path / "p" / "adapter.py").read_text()
    said = json.loads((tmp_path / "p" / "case" / "case.json").read_text())
    assert (said["case"], said["dtype"], said["weights"]["folder"]) == (CASE, "bfloat16", None)
