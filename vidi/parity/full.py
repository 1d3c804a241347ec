"""The full-size case: 60 frames through the full-size synthetic checkpoint, kept as sketches (`parity.sketch`).

Its goldens come from the plain path in float32, over weights rounded to bfloat16. Two budgets at every stage, both multiples
of an error in bfloat16 (`goldens/tolerances.toml`, gate bfloat16-self). *Stored*: the plain run errs no more than it did when
`NOISE` was measured, so what both paths get wrong shows. *Ratio*: the fast run errs no more than the plain one of the same run.
`SHARED` are faults of both paths that the first must see.

Frames, sound and ids come from the project's counter-based generator and are not stored; their hashes are.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stageparity import evidence, fingerprint, sketch, store, strict, tolerance, writer
from stageparity.faults.plant import Fault, planted
from stageparity.golden import Golden, GoldenError, Sketched, Whole
from stageparity.manifest import content_sha256
from stageparity.sketch import Sketch, SketchSpec
from vidi import precision
from vidi.checkpoint import synthetic
from vidi.config import VidiConfig
from vidi.fast import accelerate
from vidi.inputs.batch import Batch
from vidi.model import VidiModel
from vidi.parity.goldens import goldens_dir
from vidi.parity.stages import STAGES

__all__ = [
    "CASE", "FOLDER", "NOISE", "SHARED", "FullCase", "FullRun", "StageRatio", "inputs", "judge", "make", "provenance", "run",
    "sketched",
]  # fmt: skip

CASE, FOLDER = "frames60", Path("large") / "full"  # two folders down: the suite of whole tensors does not see it
NOISE = Path("measured") / "full.json"  # in a golden folder; tools/make_full_golden.py --noise
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


def _sketch_run(
    runner: Any, batch: Batch, like: Mapping[str, Golden] | None = None, wanted: Collection[str] | None = None
) -> dict[str, Golden]:
    """Every stage of one pass, or those wanted; attention taken apart is left out (its results are `t2v` and `t2a`)."""
    found: dict[str, Golden] = {}

    def tap(stage: str, x: Tensor) -> Tensor:
        if not stage.startswith("xattn.") and (wanted is None or stage in wanted):
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
    """Errors of both bfloat16 runs at one stage, as multiples of the golden's rms, the plain path's stored one (none: not
    judged by it), the limit of each ratio, and the floor below which none counts."""

    stage: str
    plain: Mapping[str, float]
    fast: Mapping[str, float]
    limits: Mapping[str, float]
    problem: str = ""
    stored: Mapping[str, float] = field(default_factory=dict)

    def within(self, found: Mapping[str, float], unit: Mapping[str, float]) -> bool:
        """Are errors within the limits, as multiples of those of ``unit``?"""
        return not self.problem and all(
            e <= self.limits[m] * unit[m] + self.limits["floor"] for m, e in found.items() if m in unit
        )

    @property
    def ok(self) -> bool:
        return self.within(self.fast, self.plain) and self.within(self.plain, self.stored)

    def text(self) -> str:
        if self.problem:
            return f"{self.stage}: {self.problem}"
        said = [f"fast over plain {self._ratios(self.fast, self.plain)}"]
        if self.stored:
            said.append(f"plain over stored {self._ratios(self.plain, self.stored)}")
        return f"{self.stage}: {'; '.join(said)}{'' if self.ok else '   <-- over'}"

    def _ratios(self, found: Mapping[str, float], unit: Mapping[str, float]) -> str:
        return ", ".join(
            f"{m} {e:.2e} / {unit[m]:.2e} = {e / max(unit[m], self.limits['floor']):.2f} (of {self.limits[m]})"
            for m, e in found.items()
        )


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

    @property
    def most_moved(self) -> str | None:
        """The stage with the largest ratio of rms errors, plain over stored; None where none is stored."""
        judged = [s for s in self.stages if s.stored.get("rms")]
        worst = max(judged, key=lambda s: s.plain["rms"] / s.stored["rms"], default=None)
        return None if worst is None else worst.text()

    def text(self) -> str:
        """Failures first, then the largest ratios."""
        lines = [f"full size on {self.device}: {len(self.stages)} stages, {len(self.over)} over"]
        lines += ["  " + line for line in self.over]
        if self.largest is not None:
            lines.append("  largest ratio of rms errors, fast over plain: " + self.largest)
            lines.append(f"  plain over stored: {self.most_moved or f'NOT RUN, {NOISE} is not in {self.goldens}'}")
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
            "most_moved": self.most_moved,
            "figures": {s.stage: [s.fast, s.plain] for s in self.stages},
        }


def judge(
    golden: Mapping[str, Golden],
    plain: Mapping[str, Golden],
    fast: Mapping[str, Golden],
    limits: Mapping[str, float],
    noise: Mapping[str, Mapping[str, float]],
) -> list[StageRatio]:
    """Every golden stage: exact ones bit for bit, in both runs, the others by the ratios of errors. noise: stage -> errors of
    the plain path, as stored; a stage that it lacks is a failure where it has others."""
    rows = []
    for stage in STAGES.sort(golden):
        if stage not in plain or stage not in fast:
            rows.append(StageRatio(stage, {}, {}, {}, "missing: a run produced no tensor of this id"))
            continue
        truth, both = golden[stage], (plain[stage], fast[stage])
        if wrong := [found.shape for found in both if found.shape != truth.shape]:
            rows.append(StageRatio(stage, {}, {}, {}, f"shape {wrong[0]}, golden has {truth.shape}"))
        elif STAGES.is_exact(stage):
            same = isinstance(truth, Whole) and all(
                isinstance(found, Whole) and np.array_equal(truth.array, found.array) for found in both
            )
            rows.append(StageRatio(stage, {}, {}, {}, "" if same else "exact values differ"))
        elif noise and stage not in noise:
            rows.append(StageRatio(stage, {}, {}, {}, f"{NOISE} does not have it: measure it again"))
        else:
            first, second = (_errors(found, truth) for found in both)
            rows.append(StageRatio(stage, first, second, limits, stored=noise.get(stage, {})))
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


class FullCase:
    """The stored case, the budgets that judge it, and both bfloat16 paths over its inputs.

    Raises GoldenError where the case cannot be trusted, or its inputs are no longer those that the generator makes.
    """

    def __init__(self, goldens: Path | str | None = None, *, device: str = "cuda", folder: Path | None = None) -> None:
        self.goldens, self.device = goldens_dir(goldens), torch.device(device)
        case = store.open_case(folder or self.goldens / FOLDER, CASE)
        gate = tolerance.load(self.goldens, STAGES).gates[GATE]
        self.limits = {m: float(gate[f"c_{m}"]) for m in METRICS} | {"floor": float(gate["floor_ulp"] * gate["eps"])}
        #: of the plain path, by stage and metric; that of another folder's case is another
        self.noise = stored_noise(self.goldens) if folder is None else {}
        self.config, self.num_frames = VidiConfig.from_official(case.config), case.info["num_frames"]
        arrays = inputs(self.config, self.num_frames)
        for name, wanted in case.info["inputs_sha256"].items():
            if content_sha256(arrays[name]) != wanted:
                raise GoldenError(f"{case.name}: {name} is not what the case was made from: regenerate the case")
        self.golden = dict(case.variant(VARIANT).items())
        self.batch = _batch(arrays, self.device, torch.bfloat16)

    def build(self, config: VidiConfig | None = None) -> VidiModel:
        """The case's weights, under its configuration or another that they fit."""
        model = synthetic.create(config or self.config, SEED, device=self.device, dtype=torch.bfloat16)
        model.frame_chunk = self.num_frames
        return model

    def passes(
        self, model: VidiModel, fault: Fault | None = None, upto: str | None = None
    ) -> tuple[dict[str, Golden], dict[str, Golden]]:
        """What the plain and the fast path make of it, sketched, up to a stage (in pipeline order)."""
        wanted = {x for x in self.golden if upto is None or STAGES.order(x) <= STAGES.order(upto)}
        with planted(fault, model) if fault else contextlib.nullcontext():
            plain = _sketch_run(model, self.batch, self.golden, wanted)
            gc.collect()
            runner = accelerate(model, frame_batch=self.num_frames)
            return plain, _sketch_run(runner, self.batch, self.golden, wanted)

    def judge(self, plain: Mapping[str, Golden], fast: Mapping[str, Golden]) -> list[StageRatio]:
        """All stages of the case."""
        return judge(self.golden, plain, fast, self.limits, self.noise)

    def first_over(self, stages: Mapping[str, Golden]) -> str | None:
        """The first stage at which one path leaves what is stored of the plain one, by the limits of both ratios: what the fast
        path may err at most."""
        limits = {m: x * x if m != "floor" else x for m, x in self.limits.items()}
        golden = {stage: truth for stage, truth in self.golden.items() if stage in stages}
        rows = judge(golden, stages, stages, limits, self.noise)
        return next((row.stage for row in rows if not row.within(row.plain, row.stored)), None)


