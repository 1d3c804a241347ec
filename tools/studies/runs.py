"""Parity runs of the unharmed model under settings that must not matter, each in a process of its own.

Instruction sets can only be limited through the environment, before a library loads. So a `Server` starts one process for each
such environment, which loads the libraries and then forks for every setting.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stageparity import evidence
from stageparity.evidence import Basis
from stageparity.store import list_cases, open_case
from tools.studies import CPU, ROOT

__all__ = ["ENVIRONMENT", "KINDS", "Server", "Setting", "basis", "changed", "run"]

ENVIRONMENT = {"aten": "ATEN_CPU_CAPABILITY", "onednn": "ONEDNN_MAX_CPU_ISA", "mkl": "MKL_CBWR"}
KINDS = {"chained": "chained", "forced": "isolated", "alone": "isolated"}  # pass -> the budgets that judge it
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


def changed(setting: Setting) -> Found:
    """What differs from the plain setting of any dtype and cases, as JSON gives it back."""
    plain = Setting(setting.dtype, setting.cases)
    return {key: value for key, value in asdict(setting).items() if value != getattr(plain, key)}


def basis(goldens: Path, settings: Iterable[Setting], names: Iterable[str] | None = None) -> Basis:
    """What the verdicts of such runs depend on, over the cases of ``settings`` (or those of ``names``)."""
    settings = list(settings)
    used = sorted({name for setting in settings for name in setting.cases} if names is None else set(names))
    return Basis(
        evidence.code(["tools/studies/runs.py"], ROOT, CPU),
        evidence.goldens(ref for ref in list_cases(goldens) if f"{ref.set}/{ref.name}" in used),
        evidence.budgets(goldens, used),
        {"settings": evidence.digest(json.dumps([asdict(setting) for setting in settings]))},
    )


# ---- processes ----------------------------------------------------------------------------------------------------------


class Server:
    """Runs settings in processes of their own, one after another; a context manager. Not for use by two threads."""

    def __init__(self, goldens: Path) -> None:
        self._goldens = goldens.resolve()
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
            command = [sys.executable, "-m", "tools.studies.runs", str(self._goldens)]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
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
    import vidi.parity.subject  # noqa: F401  (loaded once, before the forks)

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                given = json.loads(line)
                print(json.dumps(run(Setting(**{**given, "cases": tuple(given["cases"])}), goldens)), flush=True)
            except BaseException as error:
                print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            print(json.dumps({"error": "the process was killed"}), flush=True)


# ---- one run ------------------------------------------------------------------------------------------------------------


def run(setting: Setting, goldens: Path) -> Found:
    """{"bits": {case: hash of all its tensors}, "rows": [{case, gate, kind, stage, ok, ratio, errors, budgets}], ...}"""
    import torch

    from stageparity import tolerance
    from vidi.parity.subject import VidiSubject

    torch.set_num_threads(setting.threads)
    subject, start = VidiSubject(setting.dtype), time.perf_counter()
    tolerances = tolerance.load(goldens, subject.stages)
    found: Found = {"bits": {}, "rows": [], "not_run": []}
    with subject.scope(), _computed(setting):
        for name in setting.cases:
            folder, _, last = name.rpartition("/")
            case = open_case(goldens / folder, last)
            model: Any = subject.build(case)
            model.tower_backend, model.frame_chunk = setting.towers, setting.frame_chunk
            judged = _alone if setting.alone else _whole
            found["rows"] += [{"case": name, **row} for row in judged(case, subject, model, tolerances, found)]
        machine = subject.fingerprint()
    return found | {"machine": machine, "seconds": round(time.perf_counter() - start, 2)}


def _whole(case: Any, subject: Any, model: Any, tolerances: Any, found: Found) -> Iterator[Found]:
    from stageparity.run import run_case
    from stageparity.subject import reference_of

    done, tensors = run_case(subject, case, model, tolerances)
    found["bits"][done.name] = _hash(tensors)
    found["not_run"] += [[done.name, stage, reason] for stage, reason in done.not_run]
    gate = reference_of(case, subject.dtype)[1]
    for row in done.rows:
        entry = subject.stages.find(row.stage)
        own = entry is not None and entry[0].reads_raw  # alone or chained, it is the same run
        for name, kind in KINDS.items():
            result = getattr(row, name)
            if result is not None and (name == "chained" or not own):
                yield _row(gate, kind, row.stage, result)


def _alone(case: Any, subject: Any, model: Any, tolerances: Any, found: Found) -> Iterator[Found]:
    """Text stages of the batch, joined from runs of each sample by itself."""
    from stageparity.compare import compare
    from stageparity.golden import Whole
    from stageparity.run import Trace
    from stageparity.subject import reference_of

    variant, gate = reference_of(case, subject.dtype)
    targets = case.variant(variant)
    batch = subject.bench(case, model, targets).batch
    wanted = [s for s in targets if s.endswith((".t2t", ".t2v", ".t2a", ".output", "final.norm", "logits"))]
    joined: dict[str, Any] = {}
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
        yield _row(gate, "chained", stage, compare(stage, value, targets[stage], rule, subject.stages.axes(stage)))


def _sample(batch: Any, b: int) -> Any:
    """One sample of a batch."""
    fields = ("input_ids_BT", "keep_BT", "images", "audios", "audio_sizes")
    one = {name: None if (value := getattr(batch, name)) is None else value[b : b + 1] for name in fields}
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
    import torch

    digest = hashlib.sha256()
    for stage in sorted(tensors):
        value = tensors[stage].detach().contiguous()
        digest.update(stage.encode() + value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _computed(setting: Setting) -> contextlib.ExitStack:
    """Kernels, chunk sizes, and the order of a stream's keys, for the time of the run."""
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
    _serve(Path(sys.argv[1]))
