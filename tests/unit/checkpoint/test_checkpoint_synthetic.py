"""The synthetic weights: recomputed by hand, pinned, the same by every route, and of order one through all layers."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vidi.checkpoint import load, names, synthetic
from vidi.checkpoint.headers import read_shard
from vidi.cli import main
from vidi.config import VidiConfig
from vidi.inputs.batch import Batch

EMBED = "model.embed_tokens.weight"


def sum_by_hand(seed: int, name: str, i: int) -> int:
    """The generator in plain Python integers, written from its description."""
    digest = hashlib.sha256(f"vidi-synth-1:{seed}:{name}".encode()).digest()
    a, b, c, d = struct.unpack("<4I", digest[:16])

    def halves(x: int, key: int) -> int:
        x ^= x >> 15
        x = (x * 0x2C1B3C6D) % 2**32
        x ^= key
        x ^= x >> 12
        x = (x * 0x297A2D39) % 2**32
        x ^= x >> 15
        return x // 65536 + x % 65536

    return halves(i ^ a, b) + halves(i ^ c, d)


def bf16_by_hand(value: float) -> int:
    """Round to nearest even by the bits of the float32."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


@pytest.mark.parametrize("seed", [0, 7, 2**40])
@pytest.mark.parametrize(
    ("name", "base", "shift"),
    [
        # A standard deviation of 2^15.208 · 2^-shift; 2^gain / sqrt(fan-in) is wanted, within a factor sqrt 2.
        ("model.layers.3.mlp.up_proj.weight", 0.0, 18),  # fan-in 40, gain 0: 2^-2.661 wanted, 2^-2.792 chosen
        ("model.layers.3.mlp.down_proj.weight", 0.0, 18),  # fan-in 96: 2^-3.292 wanted, 2^-2.792 chosen
        ("model.layers.0.self_attn.q_proj.weight", 0.0, 17),  # fan-in 40, gain 1
        ("model.embed_tokens.weight", 0.0, 21),  # width 40, gain -3
        ("model.layers.0.input_layernorm.weight", 0.0, 19),
        ("model.layers.0.post_attention_layernorm.weight", -0.5, 19),
        ("model.norm.weight", 7.0, 19),
        ("model.mm_rand_llm_norm.weight", 2.0**-5, 24),
        ("model.mm_vis.vision_model.encoder.layers.1.layer_norm2.weight", 1.0, 19),
        ("model.mm_vis.vision_model.encoder.layers.1.layer_norm2.bias", 0.0, 18),
    ],
)
def test_words_by_hand(name: str, base: float, shift: int, seed: int) -> None:
    config = VidiConfig.tiny()
    want = names.expected(config)[name]
    assert synthetic.recipe(want, config) == synthetic.Recipe(base, shift)
    found = torch.cat(list(synthetic.values(seed, want, config)))
    for i in {0, 1, 17, len(found) - 1}:
        exact = base + (sum_by_hand(seed, name, i) - 131070) / 2**shift
        assert float(found[i]) == exact  # float32 holds it exactly


def test_the_stored_bytes_by_hand(tmp_path: Path) -> None:
    synthetic.synth(tmp_path / "x", VidiConfig.tiny(), seed=5)
    index = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())["weight_map"]
    for name in ("model.layers.2.mlp.gate_proj.weight", EMBED):
        entry = read_shard(tmp_path / "x" / index[name]).tensors[name]
        stored = struct.unpack(f"<{entry.numel}H", entry.path.read_bytes()[entry.start : entry.stop])
        shift = synthetic.recipe(names.expected(VidiConfig.tiny())[name], VidiConfig.tiny()).shift
        for i in range(0, entry.numel, 97):
            assert stored[i] == bf16_by_hand((sum_by_hand(5, name, i) - 131070) / 2**shift)


def test_pinned_words() -> None:
    """Literal numbers: a change of the generator needs a new VERSION."""
    assert synthetic.sums(synthetic.keys(0, EMBED), 0, 4).tolist() == [157303, 102505, 93879, 92544]


def test_elements_far_into_a_tensor() -> None:
    """The embedding of full size has 917 million elements; pieces agree with the whole wherever they start."""
    key = synthetic.keys(3, EMBED)
    first = 917_503_990
    assert synthetic.sums(key, first, 10).tolist() == [sum_by_hand(3, EMBED, i) for i in range(first, first + 10)]
    with pytest.raises(ValueError, match="the counter has 32 bits"):
        synthetic.sums(key, 2**32 - 5, 6)


def test_pieces_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    config = VidiConfig.tiny()
    want = names.expected(config)[EMBED]
    whole = torch.cat(list(synthetic.values(0, want, config)))
    monkeypatch.setitem(synthetic._PIECE, "cpu", 1000)
    assert torch.equal(torch.cat(list(synthetic.values(0, want, config))), whole)


