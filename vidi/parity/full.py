"""The full-size case: 60 frames through the full-size synthetic checkpoint, kept as sketches (`parity.sketch`).

Its goldens come from the plain path in float32, over weights rounded to bfloat16: they prove that the fast path computes
what the plain one does, at the released size. The judge is a ratio: at every stage the fast bfloat16 run's error must
stay within a factor of the plain bfloat16 run's own error (`goldens/tolerances.toml`, gate bfloat16-self), both measured
in the same run against the same sketch.

Frames, sound and ids come from the project's counter-based generator and are not stored; their hashes are.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stageparity import evidence, fingerprint, sketch, store, tolerance, writer
from stageparity.golden import Golden, GoldenError, Sketched, Whole
from stageparity.manifest import content_sha256
from stageparity.sketch import Sketch, SketchSpec
from vidi import precision
from vidi.checkpoint import synthetic
from vidi.config import VidiConfig
from vidi.fast import accelerate
from vidi.inputs.batch import Batch
from vidi.parity.goldens import goldens_dir
from vidi.parity.stages import STAGES

__all__ = ["CASE", "FOLDER", "FullRun", "StageRatio", "inputs", "judge", "make", "provenance", "run", "sketched"]

CASE, FOLDER = "frames60", Path("large") / "full"  # two folders down: the suite of whole tensors does not see it
GATE, VARIANT, SEED = "bfloat16-self", "self", 0
SPEC = SketchSpec(block_rows=4096, column_buckets=128)  # 2 MB for 400 stages; norms within 2.3 %
WHOLE = 4096  # tensors of up to so many values are kept whole
TEXT, PLACEHOLDER_AT = 25, 5
METRICS = ("rms", "row", "max")


# ---- inputs ---------------------------------------------------------------------------------------------------------


def inputs(config: VidiConfig, num_frames: int, seed: int = SEED) -> dict[str, np.ndarray]:
    """Frames (F, 3, S, S) uint8, log-mel (P, M, frames) float32, ids (1, T) int64, the sound as long as the video."""
    side, a = config.vision.image_size, config.audio
    mel_frames = max(num_frames * a.mel_frames // 30, 2 * config.audio_pool_size)
    pieces = -(-mel_frames // a.mel_frames)
    frames = _words(seed, 100, num_frames * 3 * side * side) >> np.uint64(56)
    mel = _words(seed, 101, pieces * a.num_mel_bins * a.mel_frames)
    # Four 16-bit words added up: nearly normal, exact in float32, spread about 0.29.
    halves = (mel & np.uint64(0x0000FFFF0000FFFF)) + ((mel >> np.uint64(16)) & np.uint64(0x0000FFFF0000FFFF))
    quarter = (halves & np.uint64(0xFFFFFFFF)) + (halves >> np.uint64(32))
    ids = 3 + _words(seed, 102, TEXT) % np.uint64(config.decoder.vocab_size - 3)
    ids_1T = ids.astype(np.int64)[None]
    ids_1T[0, PLACEHOLDER_AT] = config.image_placeholder
    return {
        "inputs.images_u8.0": frames.astype(np.uint8).reshape(num_frames, 3, side, side),
        "inputs.audios.0": (quarter.astype(np.float32) / 131072 - 1).reshape(pieces, a.num_mel_bins, a.mel_frames),
        "inputs.audio_sizes": np.array([mel_frames]),
        "inputs.input_ids": ids_1T,
    }


def _words(seed: int, stream: int, count: int) -> np.ndarray:
    return sketch.words(seed, stream, np.arange(count, dtype=np.uint64))


def _batch(arrays: Mapping[str, np.ndarray], device: torch.device, dtype: torch.dtype) -> Batch:
    images, audio, sizes, ids = (torch.from_numpy(arrays[name]) for name in arrays)
    # The sound is rounded to bfloat16 for every run: the error of a run is one of arithmetic.
    audio = audio.to(torch.bfloat16)
    return Batch(ids, None, (images,), (audio,), tuple(sizes.tolist())).to(device, dtype)


# ---- sketches on the device -----------------------------------------------------------------------------------------


def sketched(stage: str, x: Tensor, spec: SketchSpec = SPEC, like: Golden | None = None) -> Golden:
    """A stage's tensor as a golden: whole if it is exact or small, else its sketch, computed where the tensor lies.

    ``like``: the golden to compare with, whose largest entries are looked up. Raises GoldenError for NaN or Inf.
    """
    name = str(x.dtype).removeprefix("torch.")
    if not x.is_floating_point() or x.numel() <= WHOLE:
        return Whole((x.float() if x.is_floating_point() else x).cpu().numpy(), name)
    if not torch.isfinite(x).all():
        raise GoldenError(f"{stage} holds NaN or Inf: nothing to sketch")
    where, _ = STAGES.axes(stage).of(x.ndim)
    matrix = x.movedim(where, tuple(range(len(where)))).reshape(math.prod(x.shape[a] for a in where), -1)
    rows, columns = matrix.shape
    blocks, block_max, sum_squares = [], [], 0.0
    for start in range(0, rows, spec.block_rows):
        block = matrix[start : start + spec.block_rows].double()
        left, right = (torch.from_numpy(m).to(x.device) for m in sketch.projections(spec, start, len(block), columns))
        blocks.append((left @ block @ right).float().cpu().numpy())
        block_max.append(block.abs().max().item())
        sum_squares += block.square().sum().item()
    flat = matrix.reshape(-1)
    if isinstance(like, Sketched):
        places = torch.from_numpy(like.sketch.top_index).to(x.device)
    else:
        places = flat.abs().topk(min(spec.top, flat.numel())).indices
    samples = torch.from_numpy(sketch.sample_index(flat.numel(), spec.samples)).to(x.device)
    made = Sketch(
        *(spec, rows, columns, np.stack(blocks), np.array(block_max)),
        *(places.cpu().numpy(), flat[places].double().cpu().numpy(), flat[samples].double().cpu().numpy(), sum_squares),
    )
    return Sketched(tuple(x.shape), name, made)


def _sketch_run(runner: Any, batch: Batch, like: Mapping[str, Golden] | None = None) -> dict[str, Golden]:
    """Every stage of one pass; attention taken apart is left out (its results are `t2v` and `t2a`)."""
    found: dict[str, Golden] = {}

    def tap(stage: str, x: Tensor) -> Tensor:
        if not stage.startswith("xattn."):
            assert stage not in found, f"{stage} came in parts; frames must pass in one batch"
            found[stage] = sketched(stage, x, like=None if like is None else like.get(stage))
        return x

    with torch.no_grad(), fingerprint.ieee():
        runner(batch, tap=tap)
    return found


# ---- making, judging ------------------------------------------------------------------------------------------------


def make(
    config: VidiConfig | None = None, *, device: str = "cuda", num_frames: int = 60, commit: str = "unknown"
) -> writer.NewCase:
    """The case, to be written by a tool: the plain path in float32 over weights rounded to bfloat16."""
    config, where = config or VidiConfig.full(), torch.device(device)
    arrays = inputs(config, num_frames)
    model = synthetic.create(config, SEED, device=where, dtype=torch.bfloat16)
    precision.cast_model(model, torch.float32)
    model.frame_chunk = num_frames
    targets = _sketch_run(model, _batch(arrays, where, torch.float32))
    with fingerprint.ieee():
        ran_on = fingerprint.fingerprint(where)
    return writer.NewCase(
        name=CASE,
        provenance=provenance(ran_on, SEED, commit),
        config=config.to_official(),
        inputs={name: arrays[name] for name in ("inputs.input_ids", "inputs.audio_sizes")},
        targets={VARIANT: targets},
        weights={},
        info={
            "num_frames": num_frames,
            "generator": sketch.VERSION,
            "weights": synthetic.VERSION,
            "inputs_sha256": {name: content_sha256(array) for name, array in arrays.items()},
        },
        left_out={"xattn.*": "too large; layer.*.t2v and t2a are its results"},
    )


def provenance(ran_on: Mapping[str, Any], seed: int, commit: str) -> dict[str, Any]:
    """What the manifest says about where the numbers come from. ran_on: the fingerprint of the run."""
    return {
        "origin": "self",
        "dtype": "float32",
        "path": "plain, float32, weights rounded to bfloat16",
        "libraries": ran_on["libraries"],
        "device": ran_on["device"],
        "seed": seed,
        "commit": commit,
        "fingerprint": dict(ran_on),
    }


@dataclass(frozen=True)
class StageRatio:
    """Errors of both bfloat16 runs at one stage, as multiples of the golden's rms, the limit of each ratio, and
    the floor below which none counts."""

    stage: str
    plain: Mapping[str, float]
    fast: Mapping[str, float]
    limits: Mapping[str, float]
    problem: str = ""

    @property
    def ok(self) -> bool:
        return not self.problem and all(
            e <= self.limits[m] * self.plain[m] + self.limits["floor"] for m, e in self.fast.items()
        )

    def text(self) -> str:
        if self.problem:
            return f"{self.stage}: {self.problem}"
        parts = (
            f"{m} {e:.2e} / {self.plain[m]:.2e} = {e / max(self.plain[m], self.limits['floor']):.2f} (of {self.limits[m]})"
            for m, e in self.fast.items()
        )
        return f"{self.stage}: {', '.join(parts)}{'' if self.ok else '   <-- over'}"


@dataclass(frozen=True)
class FullRun:
    stages: tuple[StageRatio, ...]
    device: str
    goldens: Path = Path()  #: the folder that judged it

    @property
    def exit_code(self) -> int:
        """0 every stage is within its limits, 1 some are not, 3 nothing was compared."""
        return 3 if not self.stages else int(not all(s.ok for s in self.stages))

    @property
    def over(self) -> list[str]:
        return [s.text() for s in self.stages if not s.ok]

    @property
    def largest(self) -> str | None:
        """The stage with the largest ratio of rms errors, fast over plain."""
        judged = [s for s in self.stages if s.plain.get("rms")]
        worst = max(judged, key=lambda s: s.fast["rms"] / s.plain["rms"], default=None)
        return None if worst is None else worst.text()

    def text(self) -> str:
        """Failures first, then the largest ratio."""
        lines = [f"full size on {self.device}: {len(self.stages)} stages, {len(self.over)} over"]
        lines += ["  " + line for line in self.over]
        if self.largest is not None:
            lines.append("  largest ratio of rms errors, fast over plain: " + self.largest)
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """The same for `vidi parity --size full --json`, with every stage's errors, and what it was measured on."""
        root, refs = Path(__file__).resolve().parents[2], store.list_cases(self.goldens / FOLDER)
        basis = evidence.Basis(
            evidence.code(["vidi/parity/full.py"], root, evidence.ASIDE),
            evidence.goldens(refs),
            evidence.budgets(self.goldens, [f"{ref.set}/{ref.name}" for ref in refs]),
        )
        return {
            "measured_on": evidence.measured_on(basis, root, self.device),
            "stages": len(self.stages),
            "over": self.over,
            "largest": self.largest,
            "figures": {s.stage: [s.fast, s.plain] for s in self.stages},
        }


