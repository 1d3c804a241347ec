"""What `vidi inspect` says about folders that fit, that do not, and that cannot be judged."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.checkpoint.breaking import (
    add_tensor,
    edit,
    edit_config,
    edit_index,
    remove_tensor,
    replace_tensor,
    shard_with,
    write_shard,
)
from vidi import sizes_7b
from vidi.checkpoint import names
from vidi.checkpoint.errors import CheckpointError
from vidi.checkpoint.folder import INDEX_NAME
from vidi.checkpoint.inspect import inspect_folder
from vidi.cli import main
from vidi.commands import inspect as command
from vidi.config import VidiConfig

POOL = "model.mm_rand_aud_pool.weight"
IMAGE = "model.mm_rand_img_projector.model.0.weight"
AUDIO = "model.mm_rand_aud_projector.model.0.weight"
EMBED = "model.embed_tokens.weight"
UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.2.pre_feedforward_layernorm.weight"


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(arguments))


def sparse_folder(
    folder: Path, config: VidiConfig, num_shards: int = 5, change: Callable[[dict], None] | None = None
) -> Path:
    """Headers of ``config`` over files without content: any size, no disk."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_official()))
    wanted = {name: ("BF16", want.shape) for name, want in names.expected(config).items()}
    if change is not None:
        change(wanted)
    items, weight_map, total = list(wanted.items()), {}, 0
    for i in range(num_shards):
        file = f"model-{i + 1:05}-of-{num_shards:05}.safetensors"
        header, position = {}, 0
        for name, (dtype, shape) in items[i * len(items) // num_shards : (i + 1) * len(items) // num_shards]:
            end = position + 2 * math.prod(shape)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
            weight_map[name], position = file, end
        write_shard(folder / file, header, b"")
        os.truncate(folder / file, (folder / file).stat().st_size + position)
        total += position
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    return folder


# ---- fits -------------------------------------------------------------------------------------------------------------


def test_a_folder_that_fits(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = inspect_folder(tiny_folder)
    assert report.fits
    assert report.problems == ()
    assert report.config == VidiConfig.tiny()
    assert run(str(tiny_folder)) == 0
    text = capsys.readouterr().out
    assert "171" in text
    assert "wanted: 172 tensors with the tied head, 187,792 unique parameters" in text
    assert "lm_head.weight: absent, as it should be: tied" in text
    assert text.rstrip().endswith("fits")


def test_full_size_in_milliseconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """20 GB of headers over sparse files; the bound is 20 times what it takes."""
    folder = sparse_folder(tmp_path / "full", VidiConfig.full())
    assert sum(path.stat().st_size for path in folder.iterdir()) > 20_900_000_000
    inspect_folder(folder)
    start = time.perf_counter()
    report = inspect_folder(folder)
    seconds = time.perf_counter() - start
    assert report.fits
    assert report.recognised == "Vidi 1.5 9B"
    text = report.render()
    assert "1,424 tensors with the tied head, 10,462,005,312 unique parameters" in text
    assert "2×2 patches are folded into channels (4·1152), not pooled to 2×2; 14×14 = 196 tokens a frame" in text
    assert "position MLPs are stored as BF16" in text
    assert seconds < 1.0, f"inspect took {seconds:.3f} s"
    print(f"inspect of 20 GB: {seconds * 1e3:.0f} ms")


@pytest.mark.parametrize(("frames", "measured"), [(60, 25.6), (300, 44.0), (1800, 45.1), (3600, 66.9)])
def test_what_a_full_size_run_needs(
    frames: int, measured: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within 5 % of the peaks measured (`docs/performance.md`), as the command prints them and as JSON has them."""
    folder = str(sparse_folder(tmp_path / "full", VidiConfig.full()))
    assert main(["inspect", folder, "--frames", str(frames)]) == 0
    printed = re.search(r"^ *([\d.]+) GiB  peak, and about 0\.59 GiB for CUDA", capsys.readouterr().out, re.MULTILINE)
    assert main(["inspect", folder, "--frames", str(frames), "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)["needs"]["peak_bytes"] / 2**30
    assert printed is not None
    assert float(printed[1]) == pytest.approx(counted, abs=0.005)
    assert counted == pytest.approx(measured, rel=0.05)


def test_json_holds_the_same(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remove_tensor(broken, NORM)
    assert run(str(broken), "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] is False
    assert report["num_problems"] == 1
    assert report["problems"][0]["tensor"] == NORM
    assert {part["part"]: part["stored"] for part in report["parts"]}["decoder"] == 45
    assert report["parameters"] == 187_792 - 40


def test_inspect_loads_no_torch(tiny_folder: Path) -> None:
    code = (
        "import sys; from vidi.checkpoint.inspect import inspect_folder; "
        f"assert inspect_folder({str(tiny_folder)!r}).fits; "
        "import vidi.commands.inspect; assert not {'torch', 'numpy', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_stored_head_is_fine_and_said(broken: Path) -> None:
    add_tensor(broken, EMBED, names.HEAD, "BF16", [512, 40], bytes(2 * 512 * 40))
    report = inspect_folder(broken)
    assert report.fits
    assert "stored, though tied; its bits are compared at loading" in report.render()


def test_position_mlps_in_half_precision_are_fine(broken: Path) -> None:
    replace_tensor(broken, "model.mm_rand_pos_t.mlp.0.weight", dtype="BF16")
    report = inspect_folder(broken)
    assert report.fits
    assert "position MLPs are stored as BF16; they are computed in float32" in report.render()


def test_without_an_index(broken: Path) -> None:
    (broken / INDEX_NAME).unlink()
    assert inspect_folder(broken).fits


def test_pickles_beside_are_named_and_left_alone(broken: Path) -> None:
    (broken / "training_args.bin").write_bytes(b"\x80\x02.")
    report = inspect_folder(broken)
    assert report.fits
    assert "pickle files are never opened: training_args.bin" in report.render()


# ---- does not fit -----------------------------------------------------------------------------------------------------

MISFITS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "audio-pool-7b": (
        lambda f: replace_tensor(f, POOL, shape=[32, 32, 5]),
        "shape",
        r"\[32, 32, 5\] where the config asks for \[40, 32, 5\]: the 7B layout, whose audio pool keeps the encoder's width",
    ),
    "audio-pool-size": (lambda f: replace_tensor(f, POOL, shape=[40, 32, 4]), "shape", "a pool over 4 positions; .* 5"),
    "projector-7b": (
        lambda f: replace_tensor(f, IMAGE, shape=[40, 32]),
        "shape",
        r"the 7B layout, which projects each location alone \(32 channels\); the 9B folds 2×2 .* 4·32 = 128",
    ),
    "projector-3x3": (lambda f: replace_tensor(f, IMAGE, shape=[40, 288]), "shape", r"3×3 patches folded .*\(9·32\)"),
    "audio-projector-7b": (
        lambda f: replace_tensor(f, AUDIO, shape=[40, 32]),
        "shape",
        "the 7B layout, whose projector widens 32→40",
    ),
    "whisper-v2": (
        lambda f: replace_tensor(f, "model.mm_aud.encoder.conv1.weight", shape=[32, 80, 3]),
        "shape",
        r"80 mel bins \(Whisper before large-v3\); the config has 16",
    ),
    "other-resolution": (
        lambda f: replace_tensor(f, "model.mm_vis.vision_model.embeddings.position_embedding.weight", shape=[64, 32]),
        "shape",
        r"8×8 patches, a tower for 16-pixel images; the config has 13×13 \(26 pixels\)",
    ),
    "vocabulary": (
        lambda f: replace_tensor(f, EMBED, shape=[514, 40]),
        "shape",
        "a vocabulary of 514; the config has 512",
    ),
    "transposed": (lambda f: replace_tensor(f, UP, shape=[40, 96]), "shape", "transposed; rows are outputs here"),
    "heads": (
        lambda f: replace_tensor(f, "model.layers.0.self_attn.k_proj.weight", shape=[64, 40]),
        "shape",
        "4 heads of 16; the config has 2",
    ),
    "reshaped": (
        lambda f: replace_tensor(f, UP, shape=[48, 80]),
        "shape",
        "the same number of values in another shape",
    ),
    "other-width": (
        lambda f: replace_tensor(f, UP, shape=[96, 48]),
        "shape",
        "a decoder of width 48; the config has 40",
    ),
    "other-size": (lambda f: replace_tensor(f, UP, shape=[97, 40]), "shape", "another size of model"),
    "quantised": (
        lambda f: replace_tensor(f, UP, dtype="I8"),
        "dtype",
        "I8: quantised weights; BF16, F16, F32, F64 are read",
    ),
    "fp8": (lambda f: replace_tensor(f, UP, dtype="F8_E4M3"), "dtype", "F8_E4M3: quantised weights"),
    "integers": (lambda f: replace_tensor(f, UP, dtype="I64"), "dtype", "I64: no floating-point weights"),
    "missing": (lambda f: remove_tensor(f, UP), "missing", "no shard holds it"),
    "missing-norm": (lambda f: remove_tensor(f, NORM), "missing", "Gemma 2 norms around the feed-forward"),
    "missing-unused": (
        lambda f: remove_tensor(f, "model.mm_vis.vision_model.head.probe"),
        "missing",
        "feeds nothing, but belongs to a whole checkpoint",
    ),
    "missing-bridge": (lambda f: remove_tensor(f, "model.mm_rand_llm_norm.weight"), "missing", "part of the bridge"),
    "more-layers-wanted": (
        lambda f: edit_config(f, num_hidden_layers=5),
        "missing",
        "the whole layer is missing; the config asks for more layers than are stored",
    ),
    "fewer-layers-wanted": (
        lambda f: edit_config(f, num_hidden_layers=3),
        "unexpected",
        r"a layer beyond the config's 3 \(0 to 2\)",
    ),
    "lora": (
        lambda f: add_tensor(f, UP, "model.layers.0.mlp.up_proj.lora_A.weight", "BF16", [2], bytes(4)),
        "unexpected",
        "a LoRA adapter; merge it",
    ),
    "prefix": (
        lambda f: add_tensor(f, UP, f"module.{UP}", "BF16", [2], bytes(4)),
        "unexpected",
        f"would fit as {UP}: a wrapper's prefix",
    ),
    "no-prefix": (
        lambda f: add_tensor(f, UP, UP.removeprefix("model."), "BF16", [2], bytes(4)),
        "unexpected",
        f"would fit as {UP}: the prefix was stripped",
    ),
    "bias": (
        lambda f: add_tensor(f, UP, UP.replace("weight", "bias"), "BF16", [2], bytes(4)),
        "unexpected",
        "this layer has no bias",
    ),
    "inv-freq": (
        lambda f: add_tensor(f, UP, "model.layers.0.self_attn.rotary_emb.inv_freq", "F32", [2], bytes(8)),
        "unexpected",
        "rotary frequencies are computed",
    ),
    "conv2d-pool": (
        lambda f: add_tensor(f, UP, "model.mm_rand_img_pool.weight", "BF16", [2, 2, 7, 7], bytes(2 * 4 * 49)),
        "unexpected",
        r"a learned Conv2d over the image grid \[2, 2, 7, 7\], the 7B's pool",
    ),
    "foreign": (
        lambda f: add_tensor(f, UP, "optimizer.step", "F32", [], bytes(4)),
        "unexpected",
        "no tensor of this model",
    ),
    "head-shape": (
        lambda f: add_tensor(f, UP, "lm_head.weight", "BF16", [511, 40], bytes(2 * 511 * 40)),
        "shape",
        r"BF16 \[511, 40\] cannot repeat the embedding \[512, 40\] that it is tied to",
    ),
    "missing-shard": (
        lambda f: (f / "model-00003-of-00005.safetensors").unlink(),
        "shard",
        r"model-00003-of-00005.safetensors: missing shard; the index places \d+ tensors in it",
    ),
    "index-elsewhere": (
        lambda f: edit_index(f, lambda m: m.update({UP: "model-00005-of-00005.safetensors"})),
        "index",
        "the index places it in model-00005-of-00005.safetensors; it is in model-00004",
    ),
    "index-lacks": (lambda f: edit_index(f, lambda m: m.pop(UP)), "index", "is in model-.* and not in the index"),
    "index-invents": (
        lambda f: edit_index(f, lambda m: m.update({"model.ghost": "model-00005-of-00005.safetensors"})),
        "index",
        "the index places it in model-00005-of-00005.safetensors; no shard holds it",
    ),
    "stored-twice": (
        lambda f: add_tensor(f, EMBED, NORM, "BF16", [40], bytes(80), index=False),
        "duplicate",
        "is stored twice, in model-.* and here",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_misfits_are_explained(case: str, broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, kind, message = MISFITS[case]
    change(broken)
    if case == "index-elsewhere":
        home = shard_with(broken, "model.layers.1.mlp.gate_proj.weight").name
        message = message.replace("model-00004", home.partition("-of")[0])
    report = inspect_folder(broken)
    assert kind in {problem.kind for problem in report.problems}
    assert run(str(broken)) == 1
    out = capsys.readouterr().out
    import re

    assert re.search(rf"^{kind} .*{message}", out, re.MULTILINE), out


def test_a_lost_shard_without_an_index(broken: Path) -> None:
    (broken / INDEX_NAME).unlink()
    (broken / "model-00003-of-00005.safetensors").unlink()
    assert "missing shard, by the count in the names of the others" in inspect_folder(broken).render()


def test_layers_that_share_a_reason_share_a_line(tmp_path: Path) -> None:
    def cut(wanted: dict) -> None:
        for name in [name for name in wanted if "feedforward_layernorm" in name]:
            del wanted[name]

    lines = inspect_folder(sparse_folder(tmp_path / "x", VidiConfig.full(), change=cut)).render().splitlines()
    told = [line for line in lines if line.startswith("missing")]
    assert len(told) == 2
    assert all("(42 tensors, layers 0-41)" in line for line in told)
    assert lines[-1] == "does not fit: 84 problems"


# ---- Vidi 7B ----------------------------------------------------------------------------------------------------------


def to_7b(wanted: dict) -> None:
    """The tensors of spec §11: Mistral norms, width 4096, pools that keep the encoders' widths."""
    for name in [name for name in wanted if "feedforward_layernorm" in name]:
        del wanted[name]
    for name, (dtype, shape) in list(wanted.items()):
        wanted[name] = (dtype, tuple(4096 if size == 3584 else size for size in shape))
    wanted[POOL] = ("BF16", (1280, 1280, 5))
    wanted[IMAGE] = ("BF16", (4096, 1152))
    wanted[AUDIO] = ("BF16", (4096, 1280))
    wanted["model.mm_rand_img_pool.weight"] = ("BF16", (1152, 1152, 14, 14))


def test_a_full_7b_fits(tmp_path: Path) -> None:
    report = inspect_folder(sparse_folder(tmp_path / "x", sizes_7b.config("full")))
    assert report.fits
    assert report.recognised == "Vidi 7B"
    assert sum(part.parameters for part in report.parts) == 8_725_754_944
    text = report.render()
    assert "wanted: 1,251 tensors, 8,725,754,944 unique parameters" in text
    assert "image pool [1152, 1152, 14, 14]: a learned convolution, then 2×2 = 4 samples a frame" in text
    assert "lm_head.weight: stored and not tied" in text


def test_a_9b_given_as_7b_is_told(tmp_path: Path) -> None:
    """The config of the one over the tensors of the other."""
    seven = sparse_folder(tmp_path / "seven", sizes_7b.config("full"))
    nine = sparse_folder(tmp_path / "nine", VidiConfig.full())
    shutil.copy(seven / "config.json", nine / "config.json")
    report = inspect_folder(nine)
    assert report.recognised == "Vidi 1.5 9B"
    assert not report.fits
    text = report.render()
    assert (
        "config.json describes Vidi 7B, the tensors are those of Vidi 1.5 9B: the audio pool [3584, 1280, 5] widens"
        in text
    )
    assert "1.5 9B's layout, which folds 2×2 patches into channels (4·1152)" in text
    assert run(str(nine)) == 1


def test_a_7b_of_another_pool_is_told(tmp_path: Path) -> None:
    folder = sparse_folder(tmp_path / "x", sizes_7b.config("full"))
    edit_config(folder, mm_image_pool_size=3)
    assert "a kernel of 14×14; 27 patches a side and mm_image_pool_size 3 give 9" in inspect_folder(folder).render()


def test_a_7b_given_as_9b_is_told(tmp_path: Path) -> None:
    """By its shapes alone, where the config claims the 9B."""
    folder = sparse_folder(tmp_path / "x", VidiConfig.full(), change=to_7b)
    report = inspect_folder(folder)
    assert report.recognised == "Vidi 7B"
    assert not report.fits
    text = report.render()
    for sign in (
        "the audio pool [1280, 1280, 5] keeps the encoder's width",
        "the image projector [4096, 1152] takes one location at a time",
        "the audio projector [4096, 1280] does the widening",
        "a learned Conv2d pools the image grid",
    ):
        assert sign in text
    assert "config.json describes Vidi 1.5 9B, the tensors are those of Vidi 7B" in text
    assert run(str(folder)) == 1


def test_a_missing_shard_is_one_line(broken: Path) -> None:
    """Its tensors are counted there; --json lists them."""
    (broken / "model-00003-of-00005.safetensors").unlink()
    report = inspect_folder(broken)
    lines = [line for line in report.render().splitlines() if line.startswith(("missing", "shard"))]
    lost = [problem for problem in report.problems if problem.kind == "missing"]
    assert len(lines) == 1
    assert f"the index places {len(lost)} tensors in it" in lines[0]


def test_one_odd_shape_is_not_yet_a_7b(broken: Path) -> None:
    replace_tensor(broken, POOL, shape=[32, 32, 5])
    assert inspect_folder(broken).recognised != "Vidi 7B"


# ---- unusable ---------------------------------------------------------------------------------------------------------


def _replace_with_link(folder: Path) -> None:
    shard = folder / "model-00002-of-00005.safetensors"
    shutil.move(shard, folder.parent / "elsewhere.safetensors")
    shard.symlink_to(folder.parent / "elsewhere.safetensors")


def _only_pickles(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX_NAME]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")


def _many_entries(folder: Path) -> None:
    weight_map = {f"model.layers.{i}.weight": "model-00001-of-00005.safetensors" for i in range(100_000)}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


UNUSABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no-folder": (shutil.rmtree, "copy: no such folder"),
    "no-config": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "bad-config": (lambda f: (f / "config.json").write_text("{"), "config.json: damaged JSON"),
    "unknown-field": (lambda f: edit_config(f, mm_new_trick=1), "config.json: unknown fields: mm_new_trick"),
    "other-model": (
        lambda f: edit_config(f, model_type="llama"),
        "config.json: fields that this model cannot honour: model_type",
    ),
    "wrong-type": (
        lambda f: edit_config(f, hidden_size="40"),
        r"hidden_size = '40' \(a whole number from 1 to 2,147,483,647\)",
    ),
    "list-in-config": (
        lambda f: edit_config(f, rope_theta=[1]),
        r"rope_theta = \[1\] \(a number from 1e-12 to 1,000,000,000\)",
    ),
    "absurd-layers": (lambda f: edit_config(f, num_hidden_layers=10**9), "layers = 1000000000"),
    "truncated": (
        lambda f: os.truncate(shard_with(f, UP), shard_with(f, UP).stat().st_size - 5),
        r"tensor \S+: ends 5 bytes past the end of the file; truncated download\?",
    ),
    "flipped-header": (
        lambda f: edit(f, UP, lambda h: h[UP].update(dtype="F32")),
        rf"tensor {UP}: F32 \[96, 40\] takes 15,360 bytes, data_offsets give 7,680",
    ),
    "link-out": (_replace_with_link, "model-00002-of-00005.safetensors: is a link to a place outside the folder"),
    "index-leaves": (
        lambda f: edit_index(f, lambda m: m.update({UP: "../../etc/x.safetensors"})),
        f"tensor {UP}: is placed in '../../etc/x.safetensors', a path that leaves the folder",
    ),
    "index-pickle": (
        lambda f: edit_index(f, lambda m: m.update({UP: "x.bin"})),
        "the pickle file 'x.bin'; never unpickled",
    ),
    "index-empty": (lambda f: (f / INDEX_NAME).write_text("{}"), "has no weight_map"),
    "index-number": (lambda f: edit_index(f, lambda m: m.update({UP: 3})), "the index gives no file name for it"),
    "index-of-many": (_many_entries, "bytes; at most 4,194,304 are read"),
    "pickles-only": (_only_pickles, "holds pickle files .pytorch_model.bin. and no safetensors; a pickle can run code"),
    "no-shards": (lambda f: [path.unlink() for path in f.glob("*.safetensors")], "none of its shards is there"),
    "nothing": (
        lambda f: [path.unlink() for path in [*f.glob("*.safetensors"), f / INDEX_NAME]],
        "holds no .safetensors file and no model.safetensors.index.json",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_folders(case: str, broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = UNUSABLE[case]
    change(broken)
    with pytest.raises(CheckpointError, match=message):
        inspect_folder(broken)
    assert run(str(broken)) == 2
    assert capsys.readouterr().err.startswith("unusable: ")
    assert run(str(broken), "--json") == 2
    assert json.loads(capsys.readouterr().out)["unusable"] is True


def test_a_file_is_no_folder(tiny_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        inspect_folder(tiny_folder / "config.json")


def test_what_a_file_names_cannot_reach_the_terminal(broken: Path) -> None:
    """Names come from the file: control characters are shown escaped."""
    add_tensor(broken, UP, "evil\x1b[2J\n", "F32", [], bytes(4))
    text = inspect_folder(broken).render()
    assert "\x1b" not in text
    assert "evil\\x1b[2J" in text
