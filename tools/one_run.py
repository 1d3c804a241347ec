"""One parity run under one setting, in this process: every error of every stage, as JSON on stdout.

    python tools/one_run.py '{"dtype": "float32", "cases": ["small/base"], "threads": 2, "aten": "avx2", ...}'

A setting names what must not change a result beyond noise. `aten`, `onednn` and `mkl` limit the instruction sets that
libraries use; they act through the environment, before a library loads, hence one process per setting.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

__all__ = ["ENVIRONMENT", "Setting", "in_subprocess", "run"]

ENVIRONMENT = {"aten": "ATEN_CPU_CAPABILITY", "onednn": "ONEDNN_MAX_CPU_ISA", "mkl": "MKL_CBWR"}
Found = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """dtype and cases (SET/CASE) of a run, and how it is computed; None: as the library chooses."""

    dtype: str
    cases: tuple[str, ...]
    threads: int = 1
    aten: str | None = None  #: default, avx2, avx512
    onednn: str | None = None  #: SSE41, AVX2, AVX512_CORE, ...
    mkl: str | None = None  #: COMPATIBLE, AVX2, ...
    mkldnn: bool = True
    towers: str = "sdpa"  #: attention backend of the towers
    frame_chunk: int = 64
    key_chunk: int = 8192
    stream_chunk: int = 32768
    key_order: int | None = None  #: seed of a permutation of every stream's keys
    alone: bool = False  #: each sample of a batch by itself, held against its rows of the batch's goldens

    def environment(self) -> dict[str, str]:
        clean = {key: value for key, value in os.environ.items() if key not in ENVIRONMENT.values()}
        limits = {name: getattr(self, field) for field, name in ENVIRONMENT.items()}
        clean |= {name: value for name, value in limits.items() if value is not None}
        return clean | {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}


def in_subprocess(setting: Setting, goldens: Path | None = None, timeout: float = 600) -> Found:
    """Run a setting in a process of its own. Raises RuntimeError with what it printed where it fails."""
    command = [sys.executable, __file__, json.dumps(asdict(setting)), *([str(goldens)] if goldens else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=setting.environment(), timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"{setting}: exit {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run(setting: Setting, goldens: Path) -> Found:
    """{"bits": {case: hash of all its tensors}, "rows": [{case, gate, kind, stage, ok, ratio, errors, budgets}], ...}"""
    import torch

    from vidi.parity import feed, fingerprint, store, tolerance

    torch.set_num_threads(setting.threads)
    tolerances, start = tolerance.load(goldens), time.perf_counter()
    bits, rows, not_run = {}, [], []
    with fingerprint.ieee(), torch.backends.mkldnn.flags(enabled=setting.mkldnn), _chunks(setting):
        for name in setting.cases:
            folder, _, last = name.rpartition("/")
            case = store.open_case(goldens / folder, last)
            model = feed.load_model(case, feed.DTYPES[setting.dtype])
            model.tower_backend, model.frame_chunk = setting.towers, setting.frame_chunk
            judged = _alone if setting.alone else _whole
            for row in judged(case, model, tolerances, setting, bits, not_run):
                rows.append({"case": name, **row})
        machine = fingerprint.fingerprint()
    return {
        "setting": asdict(setting),
        "bits": bits,
        "rows": rows,
        "not_run": not_run,
        "machine": machine,
        "seconds": round(time.perf_counter() - start, 2),
    }


def _whole(case: Any, model: Any, tolerances: Any, setting: Setting, bits: dict, not_run: list) -> Iterator[Found]:
    from vidi.parity import suite

    done, tensors = suite.run_case(case, model, tolerances, dtype=setting.dtype)
    bits[done.name] = _hash(tensors)
    not_run += [[done.name, stage, reason] for stage, reason in done.not_run]
    gate = suite.reference_of(case, setting.dtype)[1]
    for row in done.rows:
        for kind in ("chained", "isolated"):
            result = getattr(row, kind)
            if result is not None and not (kind == "isolated" and result is row.chained):
                yield _row(gate, kind, row.stage, result)


def _alone(case: Any, model: Any, tolerances: Any, setting: Setting, bits: dict, not_run: list) -> Iterator[Found]:
    """Text stages of each sample run by itself, against its kept rows of the batch's golden."""
    from vidi.parity import feed, suite
    from vidi.parity.golden import Whole
    from vidi.parity.trace import Trace

    variant, gate = suite.reference_of(case, setting.dtype)
    targets, batch = case.variant(variant), feed.batch_of(case.inputs)
    for b in range(len(batch.input_ids_BT)):
        tap = Trace(
            lambda stage: stage in targets and stage.endswith((".t2t", ".t2v", ".t2a", ".output", ".norm", "logits"))
        )
        model(_sample(batch, b), last_stream=True, tap=tap)
        for stage, value in tap.tensors().items():
            golden = targets[stage]
            if not isinstance(golden, Whole) or value.ndim != 3 or len(value) != 1 or stage[:6] in ("vision", "audio."):
                continue
            length = min(value.shape[1], golden.shape[1])
            part = Whole(golden.array[b : b + 1, :length], golden.dtype)
            rule = tolerances.rule(gate, stage, f"{case.set}/{case.name}")
            yield _row(gate, "chained", stage, suite.compare_tensor(stage, value[:, :length], part, rule))