def run(goldens: Path | str | None = None, *, device: str = "cuda", folder: Path | None = None) -> FullRun:
    """Both bfloat16 runs against the stored case. ``folder``: where it lies, if not among the goldens. Raises as `FullCase`."""
    case = FullCase(goldens, device=device, folder=folder)
    rows = case.judge(*case.passes(case.build()))
    name = torch.cuda.get_device_name(case.device) if case.device.type == "cuda" else "CPU"
    return FullRun(tuple(rows), name, case.goldens)


def stored_noise(goldens: Path) -> dict[str, dict[str, float]]:
    """`NOISE` of a golden folder: stage -> error of the plain path in bfloat16 by metric; empty without the file."""
    try:
        body = strict.read_json(goldens / NOISE, inside=goldens)
        return {stage: {m: float(e) for m, e in own.items()} for stage, own in body["stages"].items()}
    except strict.Missing:
        return {}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise GoldenError(f"{goldens / NOISE}: damaged ({type(error).__name__})") from None


# ---- faults of both paths -------------------------------------------------------------------------------------------


def _heads(config: VidiConfig, tower: str) -> VidiConfig:
    """The next number of heads that divides the tower's width: real weights load, and answers are wrong."""
    own = getattr(config, tower)
    heads = next(n for n in range(own.num_heads + 1, own.hidden_size + 1) if own.hidden_size % n == 0)
    return replace(config, **{tower: replace(own, num_heads=heads)})


