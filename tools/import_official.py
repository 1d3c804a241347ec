"""Turn a folder of recordings of the official release into golden cases.

    python tools/import_official.py SRC DST [--full] [--case NAME ...] [--dtype f32 ...] [--reason "..."]

SRC holds `CASE.DTYPE.safetensors` with a `.json` beside each, and `weights.safetensors`. DST becomes a golden set: a
case CASE for float32 recordings, CASE.DTYPE for the others. Which model it is, sizes, seed and the subset of cases are
read from the files. What is no target is left out with its reason in the manifest. By default cases are thinned for git; --full
keeps all rows.

    python tools/import_official.py --pos-freq GOLDENS WIDTH [WIDTH ...]

stores the table pos.freq, made by torch on this CPU, for decoder widths, where recordings do not hold it; nothing else
may make it.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import re
import struct
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stageparity import ledger, strict, strict_safetensors
from stageparity.golden import Golden, GoldenError, Sampled, Whole, stats_of, whole
from stageparity.manifest import parse, set_sha256
from stageparity.store import verify
from stageparity.writer import NewCase, replaced, write_case, write_weights
from vidi import cli
from vidi.parity.goldens import position_table
from vidi.parity.stages import STAGES

__all__ = ["import_recordings", "main", "pos_freq", "store_pos_freq", "thin"]

DTYPES = {"f32": "float32", "f64": "float64", "bf16": "bfloat16", "f16": "float16"}
_ST_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U8": "u1", "BOOL": "?",
}  # fmt: skip
_SAMPLE_PARTS = ("sample", "sample_index", "row_sum", "stats")

CACHED_RUN = "the release's cached decoding, which disagrees with the uncached pass once the text passes the window"
CALLS = "describes the release's calls (lengths and positions it passed), not the mathematics"
CACHED_SAME = "the release's cached decoding, which without a window equals the uncached pass: that one is the target"
NARROW = "an uncached run with the narrower window of the release's cache: the release's own deviation"
SILENT = (
    "the release marks a silent sample's rows as kept and multiplies by a gate; a correct mask keeps none,"
    " so its masks and unpadded tensors differ by design"
)
MARKER = "a marker, not a tensor: the inputs equal those of case batch"
FROM_U8 = "equals u8/127.5 - 1 in float32 of the bytes that are kept"
NO_TORCH = "torch is not installed and the table is not stored: pos.freq cannot be made without it"
ROPE = "the table inside rope.cos and rope.sin, which are targets"
TABLES = "tables.safetensors"  # where the release's own tables are recorded
CONV = "model.mm_rand_img_pool.conv.weight"  # the 7B has it, the 9B folds patches instead
COMMITS = {
    "dattn_gemma2": "unmodified model code of the release of January 2026; the recordings name no commit",
    "dattn_mistral": "unmodified model code of the 7B's release; the recordings name no commit",
}
TIED = "equals model.embed_tokens.weight (tied); released files omit it"

# Thinning for git: elements kept of a tensor that is already sampled, and of a whole one outside the single-sample
# case. The sums of all rows stay, so a wrong row is seen whether or not it is among those kept.
THIN_SAMPLE = 4_000
THIN_WHOLE = 12_000
MAX_JSON_BYTES = 64 << 20  # of what describes a recorded case


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors, bfloat16 upcast to float32 (lossless), and the sha256 of each one's raw bytes."""
    raw = strict.read_bytes(path, limit=strict_safetensors.MAX_BYTES)
    try:
        return _parsed(path, raw)
    except (
        struct.error,
        KeyError,
        TypeError,
        AttributeError,
        ValueError,
    ) as error:
        raise GoldenError(f"{path}: no readable safetensors file ({error}); copy the recording again") from None