def test_words_are_fair() -> None:
    """Mean, spread, and neighbours, tensors and seeds unrelated: 5 sigma on 2^18 words of 4 streams."""
    count = 1 << 18
    streams = [(0, "a"), (0, "b"), (1, "a"), (1, "model.layers.0.mlp.up_proj.weight")]
    x = torch.stack([synthetic.sums(synthetic.keys(*s), 0, count) for s in streams]).double() - synthetic.MEAN
    std = math.sqrt((65536**2 - 1) / 3)
    assert (x.mean(dim=1).abs() < 5 * std / math.sqrt(count)).all()
    assert ((x.std(dim=1) / std - 1).abs() < 5 / math.sqrt(2 * count)).all()
    z = x / std
    for lag in (1, 2, 3, 64, 256, 4096):
        assert ((z[:, lag:] * z[:, :-lag]).mean(dim=1).abs() < 5 / math.sqrt(count - lag)).all()
    cross = z @ z.T / count - torch.eye(4)
    assert (cross.fill_diagonal_(0).abs() < 5 / math.sqrt(count)).all()
    assert all(len(row.unique()) > 0.4 * 262_141 for row in x)  # of 262,141 sums, many rare at the ends


def test_every_route_gives_the_same_bits(tmp_path: Path) -> None:
    """A file, loaded; a model filled in place; each dtype."""
    config = VidiConfig.tiny()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        synthetic.synth(tmp_path / str(dtype), config, 11, dtype=dtype)
        loaded = load.load(tmp_path / str(dtype), dtype=dtype).state_dict()
        made = synthetic.create(config, 11, dtype=dtype).state_dict()
        assert loaded.keys() == made.keys()
        for name in made:
            assert loaded[name].dtype == made[name].dtype
            assert torch.equal(loaded[name], made[name]), name


def test_seed_and_name_matter() -> None:
    config = VidiConfig.tiny()
    first, other = synthetic.create(config, 0), synthetic.create(config, 1)
    assert all(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    assert not torch.equal(first.decoder.layers[0].attention.k.weight, first.decoder.layers[1].attention.k.weight)


def test_meta_parameters_are_refused() -> None:
    model = load.empty_model(VidiConfig.tiny(), device="cpu", dtype=torch.float32, only=set())
    with pytest.raises(ValueError, match="171 parameters have no memory"):
        synthetic.fill_(model)


def test_gains_at_full_size() -> None:
    """std·sqrt(fan-in) of each weight of full size, and of no other size by accident."""
    config = VidiConfig.full()
    std = math.sqrt((65536**2 - 1) / 3)
    wanted = names.expected(config)
    for name, low, high in (
        ("model.layers.9.mlp.up_proj.weight", 2**-0.5, 2**0.5),
        ("model.layers.9.self_attn.k_proj.weight", 2**0.5, 2**1.5),
        ("model.mm_vis.vision_model.encoder.layers.3.mlp.fc2.weight", 2**-1.5, 2**-0.5),
        (EMBED, 2**-3.5, 2**-2.5),
    ):
        fan_in = wanted[name].shape[1]
        assert low <= std * 2.0 ** -synthetic.recipe(wanted[name], config).shift * math.sqrt(fan_in) <= high, name


def test_five_shards(tiny_folder: Path) -> None:
    files = {path.name for path in tiny_folder.iterdir()}
    assert files == {f"model-{i:05}-of-00005.safetensors" for i in range(1, 6)} | {
        "config.json",
        "model.safetensors.index.json",
    }
    assert json.loads((tiny_folder / "config.json").read_text())["mm_projector_type"] is None


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made"
    assert main(["synth", str(out), "--seed", "3"]) == 0
    assert (out / "tokenizer.json").is_file()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(["synth", str(out)]) == 2
    assert "is there and not empty" in capsys.readouterr().err
    assert main(["synth", str(out), "--seed", "3", "--force"]) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_activations_stay_of_order_one() -> None:
    """All layers of the full depth, narrow, in bf16: towers of 27 and 32 layers, a decoder of 42."""
    tiny = VidiConfig.tiny()
    config = replace(
        tiny,
        vision=replace(tiny.vision, num_layers=27),
        audio=replace(tiny.audio, num_layers=32),
        decoder=replace(tiny.decoder, num_layers=42),
    )
    model = synthetic.create(config, 0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 500, (1, 16), generator=generator)
    ids[0, 4] = -200
    image = torch.randint(0, 256, (3, 3, 26, 26), generator=generator, dtype=torch.uint8)
    audio = torch.randn(1, 16, 100, generator=generator) / 2
    rms: dict[str, float] = {}

    def tap(name: str, x: torch.Tensor) -> torch.Tensor:
        if x.is_floating_point():
            rms[name] = float(x.float().square().mean().sqrt())
        return x

    with torch.no_grad():
        logits = model(Batch(ids, None, (image,), (audio,), (100,)), tap=tap)
    assert logits.isfinite().all()
    kept = {name: value for name, value in rms.items() if name.startswith(("layer.", "vision.tower", "audio.tower"))}
    assert len(kept) > 42 * 4
    assert all(0.05 < value < 8 for value in kept.values()), {n: v for n, v in kept.items() if not 0.05 < v < 8}
    assert 0.3 < rms["logits"] < 4
    assert 2 < rms["final.norm"] < 16
