"""Goldens that changed in any way are noticed, and the message names the tensor and says what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from stageparity import store
from stageparity.golden import GoldenError, Sampled, Sketched, Whole
from stageparity.manifest import content_sha256, parse
from tests.harness.golden_set import make_set, rebless, rewrite_tensor
from vidi.parity.goldens import inputs_of
from vidi.parity.stages import STAGES, expected

GOLDENS = Path(__file__).resolve().parents[2] / "goldens"
HINT = "restore it (git checkout -- {0}) or import / regenerate its case"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_set(tmp_path / "set")


def _refused(folder: Path, text: str) -> None:
    with pytest.raises(GoldenError) as caught:
        store.verify(folder)
    assert str(caught.value) == text


def test_a_case_is_found_by_its_own_name_whatever_patterns_it_holds(tmp_path: Path) -> None:
    for name in ("a[b]", "ab", "b"):
        for suffix in ("json", "h5"):
            (tmp_path / f"{name}.{suffix}").touch()
    assert [ref.name for ref in store.select(tmp_path, ["a[b]"])] == ["a[b]", "ab"]
    assert [ref.name for ref in store.select(tmp_path, ["a*"])] == ["a[b]", "ab"]


def test_every_form_comes_back(folder: Path) -> None:
    case = store.open_case(folder, "tiny")
    assert set(case.targets) == {
        "vision.llm_norm", "text.embeds", "text.mask", "layer.0.input", "layer.0.image_stream",
    }  # fmt: skip
    assert isinstance(case.targets["text.embeds"], Whole)
    assert isinstance(case.targets["layer.0.image_stream"], Sampled)
    assert isinstance(case.targets["vision.llm_norm"], Sketched)
    assert case.targets["text.mask"].array.dtype == bool
    np.testing.assert_array_equal(inputs_of(case)["inputs.images.0"], np.full((1, 3, 2, 2), -1, np.float32))
    assert store.verify(folder) == 2 + 1 + 5


def test_equal_tensors_are_stored_once(folder: Path) -> None:
    with h5py.File(folder / "tiny.h5") as file:
        assert file["none/text.embeds"] == file["none/layer.0.input"]


def test_one_value_changed(folder: Path) -> None:
    rewrite_tensor(folder, "none/text.mask", lambda x: ~x)
    _refused(folder, f"tiny: none/text.mask is altered, its content hash does not match: {HINT.format('tiny.h5')}")


def test_one_value_by_one_ulp(folder: Path) -> None:
    def nudge(x: np.ndarray) -> np.ndarray:
        x[0, 2, 1] = np.nextafter(x[0, 2, 1], np.float32(9))
        return x

    rewrite_tensor(folder, "none/layer.0.image_stream/sample", nudge)
    place = "none/layer.0.image_stream/sample"
    _refused(folder, f"tiny: {place} is altered, its content hash does not match: {HINT.format('tiny.h5')}")


def test_a_nan(folder: Path) -> None:
    def spoil(x: np.ndarray) -> np.ndarray:
        x[0, 1, 2] = np.nan
        return x

    rewrite_tensor(folder, "none/text.embeds", spoil)
    _refused(folder, f"tiny: none/text.embeds holds NaN or Inf, first at [0, 1, 2]: {HINT.format('tiny.h5')}")


def test_dtype_changed(folder: Path) -> None:
    rewrite_tensor(folder, "none/text.embeds", lambda x: x.astype(np.float32))
    said = "is float32 [1, 3, 4], not float64 [1, 3, 4]"
    _refused(folder, f"tiny: none/text.embeds {said}: {HINT.format('tiny.h5')}")


def test_a_row_fewer(folder: Path) -> None:
    rewrite_tensor(folder, "none/text.embeds", lambda x: x[:, :2])
    said = "is float64 [1, 2, 4], not float64 [1, 3, 4]"
    _refused(folder, f"tiny: none/text.embeds {said}: {HINT.format('tiny.h5')}")


def test_key_missing_and_extra(folder: Path) -> None:
    with h5py.File(folder / "tiny.h5", "r+") as file:
        file.move("none/text.mask", "none/text.mesk")
    rebless(folder)
    _refused(folder, f"tiny: none/text.mask missing from tiny.h5: {HINT.format('tiny.h5')}")
    with h5py.File(folder / "tiny.h5", "r+") as file:
        file["none/text.mask"] = file["none/text.mesk"]
    rebless(folder)
    _refused(folder, f"tiny: none/text.mesk not in the manifest of tiny.h5: {HINT.format('tiny.h5')}")


def test_data_file_byte_changed_truncated_or_gone(folder: Path) -> None:
    path = folder / "tiny.h5"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    _refused(folder, f"tiny: data file tiny.h5 is altered: {HINT.format('tiny.h5')}")
    path.write_bytes(raw[:-1])
    said = f"data file tiny.h5 is truncated ({len(raw) - 1} of {len(raw)} bytes)"
    _refused(folder, f"tiny: {said}: {HINT.format('tiny.h5')}")
    path.unlink()
    _refused(folder, f"tiny: data file tiny.h5 is missing: {HINT.format('tiny.h5')}")


def test_any_manifest_byte_changed(folder: Path) -> None:
    path = folder / "tiny.json"
    raw = path.read_bytes()
    for at in range(0, len(raw), 7):
        changed = bytearray(raw)
        changed[at] ^= 1
        path.write_bytes(changed)
        with pytest.raises(GoldenError, match=r"manifest is (altered|not readable JSON|of another)|manifest format"):
            parse(path)
    path.write_bytes(raw.replace(b'"text.mask"', b'"text.mesk"'))
    _refused(folder, f"{path}: manifest is altered, its own sha256 does not match: {HINT.format('tiny.json')}")
    path.write_bytes(raw[:-40])
    _refused(folder, f"{path}: manifest is not readable JSON (truncated or altered): {HINT.format('tiny.json')}")


def test_the_command_that_is_printed_runs_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "$(touch x).json").write_text("{}")
    with pytest.raises(GoldenError, match=r"git checkout -- '\$\(touch x\).json'"):
        parse(tmp_path / "$(touch x).json")


def test_orphans(folder: Path) -> None:
    (folder / "other.h5").write_bytes(b"")
    _refused(folder, "other.h5: orphaned, no manifest other.json: delete it or restore the manifest")
    (folder / "other.h5").unlink()
    (folder / "spare.safetensors").write_bytes(b"")
    _refused(folder, "spare.safetensors: orphaned, no case uses these weights: delete it or restore its case")


def test_weights_changed(folder: Path) -> None:
    path = folder / "weights.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    _refused(folder, f"tiny: weights file weights.safetensors is altered: {HINT.format('weights.safetensors')}")
    path.unlink()
    _refused(folder, f"tiny: weights file weights.safetensors is missing: {HINT.format('weights.safetensors')}")


def test_a_weights_path_cannot_leave_the_set(folder: Path) -> None:
    (folder.parent / "out.safetensors").write_bytes((folder / "weights.safetensors").read_bytes())
    entry = parse(folder / "tiny.json")["weights"] | {"file": "../out.safetensors"}
    rebless(folder, weights=entry)
    with pytest.raises(GoldenError, match=r"weights file \.\./out\.safetensors is missing"):
        store.open_case(folder, "tiny").weights()


def test_provenance_says_where_numbers_come_from(folder: Path) -> None:
    full = parse(folder / "tiny.json")["provenance"]
    rebless(folder, provenance={key: value for key, value in full.items() if key not in ("origin", "commit")})
    origins = "origins are official, oracle, self: write it with its tool"
    _refused(folder, f"tiny: provenance lacks origin, commit; {origins}")
    rebless(folder, provenance=full | {"origin": "a guess"})
    _refused(folder, f"tiny: provenance has origin 'a guess'; {origins}")


def test_every_set_is_found_broken_or_whole(tmp_path: Path) -> None:
    make_set(tmp_path / "small")
    make_set(tmp_path / "large" / "full")
    make_set(tmp_path / ".small.partial-1-abcdefgh")
    (tmp_path / "oracle").mkdir()
    (tmp_path / "large" / "full" / "tiny.h5").unlink()
    assert store.list_sets(tmp_path) == [tmp_path / "large" / "full", tmp_path / "small"]
    with pytest.raises(GoldenError, match=r"data file tiny\.h5 is missing"):
        store.verify(tmp_path / "large" / "full")


def test_hash_covers_dtype_shape_and_content() -> None:
    x = np.arange(6, dtype=np.float32)
    same = {content_sha256(x), content_sha256(x.astype(">f4")), content_sha256(x.copy()[::1])}
    assert len(same) == 1
    others = [x.reshape(2, 3), x.astype(np.float64), x.view(np.int32), x + 1]
    assert len({content_sha256(o) for o in others} | same) == 5


def test_writer_refuses_what_is_no_golden(tmp_path: Path) -> None:
    from stageparity.golden import whole
    from stageparity.writer import NewCase, write_case

    for array, said in ((np.array([np.inf]), "NaN or Inf"), (np.zeros((0, 2)), "empty")):
        case = NewCase("bad", {}, {}, {}, {"none": {"logits": whole(array)}}, {})
        with pytest.raises(GoldenError, match=said):
            write_case(tmp_path, case)


def test_the_goldens_in_the_repository_are_many_and_small() -> None:
    sets = store.list_sets(GOLDENS)
    assert [folder.relative_to(GOLDENS).as_posix() for folder in sets] == [
        *("large/full", "official", "official-7b", "small", "small-7b")
    ]
    # test_regen.py reads them all; here they are counted
    for folder in sets:
        manifests = [store.open_case(ref.folder, ref.name).manifest for ref in store.list_cases(folder)]
        assert sum(len(targets) for manifest in manifests for targets in manifest["targets"].values()) > 50
    for limit, kind in ((32, False), (12, True)):
        files = [path for path in GOLDENS.rglob("*") if path.suffix != ".pyc"]
        size = sum(path.stat().st_size for path in files if path.parent.name.endswith("-7b") == kind)
        assert size < limit * 1e6, f"goldens take {size / 1e6:.1f} MB; {limit} MB is the limit"


def test_every_id_in_the_goldens_is_known_and_classed_by_its_dtype() -> None:
    for ref in store.list_cases(GOLDENS):
        case = store.open_case(ref.folder, ref.name)
        for variant in case.variants:
            for stage, entry in case.manifest["targets"][variant].items():
                assert STAGES.find(stage) is not None, f"{ref.name}: {stage} has no entry"
                real = entry.get("as", entry["dtype"]).startswith(("float", "bfloat"))
                assert STAGES.is_exact(stage) == (not real or stage == "pos.freq"), f"{ref.name}: {stage}"
                _, heads = STAGES.axes(stage).of(len(entry["shape"]))
                assert heads is None or entry["shape"][heads] == case.config["num_attention_heads"]


def test_expand_lists_what_the_recordings_hold() -> None:
    official = {ref.name: store.open_case(ref.folder, ref.name) for ref in store.list_cases(GOLDENS / "official")}
    single, batch, long = official["single"], official["batch"], official["longvideo"]
    usual = ("resize", "labels")
    assert expected(single.config, without=("unpad", *usual)) == STAGES.sort(single.targets)
    assert expected(batch.config, batch=2, without=usual) == STAGES.sort(batch.targets)
    assert expected(long.config, without=("labels",), xattn_layers=()) == STAGES.sort(long.targets)


def test_reading_goldens_loads_neither_torch_nor_the_model() -> None:
    code = (
        "import sys; from stageparity import store, sketch, compare, tolerance, ledger, writer; from vidi.parity import stages;"
        "bad = [m for m in sys.modules if m == 'torch' or m.startswith(('torch.', 'vidi.model', 'vidi.bridge.'))];"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