def _parsed(path: Path, raw: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    (length,) = struct.unpack("<Q", raw[:8])
    header = strict.parse_json(raw[8 : 8 + length])
    tensors, hashes = {}, {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _ST_DTYPES:
            raise GoldenError(f"{path.name}: {name} has dtype {entry['dtype']}; known are {', '.join(_ST_DTYPES)}")
        start, end = entry["data_offsets"]
        data = raw[8 + length + start : 8 + length + end]
        array = np.frombuffer(data, _ST_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "BF16":
            array = (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
        tensors[name], hashes[name] = array, hashlib.sha256(data).hexdigest()
    return tensors, hashes


def pos_freq(width: int, stored: Path | None = None) -> np.ndarray | None:
    """The float32 table (width/2,): from `stored` (pos_freq.safetensors), the embedded one, or made by torch on the CPU;
    None without any.
    """
    if stored is not None and stored.exists():
        tables = strict_safetensors.read_safetensors(stored)
        if str(width) in tables:
            return tables[str(width)]
    if (embedded := position_table(width)) is not None:
        return embedded
    try:
        import torch
    except ImportError:
        return None
    return torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * (-math.log(10000.0) / width)).numpy()


def store_pos_freq(goldens: Path, widths: Iterable[int]) -> None:
    """Add tables for widths to GOLDENS/pos_freq.safetensors; a width that is already there stays as it is."""
    path = goldens / "pos_freq.safetensors"
    tables = strict_safetensors.read_safetensors(path) if path.exists() else {}
    for width in widths:
        table = pos_freq(width, path)
        if table is None:
            raise GoldenError(NO_TORCH)
        tables[str(width)] = table
    write_weights(goldens, path.name, tables)


def import_recordings(
    src: Path,
    dst: Path,
    *,
    full: bool = False,
    cases: Iterable[str] | None = None,
    dtypes: Iterable[str] = tuple(DTYPES),
    reason: str | None = None,
) -> list[str]:
    """Import recordings from `src` as the golden set `dst`, replacing it in one step. Returns the names of its cases.

    full: keep every recorded row instead of thinning for git. cases: only these (names without dtype).
    dtypes: only these (f32, f64, bf16, f16). reason: why, for an entry in the ledger beside the set; without one none
    is made. Raises GoldenError for a recording that contradicts its json.
    """
    wanted = None if cases is None else set(cases)
    found = []
    for path in sorted(src.glob("*.*.json")):
        name, _, short = path.stem.rpartition(".")
        if (
            short in set(dtypes) & set(DTYPES)
            and path.with_suffix(".safetensors").exists()
            and (wanted is None or name in wanted)
        ):
            found.append((name, short))
    there = sorted({path.stem for path in src.glob("*.*.json") if path.with_suffix(".safetensors").exists()})
    if not found and there:
        raise GoldenError(f"{src}: none of the recordings is asked for; there are {', '.join(there)}")
    if not found:
        raise GoldenError(f"{src}: no recordings CASE.DTYPE.safetensors with .json, DTYPE one of {', '.join(DTYPES)}")

    if not (src / "weights.safetensors").is_file():
        raise GoldenError(f"{src}: weights.safetensors is missing; every case is judged with the recorded weights")
    _check_target(dst)

    def record() -> None:
        if reason:
            ledger.append(dst.parent, dst.name, set_sha256(dst), reason)

    with replaced(dst, record=record) as draft:
        for old in (*draft.glob("*.h5"), *draft.glob("*.json"), *draft.glob("*.safetensors")):
            old.unlink()
        weights, _ = read_safetensors(src / "weights.safetensors")
        head = weights.get("lm_head.weight")
        tied = head is not None and np.array_equal(head, weights["model.embed_tokens.weight"])
        if tied:
            del weights["lm_head.weight"]
        named = write_weights(draft, "weights.safetensors", weights)
        kind = "dattn_mistral" if CONV in weights else "dattn_gemma2"
        for name, short in found:
            with strict.shaped(src / f"{name}.{short}.json"):
                case = _Recording(src, name, short, full, dst.parent / "pos_freq.safetensors").case(named, tied, kind)
            write_case(draft, case, compress=not full)
        verify(draft)
    return [name if short == "f32" else f"{name}.{short}" for name, short in found]


def _check_target(dst: Path) -> None:
    """An import replaces all of DST: refuse a folder that holds anything but a golden set."""
    if not dst.exists():
        return
    if not dst.is_dir():
        raise GoldenError(f"{dst}: a file; give a folder for the golden set")
    manifests = {path: parse(path) for path in dst.glob("*.json") if path.with_suffix(".h5").exists()}
    own = {path.name for path in manifests} | {path.with_suffix(".h5").name for path in manifests}
    own |= {body["weights"].get("file") for body in manifests.values()}
    if foreign := sorted(path.name for path in dst.iterdir() if path.name not in own):
        some = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
        raise GoldenError(
            f"{dst}: holds {some}, no part of a golden set; an import replaces the folder: choose another"
        )


class _Recording:
    """One recorded case in one dtype."""

    def __init__(self, src: Path, name: str, short: str, full: bool, table: Path) -> None:
        self.name, self.short, self.full, self.table = name, short, full, table
        self.json = strict.read_json(src / f"{name}.{short}.json", limit=MAX_JSON_BYTES)
        self.tables = read_safetensors(src / TABLES)[0] if (src / TABLES).exists() else {}
        self.tensors, hashes = read_safetensors(src / f"{name}.{short}.safetensors")
        self.left_out: dict[str, str] = {}
        self.goldens = self._read(hashes)

    def case(self, weights: Mapping[str, str], tied: bool, kind: str) -> NewCase:
        """The golden case: inputs, targets and what is left out. kind: the model_type, which recordings do not say."""
        config = self._config(kind)
        if tied:
            self.left_out["lm_head.weight"] = TIED
        inputs = self._take_inputs()
        self._leave_out()
        if any(stage.startswith("vision.") for stage in self.goldens):
            table = self.tables.get("pos.freq")
            table = pos_freq(config["hidden_size"], self.table) if table is None else table
            if table is None:
                self.left_out["pos.freq"] = NO_TORCH
            elif table.shape != (config["hidden_size"] // 2,):
                raise GoldenError(f"{TABLES}: pos.freq has shape {list(table.shape)}; hidden_size needs half of it")
            else:
                self.goldens["pos.freq"] = whole(table)
        targets = self.goldens if self.full else self._thinned()
        return NewCase(
            name=self.name if self.short == "f32" else f"{self.name}.{self.short}",
            provenance={
                "origin": "official",
                "dtype": DTYPES[self.short],
                "libraries": {key: self.json[key] for key in ("torch", "transformers", "numpy") if key in self.json},
                "device": "cpu",
                "threads": self.json.get("args", {}).get("threads"),
                "seed": self.json.get("seed"),
                "commit": COMMITS[kind],
                "pos.freq": "recorded" if self.tables else "torch.exp on a CPU (not part of the recordings)",
            },
            config=config,
            info=self._info(),
            inputs=inputs,
            targets={"recorded": targets},
            weights=weights,
            left_out=self.left_out,
        )

    def _config(self, kind: str) -> dict[str, Any]:
        """The official dict, with what this case alone has, and the towers' configs inside."""
        config = {**self.json["llm_config"]}
        if kind != "dattn_gemma2":  # what a config without model_type is taken for
            config.setdefault("model_type", kind)
        if "sliding_window" in self.json["info"]:
            config["sliding_window"] = self.json["info"]["sliding_window"]
        return config | {key: self.json[key] for key in ("vision_config", "audio_config")}

    def _read(self, hashes: Mapping[str, str]) -> dict[str, Golden]:
        """Join the parts of sampled tensors, and hold everything against the json."""
        listed: Mapping[str, Any] = self.json["tensors"]
        found: dict[str, Golden] = {}
        for name, entry in listed.items():
            dtype = str(entry["dtype"]).removeprefix("torch.")
            if name in self.tensors:
                array = self.tensors[name]
                if list(array.shape) != entry["shape"] or hashes[name] != entry["sha256"]:
                    raise GoldenError(
                        f"{self.name}.{self.short}: {name} is not what its json describes (shape or sha256)"
                    )
                found[name] = Whole(array, dtype)
            else:
                found[name] = self._sampled(name, entry, dtype)
        parts = {f"{name}.{part}" for name in listed for part in _SAMPLE_PARTS}
        extra = sorted(set(self.tensors) - set(listed) - parts)
        if extra:
            raise GoldenError(f"{self.name}.{self.short}: tensors that the json does not list: {', '.join(extra[:3])}")
        return found

    def _sampled(self, name: str, entry: Mapping[str, Any], dtype: str) -> Sampled:
        missing = [part for part in _SAMPLE_PARTS if f"{name}.{part}" not in self.tensors]
        if missing:
            raise GoldenError(
                f"{self.name}.{self.short}: {name} is listed, but neither whole nor {', '.join(missing)} is there"
            )
        sample, index, row_sum, stats = (self.tensors[f"{name}.{part}"] for part in _SAMPLE_PARTS)
        axis, shape = entry["sample_axis"], tuple(entry["shape"])
        summed = np.arange(shape[axis]) if len(row_sum) == shape[axis] else index
        others = tuple(a for a in range(sample.ndim) if a != axis)
        own = sample.astype(np.float64).sum(axis=others)
        theirs = row_sum[index] if len(summed) == shape[axis] else row_sum
        if len(theirs) != len(own) or not np.allclose(own, theirs, rtol=1e-6, atol=1e-6 * stats[1] / len(row_sum)):
            raise GoldenError(f"{self.name}.{self.short}: {name}.row_sum does not fit its sampled rows")
        return Sampled(shape, dtype, axis, index, sample, stats, row_sum, summed)

    def _take_inputs(self) -> dict[str, np.ndarray]:
        inputs: dict[str, np.ndarray] = {}
        variants = self.json["info"].get("generate", {})
        for stage in list(self.goldens):
            forced = any(stage in (f"{v}.prompt_ids", f"{v}.tokens") for v in variants)
            if not stage.startswith("inputs.") and not forced:
                continue
            golden = self.goldens.pop(stage)
            if not isinstance(golden, Whole):
                raise GoldenError(f"{self.name}.{self.short}: input {stage} is sampled; inputs must be whole")
            if stage == "inputs.same_as_case_batch":
                self.left_out[stage] = MARKER
            else:
                inputs[stage] = golden.array
        for stage in list(inputs):
            frames = inputs.get(stage.replace("images.", "images_u8.")) if stage.startswith("inputs.images.") else None
            same = frames is not None and np.array_equal(
                frames.astype(np.float32) / np.float32(127.5) - np.float32(1), inputs[stage]
            )
            if same and not self.full and not self._single():
                del inputs[stage]
                self.left_out[stage] = FROM_U8
        return inputs

    def _leave_out(self) -> None:
        """Drop what the README of the recordings calls no target, judged by the data where it can be."""
        if "rope.inv_freq" in self.tables:
            self.left_out["rope.inv_freq"] = ROPE
        for variant, given in self.json["info"].get("generate", {}).items():
            reasons = {
                "logits": CACHED_SAME if given["window"] is None else CACHED_RUN,
                "nocache_narrow.logits": NARROW,
                "cache_position": CALLS,
                "mask_lengths": CALLS,
                "position_ids": CALLS,
            }
            for suffix, reason in reasons.items():
                self._drop(f"{variant}.{suffix}", reason)
        for stage in [s for s in self.goldens if s.startswith("xattn.") and s.endswith(".kv_mask")]:
            kind = {"v": "vision.mask", "a": "audio.mask"}[stage.split(".")[2]]
            recorded, right = self.goldens[stage], self.goldens.get(kind)
            if (
                isinstance(recorded, Whole)
                and isinstance(right, Whole)
                and not np.array_equal(recorded.array, right.array)
            ):
                prefix = stage.removesuffix("kv_mask")
                for own in [s for s in self.goldens if s == stage or s.startswith(f"{prefix}unpad.")]:
                    self._drop(own, SILENT)

    def _drop(self, stage: str, reason: str) -> None:
        if self.goldens.pop(stage, None) is not None:
            self.left_out[stage] = reason

    def _single(self) -> bool:
        """Whether the recording is one sample, all tensors whole, with intermediate stages: it is kept whole."""
        whole_all = all(isinstance(golden, Whole) for golden in self.goldens.values())
        return whole_all and "layer.0.input" in self.goldens and self.goldens["layer.0.input"].shape[0] == 1

    def _thinned(self) -> dict[str, Golden]:
        if self._single():
            return dict(self.goldens)
        return {stage: thin(stage, golden) for stage, golden in self.goldens.items()}

    def _info(self) -> dict[str, Any]:
        recorded = self.json["info"]
        info = {key: recorded[key] for key in ("vision_resized", "vision_hw", "no_grad_params") if key in recorded}
        if "loss_thres" in recorded:
            info["loss_thresholds"] = recorded["loss_thres"]
        if "generate" in recorded:
            info["generate"] = {v: {"window": e["window"]} for v, e in recorded["generate"].items()}
        return info


def thin(stage: str, golden: Golden) -> Golden:
    """A golden with fewer rows, evenly spread with first and last, but the sums of every row and the whole's
    statistics.
    """
    if isinstance(golden, Sampled):
        rows = len(golden.index)
        keep = _spread(rows, max(2, int(rows * THIN_SAMPLE / golden.sample.size)))
        sample = np.take(golden.sample, keep, axis=golden.axis)
        own = (golden.index[keep], sample, golden.stats, golden.row_sum, golden.row_sum_index)
        return Sampled(golden.shape, golden.dtype, golden.axis, *own)
    if not isinstance(golden, Whole) or golden.array.dtype.kind != "f" or stage.startswith("grad."):
        return golden
    if golden.array.size <= THIN_WHOLE:
        return golden
    row_axes, heads = STAGES.axes(stage).of(golden.array.ndim)
    by_frame = golden.array.ndim == 4 and heads is None
    axis = 0 if by_frame else max(row_axes, key=lambda a: golden.shape[a])
    rows = golden.shape[axis]
    return _rows(golden, axis, _spread(rows, max(2, int(rows * THIN_WHOLE / golden.array.size))))


def _rows(golden: Whole, axis: int, index: np.ndarray) -> Sampled:
    others = tuple(a for a in range(golden.array.ndim) if a != axis)
    sums = golden.array.astype(np.float64).sum(axis=others)
    sample, stats = np.take(golden.array, index, axis=axis), stats_of(golden.array)
    return Sampled(golden.shape, golden.dtype, axis, index, sample, stats, sums, np.arange(golden.shape[axis]))


def _spread(rows: int, count: int) -> np.ndarray:
    return np.unique(np.round(np.linspace(0, rows - 1, min(count, rows))).astype(np.int64))


def _width(word: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,6}", word, re.ASCII) or int(word) % 2:
        raise ValueError(f"--pos-freq: {word!r} is no width; an even number below 10 million is needed")
    return int(word)


def main(arguments: list[str] | None = None) -> int:
    """Command line; exits 0, or 2 with the reason on stderr."""
    return cli.guarded(_run, arguments, name="import_official.py")


def _run(arguments: list[str]) -> int:
    parser = cli.parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", type=Path, nargs="?", help="folder of recordings")
    parser.add_argument("dst", type=Path, nargs="?", help="golden set to write")
    parser.add_argument("--full", action="store_true", help="keep every recorded row, uncompressed")
    parser.add_argument("--case", action="append", help="only this case (may be repeated)")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only this dtype (may be repeated)")
    parser.add_argument("--reason", help="why, for the ledger; needed where DST lies beside a ledger.toml")
    parser.add_argument("--pos-freq", nargs="+", metavar=("GOLDENS", "WIDTH"), help="store pos.freq for widths")
    args = parser.parse_args(arguments)
    if args.pos_freq:
        store_pos_freq(Path(args.pos_freq[0]), map(_width, args.pos_freq[1:]))
        return 0
    if args.src is None or args.dst is None:
        parser.error("SRC and DST are needed")
    in_ledger = (args.dst.parent / "ledger.toml").exists()
    if in_ledger and not args.reason:
        raise GoldenError(f'{args.dst.parent} has a ledger: give --reason "..." for this import')
    if in_ledger:
        ledger.check_reason(args.reason)
    names = import_recordings(
        *(args.src, args.dst),
        full=args.full,
        cases=args.case,
        dtypes=args.dtype or DTYPES,
        reason=args.reason if in_ledger else None,
    )
    print(strict.printable(f"{args.dst}: {', '.join(names)}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
