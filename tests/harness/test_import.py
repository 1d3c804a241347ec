"""Importing recordings: what becomes a target, what is left out and why, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from stageparity import store
from stageparity.golden import GoldenError, Sampled, Whole, stats_of
from stageparity.manifest import set_sha256
from tests.not_run import not_run
from tests.oracle.recordings import FOLDER_7B
from tools import import_official
from vidi.parity.goldens import inputs_of

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "goldens"
EMBED = "model.embed_tokens.weight"


def _recordings() -> Path:
    folder = Path(os.environ.get("VIDI_RECORDINGS", ROOT.parent / "shared" / "official"))
    if not (folder / "weights.safetensors").exists():
        not_run(f"no recordings of the official release in {folder}; set VIDI_RECORDINGS")
    return folder


def _recordings_7b() -> Path:
    if not (FOLDER_7B / "weights.safetensors").exists():
        not_run(f"no recordings of the 7B's release in {FOLDER_7B}; set VIDI_RECORDINGS_7B")
    return FOLDER_7B


def _record(folder: Path, name: str, tensors: dict[str, np.ndarray], sampled: dict[str, tuple], info: dict) -> None:
    """Write a recording as the release's recorder does: tensors, and a json that describes them."""
    listed = {
        stage: {
            "shape": list(x.shape), "dtype": x.dtype.name, "stored": "full",
            "sha256": hashlib.sha256(x.tobytes()).hexdigest(),
        }
        for stage, x in tensors.items()
    }  # fmt: skip
    stored = dict(tensors)
    for stage, (x, axis, index) in sampled.items():
        listed[stage] = {"shape": list(x.shape), "dtype": x.dtype.name, "stored": "sample", "sample_axis": axis}
        others = tuple(a for a in range(x.ndim) if a != axis)
        stored |= {
            f"{stage}.sample": np.take(x, index, axis=axis), f"{stage}.sample_index": index,
            f"{stage}.row_sum": x.astype(np.float64).sum(axis=others), f"{stage}.stats": stats_of(x),
        }  # fmt: skip
    llm = {"hidden_size": 6, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1}
    body = {
        "case": name, "dtype": "f32", "info": info, "seed": 99, "torch": "9.9", "llm_config": llm,
        "vision_config": {}, "audio_config": {}, "tensors": listed,
    }  # fmt: skip
    save_file({key: np.ascontiguousarray(x) for key, x in stored.items()}, folder / f"{name}.f32.safetensors")
    (folder / f"{name}.f32.json").write_text(json.dumps(body))


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Recordings of other sizes: width 6, 3 heads, 2 layers, a silent sample, a decoding case."""
    folder, rng = tmp_path / "src", np.random.default_rng(6)
    folder.mkdir()
    embed = rng.standard_normal((11, 6)).astype(np.float32)
    save_file({EMBED: embed, "lm_head.weight": embed.copy()}, folder / "weights.safetensors")
    u8 = rng.integers(0, 256, (2, 3, 4, 4)).astype(np.uint8)
    mask = np.array([[True, True], [False, False]])
    x = rng.standard_normal((2, 50, 6)).astype(np.float32)
    tensors = {
        "inputs.input_ids": np.array([[2, -200, 5]]),
        "inputs.images_u8.0": u8,
        "inputs.images.0": u8.astype(np.float32) / np.float32(127.5) - np.float32(1),
        "inputs.same_as_case_batch": np.ones(1, np.float32),
        "audio.mask": mask,
        "vision.norm": rng.standard_normal((2, 2, 2, 6)).astype(np.float32),
        "xattn.0.a.kv_mask": np.ones((2, 2), bool),
        "xattn.0.a.unpad.cu_seqlens_k": np.array([0, 2, 4], np.int32),
        "xattn.0.a.q": rng.standard_normal((2, 3, 4, 2)).astype(np.float32),
        "logits": x[:, :4],
    }
    _record(folder, "odd", tensors, {"layer.0.image_stream": (x, 1, np.array([0, 20, 49]))}, {"vision_hw": [4, 4]})
    steps = {"g.tokens": np.array([[3, 4]]), "g.prompt_ids": np.array([[2, 5]])}
    for suffix in ("logits", "nocache.logits", "nocache_narrow.logits"):
        steps[f"g.{suffix}"] = rng.standard_normal((1, 2, 11)).astype(np.float32)
    for suffix in ("cache_position", "mask_lengths", "position_ids"):
        steps[f"g.{suffix}"] = np.arange(3)
    _record(folder, "generate", steps, {}, {"generate": {"g": {"window": 64, "tokens": [3, 4]}}})
    return folder


def test_foreign_sizes(foreign: Path, tmp_path: Path) -> None:
    names = import_official.import_recordings(foreign, tmp_path / "dst", full=True)
    assert names == ["generate", "odd"]
    case = store.open_case(tmp_path / "dst", "odd")
    assert case.provenance["origin"] == "official"
    assert case.provenance["seed"] == 99
    assert set(case.weights()) == {EMBED}
    assert case.left_out["lm_head.weight"] == import_official.TIED
    assert case.left_out["inputs.same_as_case_batch"] == import_official.MARKER
    assert set(case.targets) == {
        "pos.freq", "audio.mask", "vision.norm", "xattn.0.a.q", "layer.0.image_stream", "logits",
    }  # fmt: skip
    for stage in ("xattn.0.a.kv_mask", "xattn.0.a.unpad.cu_seqlens_k"):
        assert case.left_out[stage] == import_official.SILENT
    stream = case.targets["layer.0.image_stream"]
    assert isinstance(stream, Sampled)
    assert (stream.shape, stream.index.tolist(), len(stream.row_sum)) == ((2, 50, 6), [0, 20, 49], 50)
    table = case.targets["pos.freq"].array
    assert table.dtype == np.float32
    assert table.shape == (3,)


def test_decoding_case(foreign: Path, tmp_path: Path) -> None:
    import_official.import_recordings(foreign, tmp_path / "dst", cases=["generate"])
    case = store.open_case(tmp_path / "dst", "generate")
    assert list(case.targets) == ["g.nocache.logits"]
    assert set(case.inputs) == {"g.tokens", "g.prompt_ids"}
    assert case.info["generate"] == {"g": {"window": 64}}
    reasons = {stage.removeprefix("g."): reason for stage, reason in case.left_out.items() if stage.startswith("g.")}
    assert reasons == {
        "logits": import_official.CACHED_RUN,
        "nocache_narrow.logits": import_official.NARROW,
        **dict.fromkeys(("cache_position", "mask_lengths", "position_ids"), import_official.CALLS),
    }


def test_frames_that_follow_from_bytes_are_left_out_and_given_back(foreign: Path, tmp_path: Path) -> None:
    full, thin = tmp_path / "full", tmp_path / "thin"
    import_official.import_recordings(foreign, full, full=True, cases=["odd"])
    import_official.import_recordings(foreign, thin, cases=["odd"])
    case = store.open_case(thin, "odd")
    assert case.left_out["inputs.images.0"] == import_official.FROM_U8
    assert "inputs.images.0" not in case.manifest["inputs"]
    np.testing.assert_array_equal(
        inputs_of(case)["inputs.images.0"], store.open_case(full, "odd").inputs["inputs.images.0"]
    )


def test_a_recording_that_contradicts_its_json(foreign: Path, tmp_path: Path) -> None:
    path = foreign / "odd.f32.safetensors"
    raw = bytearray(path.read_bytes())
    tensors, _ = import_official.read_safetensors(path)
    at = raw.find(tensors["vision.norm"].tobytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    with pytest.raises(GoldenError, match=r"vision\.norm is not what its json describes"):
        import_official.import_recordings(foreign, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
    tensors["layer.0.image_stream.row_sum"] = tensors["layer.0.image_stream.row_sum"][::-1].copy()
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path)
    with pytest.raises(GoldenError, match=r"layer\.0\.image_stream\.row_sum does not fit its sampled rows"):
        import_official.import_recordings(foreign, tmp_path / "dst")


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    with pytest.raises(GoldenError, match=r"no recordings CASE\.DTYPE\.safetensors"):
        import_official.import_recordings(tmp_path / "src", tmp_path / "dst")


def test_a_repository_import_needs_a_reason(foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ledger.toml").write_text("")
    assert import_official.main([str(foreign), str(tmp_path / "dst")]) == 2
    assert 'give --reason "..."' in capsys.readouterr().err


def test_bfloat16_is_upcast_without_loss(tmp_path: Path) -> None:
    values = np.array([1.0, -2.5, 3.140625, 0.0], np.float32)
    data = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    header = json.dumps({"x": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    tensors, hashes = import_official.read_safetensors(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(tensors["x"], values)
    assert hashes["x"] == hashlib.sha256(data).hexdigest()


@pytest.mark.slow
def test_the_recordings_give_the_goldens_in_the_repository(tmp_path: Path) -> None:
    """The committed set is what the importer makes, content for content; so is nothing edited by hand."""
    import_official.import_recordings(_recordings(), tmp_path / "official", dtypes=["f32"])
    assert set_sha256(tmp_path / "official") == set_sha256(GOLDENS / "official")


@pytest.mark.slow
def test_the_recordings_of_the_7b_give_their_goldens(tmp_path: Path) -> None:
    recorded = {path.name.split(".")[0] for path in _recordings_7b().glob("*.f32.safetensors")}
    # all but one: 2.7 MB of frames that show only that nothing depends on length
    cases = recorded - {"longvideo"}
    import_official.import_recordings(_recordings_7b(), tmp_path / "official-7b", cases=cases, dtypes=["f32"])
    assert set_sha256(tmp_path / "official-7b") == set_sha256(GOLDENS / "official-7b")


def test_what_is_the_7bs_own(tmp_path: Path) -> None:
    """Its kind, its head, its own table, a window that only one case has, and which decoding is the target."""
    names = ["nowindow", "generate", "loss", "audioonly"]
    import_official.import_recordings(_recordings_7b(), tmp_path / "set", cases=names, dtypes=["f32"])
    cases = {name: store.open_case(tmp_path / "set", name) for name in names}
    for case in cases.values():
        assert case.config["model_type"] == "dattn_mistral"
        assert "7B" in case.provenance["commit"]
        assert "lm_head.weight" in case.weights()
        assert "lm_head.weight" not in case.left_out
    assert [cases[name].config["sliding_window"] for name in names] == [None, 8, 8, 8]
    tables, _ = import_official.read_safetensors(_recordings_7b() / "tables.safetensors")
    np.testing.assert_array_equal(cases["nowindow"].targets["pos.freq"].array, tables["pos.freq"])
    assert cases["nowindow"].provenance["pos.freq"] == "recorded"
    assert cases["nowindow"].left_out == {"rope.inv_freq": import_official.ROPE}
    decoding = cases["generate"]
    variants = ("generate", "generate_short", "generate_nowindow")
    wanted = {f"{v}.{what}" for v in variants for what in ("nocache.logits", "greedy_nocache.tokens")}
    assert set(decoding.targets) == wanted
    assert decoding.left_out["generate.logits"] == import_official.CACHED_RUN
    assert decoding.left_out["generate_nowindow.logits"] == import_official.CACHED_SAME
    assert {f"{v}.{what}" for v in variants for what in ("tokens", "prompt_ids")} <= set(decoding.inputs)
    assert {"loss.kept", "loss.labels", "loss.logits", "text.labels"} <= set(cases["loss"].targets)
    assert cases["loss"].info["loss_thresholds"]["mid"] == 8.049
    silent = import_official.import_recordings(_recordings_7b(), tmp_path / "s", cases=["silent"], dtypes=["f32"])
    left = store.open_case(tmp_path / "s", silent[0]).left_out
    assert left["xattn.3.a.unpad.k"] == import_official.SILENT
    assert left["xattn.0.v.kv_mask"] == import_official.SILENT


def test_a_table_that_does_not_fit_is_named(foreign: Path, tmp_path: Path) -> None:
    save_file({"pos.freq": np.ones(4, np.float32)}, foreign / "tables.safetensors")
    with pytest.raises(GoldenError, match=r"pos\.freq has shape \[4\]; hidden_size needs half of it"):
        import_official.import_recordings(foreign, tmp_path / "set")


@pytest.mark.slow
def test_every_dtype_imports_whole(tmp_path: Path) -> None:
    names = import_official.import_recordings(_recordings(), tmp_path / "all", full=True, cases=["single", "silent"])
    assert names == ["silent", "single.bf16", "single.f16", "single", "single.f64"]
    low = store.open_case(tmp_path / "all", "single.bf16").targets["logits"]
    assert low.dtype == "bfloat16"
    assert low.array.dtype == np.float32
    silent = store.open_case(tmp_path / "all", "silent")
    left = [stage for stage in silent.left_out if stage.startswith("xattn.")]
    assert all(silent.left_out[stage] == import_official.SILENT for stage in left)
    assert "xattn.0.v.kv_mask" in left
    assert "xattn.3.a.unpad.cu_seqlens_k" in left
    assert all(isinstance(golden, Whole) for golden in silent.targets.values())


def test_a_folder_of_something_else_is_never_replaced(foreign: Path, tmp_path: Path) -> None:
    """A checkpoint has config.json, an index and safetensors files, too: none of them may go."""
    dst = tmp_path / "checkpoint"
    dst.mkdir()
    held = ("config.json", "model-00001-of-00001.safetensors", "tokenizer.json")
    for name in held:
        (dst / name).write_text("{}")
    with pytest.raises(GoldenError, match=r"holds config.json, .*no part of a golden set"):
        import_official.import_recordings(foreign, dst)
    assert sorted(path.name for path in dst.iterdir()) == sorted(held)


def test_a_set_can_be_imported_anew(foreign: Path, tmp_path: Path) -> None:
    names = import_official.import_recordings(foreign, tmp_path / "set")
    assert import_official.import_recordings(foreign, tmp_path / "set") == names


@pytest.mark.parametrize("broken", [b"", b"\x10", b"\x10\0\0\0\0\0\0\0{not json", b"\x02\0\0\0\0\0\0\0[]"])
def test_a_broken_recording_is_named(foreign: Path, tmp_path: Path, broken: bytes) -> None:
    (foreign / "weights.safetensors").write_bytes(broken)
    with pytest.raises(GoldenError, match=r"weights.safetensors: no readable safetensors file"):
        import_official.import_recordings(foreign, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_what_is_missing_is_named(foreign: Path, tmp_path: Path) -> None:
    with pytest.raises(GoldenError, match=r"none of the recordings is asked for; there are .*\.f32"):
        import_official.import_recordings(foreign, tmp_path / "set", cases=["nope"])
    (foreign / "weights.safetensors").unlink()
    with pytest.raises(GoldenError, match=r"weights.safetensors is missing"):
        import_official.import_recordings(foreign, tmp_path / "set")