def _decoder(**change: Callable[[Any], Any]) -> Callable[[VidiConfig], VidiConfig]:
    """Fields of the decoder's configuration, each made of itself."""

    def changed(config: VidiConfig) -> VidiConfig:
        own = {name: make(getattr(config.decoder, name)) for name, make in change.items()}
        return replace(config, decoder=replace(config.decoder, **own))

    return changed


#: Stage that must report it -> faults of what both paths read: code, by name in `vidi.parity.faults`, or a configuration.
SHARED: Mapping[str, Mapping[str, Callable[[VidiConfig], VidiConfig] | None]] = {
    "vision.tower": {
        "more heads": lambda config: _heads(config, "vision"),
        "towers.positions_transposed": None,
        "towers.positions_shifted": None,
    },
    "vision.pad": {"bridge.pad_top_left": None, "bridge.pad_columns_first": None, "bridge.pad_by_stretching": None},
    "vision.space_to_depth": {"bridge.fold_channels_last": None, "bridge.fold_dx_before_dy": None},
    "vision.llm_norm": {"norms.llm_norm_initial": None},
    "vision.pos_h.embed": {
        "position.extent_off_by_one": None,
        "position.halves_not_interleaved": None,
        "position.cosine_first": None,
        "position.height_and_width_exchanged": None,
    },
    "vision.pos_t.embed.0": {"position.time_in_frames": None, "dtypes.positions_in_half": None},
    "vision.packed": {"packing.flattened_columns_first": None},
    "audio.tower": {"more heads": lambda config: _heads(config, "audio"), "towers.whisper_positions_reversed": None},
    "audio.trim": {"audio.one_position_late": None},
    "audio.pool": {"audio.pool_backwards": None},
    "audio.pos_t.embed.0": {"position.audio_time_in_visual_steps": None},
    "text.embeds": {"text.ids_off_by_one": None, "text.packed_backwards": None, "text.embedding_scaled_early": None},
    "layer.0.input": {"text.factor_omitted": None, "text.factor_is_width": None},
    "rope.cos": {"rotation.rope_exponent": None, "theta": _decoder(rope_theta=lambda theta: theta / 2)},
    "layer.0.t2t": {"scale": _decoder(query_pre_attn_scalar=lambda scalar: scalar / 2)},
    "logits": {"a tenth of the cap": _decoder(final_softcap=lambda cap: 0.1 * cap)},
}
