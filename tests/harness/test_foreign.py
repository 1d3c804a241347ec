"""Recordings of other sizes, imported and judged through the command line as a newcomer would."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stageparity import store
from stageparity.golden import Sampled
from tests.harness import foreign
from tools import import_official
from vidi import cli
from vidi.bridge import fold, position
from vidi.decoder.decoder import Decoder
from vidi.parity import feed


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    foreign.record(folder / "recordings")
    assert import_official.main([str(folder / "recordings"), str(folder / "set")]) == 0
    return folder / "set"


def parity(goldens: Path, tmp_path: Path, *arguments: str) -> tuple[int, dict]:
    """Exit code of `vidi parity` on the imported set, and its JSON."""
    file = tmp_path / "run.json"
    code = cli.main(["parity", "--goldens", str(goldens), "--quiet", "--json", str(file), *arguments])
    return code, json.loads(file.read_text()) if file.exists() else {}


def test_what_was_imported(imported: Path) -> None:
    cases = {ref.name: store.open_case(ref.folder, ref.name) for ref in store.list_cases(imported)}
    assert sorted(cases) == ["cost", "pair", "tell"]
    assert any(isinstance(golden, Sampled) for golden in cases["pair"].targets.values())
    assert len(cases["pair"].targets) > 100
    assert list(cases["tell"].targets) == ["tell.nocache.logits"]
    assert not [stage for stage in cases["cost"].targets if stage.startswith("grad.")]


def test_the_model_equals_them(imported: Path, tmp_path: Path) -> None:
    code, found = parity(imported, tmp_path)
    assert code == 0
    assert {case["case"]: len(case["stages"]) > 0 for case in found["cases"]} == dict.fromkeys(
        ("cost", "pair", "tell"), True
    )
    assert not any(case["not_run"] for case in found["cases"])


@pytest.mark.parametrize(("image_pool", "audio_pool"), [(2, 5), (3, 4), (4, 3), (5, 2)])
def test_a_7b_of_other_sizes_equals_them(image_pool: int, audio_pool: int, tmp_path: Path) -> None:
    foreign.record_7b(tmp_path / "recordings", image_pool, audio_pool)
    assert import_official.main([str(tmp_path / "recordings"), str(tmp_path / "set")]) == 0
    code, found = parity(tmp_path / "set", tmp_path)
    assert code == 0
    (case,) = found["cases"]
    assert len(case["stages"]) > 100
    assert not case["not_run"]


def test_a_wrong_fold_is_seen_at_the_fold(
    imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = fold.space_to_depth
    monkeypatch.setattr(fold, "space_to_depth", lambda x, pool: plain(x.transpose(2, 3), pool).transpose(2, 3))
    code, found = parity(imported, tmp_path, "--case", "pair")
    assert code == 1
    assert found["cases"][0]["first_divergence"] == "vision.space_to_depth"
    assert "WRONG: vision.space_to_depth{g} (vision.space_to_depth of " in capsys.readouterr().out


def test_a_wrong_factor_is_seen_in_decoding_and_loss(
    imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Decoder, "scaled", lambda self, x: x * (torch.tensor(31.9).sqrt()))
    for case, stage in (("tell", "tell.nocache.logits"), ("cost", "logits")):
        code, found = parity(imported, tmp_path, "--case", case)
        assert (code, found["cases"][0]["first_divergence"]) == (1, stage)


def test_a_half_precision_recording_judges_nothing_directly(imported: Path, tmp_path: Path) -> None:
    """Its own noise is as large as a run's; what cannot be judged is said, and counts as nothing compared."""
    recordings = imported.parent / "recordings"
    half = tmp_path / "half"
    half.mkdir()
    for suffix in ("json", "safetensors"):
        (half / f"cost.bf16.{suffix}").write_bytes((recordings / f"cost.f32.{suffix}").read_bytes())
    (half / "weights.safetensors").write_bytes((recordings / "weights.safetensors").read_bytes())
    assert import_official.main([str(half), str(tmp_path / "set")]) == 0
    for dtype in ("bfloat16", "float32"):
        code, found = parity(tmp_path / "set", tmp_path, "--dtype", dtype)
        assert code == 3
        assert "noise of its own" in found["cases"][0]["not_run"][0]["reason"]


def test_on_a_machine_with_another_exp_their_own_table_is_used(
    imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for `tell`, which holds no table of its own, at a width that has no embedded one."""
    right = feed.machine_table

    def off(width: int) -> torch.Tensor:
        table = right(width).clone()
        table[1] = torch.nextafter(table[1], torch.tensor(2.0))
        return table

    monkeypatch.setattr(position, "frequencies", off)
    monkeypatch.setattr(feed, "machine_table", off)
    code, found = parity(imported, tmp_path)
    assert code == 0
    assert [case["case"] for case in found["cases"] if case["notes"]] == ["pair"]