def _sample(batch: Any, b: int) -> Any:
    import dataclasses

    from vidi.inputs.batch import Batch

    assert isinstance(batch, Batch)
    one = {
        "input_ids_BT": batch.input_ids_BT[b : b + 1],
        "keep_BT": None if batch.keep_BT is None else batch.keep_BT[b : b + 1],
        "images": None if batch.images is None else batch.images[b : b + 1],
        "audios": None if batch.audios is None else batch.audios[b : b + 1],
        "audio_sizes": None if batch.audio_sizes is None else batch.audio_sizes[b : b + 1],
    }
    return dataclasses.replace(batch, **one)


def _row(gate: str, kind: str, stage: str, result: Any) -> Found:
    return {
        "gate": gate,
        "kind": kind,
        "stage": stage,
        "ok": result.ok,
        "ratio": float(f"{result.ratio:.4g}"),
        "errors": {key: float(f"{value:.3g}") for key, value in result.errors.items()},
        "budgets": {key: float(f"{value:.3g}") for key, value in result.budgets.items()},
        "exact": result.rule.name == "exact" or not result.errors,
    }


def _hash(tensors: Mapping[str, Any]) -> str:
    import hashlib

    import torch

    digest = hashlib.sha256()
    for stage in sorted(tensors):
        value = tensors[stage].detach().contiguous()
        digest.update(stage.encode() + value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _chunks(setting: Setting) -> Any:
    """Chunk sizes, and the order of a stream's keys, for the time of the run."""
    import contextlib
    from unittest import mock

    import torch

    from vidi.attention import eager
    from vidi.attention.unpad import Rows
    from vidi.decoder import decoder
    from vidi.decoder.attention import DecomposedAttention

    plain = DecomposedAttention.attend_stream

    def permuted(self: Any, q: Any, k: Any, v: Any, *, keep_q: Any, keep_k: Any, backend: str) -> Any:
        order = torch.randperm(k.shape[1], generator=torch.Generator().manual_seed(setting.key_order))
        rows = Rows(keep_k.keep_BL[:, order])
        return plain(self, q, k[:, order], v[:, order], keep_q=keep_q, keep_k=rows, backend=backend)

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(eager, "KEY_CHUNK", setting.key_chunk))
    stack.enter_context(mock.patch.object(decoder, "STREAM_CHUNK", setting.stream_chunk))
    if setting.key_order is not None:
        stack.enter_context(mock.patch.object(DecomposedAttention, "attend_stream", permuted))
    return stack


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    chosen = Setting(**{**given, "cases": tuple(given["cases"])})
    print(json.dumps(run(chosen, Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "goldens")))