def judge(
    golden: Mapping[str, Golden], plain: Mapping[str, Golden], fast: Mapping[str, Golden], limits: Mapping[str, float]
) -> list[StageRatio]:
    """Every golden stage: exact ones bit for bit, the others by the ratio of errors."""
    rows = []
    for stage in STAGES.sort(golden):
        if stage not in plain or stage not in fast:
            rows.append(StageRatio(stage, {}, {}, {}, "missing: a run produced no tensor of this id"))
            continue
        truth, mine = golden[stage], fast[stage]
        if truth.shape != mine.shape:
            rows.append(StageRatio(stage, {}, {}, {}, f"shape {mine.shape}, golden has {truth.shape}"))
        elif STAGES.is_exact(stage):
            same = isinstance(truth, Whole) and isinstance(mine, Whole) and np.array_equal(truth.array, mine.array)
            rows.append(StageRatio(stage, {}, {}, {}, "" if same else "exact values differ"))
        else:
            rows.append(StageRatio(stage, _errors(plain[stage], truth), _errors(mine, truth), limits))
    return rows


def _errors(found: Golden, truth: Golden) -> dict[str, float]:
    """rms, worst block and largest known entry of the error, as multiples of the golden's rms."""
    if isinstance(found, Whole) and isinstance(truth, Whole):
        d = found.array.astype(np.float64) - truth.array.astype(np.float64)
        scale = math.sqrt(np.square(truth.array.astype(np.float64)).mean())
        return {"rms": math.sqrt(np.square(d).mean()) / scale, "max": float(np.abs(d).max()) / scale}
    assert isinstance(found, Sketched)
    assert isinstance(truth, Sketched)
    mine, theirs = found.sketch, truth.sketch
    scale = math.sqrt(theirs.sum_squares / (theirs.rows * theirs.columns))
    norms = sketch.error_norms(mine, theirs)
    starts = np.arange(len(norms)) * theirs.spec.block_rows
    counts = np.minimum(theirs.spec.block_rows, theirs.rows - starts) * theirs.columns
    known = np.abs(np.concatenate([mine.top_value - theirs.top_value, mine.sample_value - theirs.sample_value]))
    return {
        "rms": math.sqrt(np.square(norms).sum() / counts.sum()) / scale,
        "row": float((norms / np.sqrt(counts)).max()) / scale,
        "max": float(known.max()) / scale,
    }


