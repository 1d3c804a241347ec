"""One parity run under one setting, in this process: every error of every stage, as JSON on stdout.

    python tools/one_run.py '{"dtype": "float32", "cases": ["small/base"], "threads": 2, "aten": "avx2", ...}'
    python tools/one_run.py --serve        a setting a line on stdin, each run in a process of its own

A setting names what must not change a result beyond noise. `aten`, `onednn` and `mkl` limit the instruction sets that
libraries use; they act through the environment, before a library loads. So a `Server` starts one process for each such
environment, which loads the libraries and then forks for every setting.
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

__all__ = ["ENVIRONMENT", "Server", "Setting", "run"]

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
        return clean | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}  # threads: set in the run itself


class Server:
    """Runs settings in processes of their own, one after another; a context manager. Not for use by two threads."""

    def __init__(self, goldens: Path) -> None:
        self._goldens = goldens
        self._environment: dict[str, str] = {}
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.communicate()
            self._process = None

    def run(self, setting: Setting) -> Found:
        """What `run` found in a fresh process. Raises RuntimeError with the reason where that process failed."""
        environment = setting.environment()
        if self._process is None or environment != self._environment:
            self.__exit__()
            command = [sys.executable, __file__, "--serve", str(self._goldens)]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self._process, self._environment = subprocess.Popen(command, env=environment, **pipes), environment
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(setting)) + "\n")
        self._process.stdin.flush()
        found = json.loads(self._process.stdout.readline() or '{"error": "the server ended"}')
        if "error" in found:
            raise RuntimeError(f"{setting}: {found['error']}")
        return found


def _serve(goldens: Path) -> None:
    from stageparity import fingerprint, tolerance  # noqa: F401  (loaded once, before the forks)
    from vidi.parity import feed, suite  # noqa: F401  (loaded once, before the forks)

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                print(json.dumps(run(_setting(line), goldens)), flush=True)
            except BaseException as error:
                print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            print(json.dumps({"error": "the process was killed"}), flush=True)


def _setting(text: str) -> Setting:
    given = json.loads(text)
    return Setting(**{**given, "cases": tuple(given["cases"])})


def run(setting: Setting, goldens: Path) -> Found:
    """{"bits": {case: hash of all its tensors}, "rows": [{case, gate, kind, stage, ok, ratio, errors, budgets}], ...}"""
    import torch

    from stageparity import fingerprint, store, tolerance
    from vidi.parity import feed

    torch.set_num_threads(setting.threads)
    tolerances, start = tolerance.load(goldens), time.perf_counter()
    bits: dict[str, str] = {}
    rows: list[Found] = []
    not_run: list[list[str]] = []
    with fingerprint.ieee(), _computed(setting):
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
    """Text stages of the batch, joined from runs of each sample by itself."""
    from stageparity.golden import Whole
    from vidi.parity import feed, suite
    from vidi.parity.trace import Trace

    variant, gate = suite.reference_of(case, setting.dtype)
    targets, batch = case.variant(variant), feed.batch_of(case.inputs)
    wanted = [s for s in targets if s.endswith((".t2t", ".t2v", ".t2a", ".output", "final.norm", "logits"))]
    joined = {}
    for b in range(len(batch.input_ids_BT)):
        tap = Trace(lambda stage: stage in wanted)
        model(_sample(batch, b), last_stream=True, tap=tap)
        for stage, value in tap.tensors().items():
            golden = targets[stage]
            if isinstance(golden, Whole) and len(golden.shape) == 3:
                whole = joined.setdefault(stage, value.new_zeros(golden.shape))  # padding is exactly 0 (spec §7)
                length = min(value.shape[1], golden.shape[1])
                whole[b, :length] = value[0, :length].detach()
    for stage, value in joined.items():
        rule = tolerances.rule(gate, stage, f"{case.set}/{case.name}")
        yield _row(gate, "chained", stage, suite.compare_tensor(stage, value, targets[stage], rule))


def _sample(batch: Any, b: int) -> Any:
    import dataclasses

    from vidi.inputs.batch import Batch

    assert isinstance(batch, Batch)
    one: dict[str, Any] = {
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


def _computed(setting: Setting) -> Any:
    """Kernels, chunk sizes, and the order of a stream's keys, for the time of the run."""
    import contextlib
    from unittest import mock

    import torch

    from vidi.attention import eager
    from vidi.attention.unpad import Rows
    from vidi.decoder import decoder
    from vidi.decoder.attention import DecomposedAttention

    plain = DecomposedAttention.attend_stream

    def permuted(self: Any, q: Any, k: Any, v: Any, *, keep_q: Any, keep_k: Any, backend: str) -> Any:
        order = torch.randperm(k.shape[1], generator=torch.Generator().manual_seed(setting.key_order or 0))
        rows = Rows(keep_k.keep_BL[:, order])
        return plain(self, q, k[:, order], v[:, order], keep_q=keep_q, keep_k=rows, backend=backend)

    stack = contextlib.ExitStack()
    stack.callback(torch._C._set_mkldnn_enabled, torch._C._get_mkldnn_enabled())
    torch._C._set_mkldnn_enabled(setting.mkldnn)  # the public switch sets TF32 too, and warns
    stack.enter_context(mock.patch.object(eager, "KEY_CHUNK", setting.key_chunk))
    stack.enter_context(mock.patch.object(decoder, "STREAM_CHUNK", setting.stream_chunk))
    if setting.key_order is not None:
        stack.enter_context(mock.patch.object(DecomposedAttention, "attend_stream", permuted))
    return stack


if __name__ == "__main__":
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "goldens"
    if sys.argv[1] == "--serve":
        _serve(folder)
    else:
        print(json.dumps(run(_setting(sys.argv[1]), folder)))