def run(goldens: Path | str | None = None, *, device: str = "cuda", folder: Path | None = None) -> FullRun:
    """Both bfloat16 runs against the stored case. ``folder``: where the case lies, if not among the goldens.

    Raises GoldenError where the case cannot be trusted, or its inputs are no longer those that the generator makes.
    """
    root = goldens_dir(goldens)
    case = store.open_case(folder or root / FOLDER, CASE)
    gate = tolerance.load(root, STAGES).gates[GATE]
    limits = {m: float(gate[f"c_{m}"]) for m in METRICS} | {"floor": float(gate["floor_ulp"] * gate["eps"])}
    config, where = VidiConfig.from_official(case.config), torch.device(device)
    arrays = inputs(config, case.info["num_frames"])
    for name, wanted in case.info["inputs_sha256"].items():
        if content_sha256(arrays[name]) != wanted:
            raise GoldenError(f"{case.name}: {name} is not what the case was made from: regenerate the case")
    golden = dict(case.variant(VARIANT).items())
    batch = _batch(arrays, where, torch.bfloat16)
    model = synthetic.create(config, SEED, device=where, dtype=torch.bfloat16)
    model.frame_chunk = case.info["num_frames"]
    plain = _sketch_run(model, batch, golden)
    gc.collect()
    fast = _sketch_run(accelerate(model, frame_batch=case.info["num_frames"]), batch, golden)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "CPU"
    return FullRun(tuple(judge(golden, plain, fast, limits)), name, root)
