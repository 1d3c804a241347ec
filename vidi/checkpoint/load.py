"""Load a checkpoint shard by shard straight onto the device, strictly.

The bytes are read here, not mapped: reader threads fill a ring of small staging buffers (pinned for a GPU), each
chunk is copied into its parameter and checked for NaN and Inf there. On a CPU chunks land in the parameter itself.
Host memory beside the model is the ring, whatever the size of a tensor.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor, nn

from stageparity import strict
from vidi import precision
from vidi.checkpoint import names
from vidi.checkpoint.errors import CheckpointError, refusals
from vidi.checkpoint.folder import Problem
from vidi.checkpoint.headers import Entry
from vidi.checkpoint.inspect import Inspection, inspect_folder
from vidi.config import VidiConfig

if TYPE_CHECKING:
    from vidi.model import VidiModel

__all__ = ["CHUNK_BYTES", "NUM_SLOTS", "STORED", "Progress", "empty_model", "load"]

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, official tensor name

CHUNK_BYTES = 16 << 20
NUM_SLOTS = 8
STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def load(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    parts: Sequence[str] | None = None,
    layers: range | None = None,
    progress: Progress | None = None,
    config: VidiConfig | None = None,
) -> VidiModel:
    """A model in eval mode with the weights of ``folder``, parameters of ``dtype``, position MLPs at least float32.

    ``parts`` loads only some of vision_tower, audio_tower, bridge, decoder; ``layers`` only these decoder layers (the
    embedding and the last norm come with the decoder). What is not asked for stays on the meta device; with neither,
    nothing does. ``config`` replaces the folder's own. Spec §1, §5.

    Raises CheckpointError naming file and tensor: whatever ``vidi inspect`` would report about the tensors asked for,
    a NaN or infinite weight (also one that overflows ``dtype``), a stored head that differs from the embedding.
    """
    report = inspect_folder(folder, config=config)
    config = report.config
    if config is None:
        raise _refusal(report.path, report.problems)
    wanted = _select(config, parts, layers)
    if blocking := _blocking(report, wanted, parts is None and layers is None):
        raise _refusal(report.path, blocking)
    model = empty_model(config, device=device, dtype=dtype, only={want.ours for want in wanted.values()})
    parameters = dict(model.named_parameters())
    jobs = sorted(
        ((report.tensors[name], parameters[want.ours]) for name, want in wanted.items()),
        key=lambda job: (job[0].path, job[0].start),
    )
    _fill(jobs, progress)
    precision.cast_model(model, dtype)  # the 7B's position MLPs pass through its dtype
    if names.HEAD in report.tensors and names.HEAD not in names.expected(config) and names.HEAD_TIED_TO in wanted:
        _check_tied(report.tensors[names.HEAD], report.tensors[names.HEAD_TIED_TO])
    return model


def empty_model(
    config: VidiConfig,
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    only: set[str] | None = None,
) -> VidiModel:
    """A model in eval mode with uninitialised parameters on ``device``; those not in ``only`` stay on meta."""
    from vidi.model import VidiModel

    if dtype not in STORED.values():
        raise ValueError(f"dtype {dtype}: one of {', '.join(map(str, STORED.values()))} is needed")
    with torch.device("meta"):
        model = VidiModel(config)
    wanted = {want.ours: want for want in names.expected(config).values()}
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert found == {name: want.shape for name, want in wanted.items()}, _difference(found, wanted)
    for name in wanted.keys() if only is None else only:
        kind = precision.promoted(dtype) if wanted[name].is_float32 else dtype
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        value = torch.empty(wanted[name].shape, dtype=kind, device=device)
        setattr(module, leaf, nn.Parameter(value, requires_grad=getattr(module, leaf).requires_grad))
    left = [name for name, p in model.named_parameters() if p.is_meta and (only is None or name in only)]
    left += [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not left, f"left without data: {', '.join(left)}"
    return model.eval()


def _difference(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, names.Expected]) -> str:
    odd = sorted(set(found) ^ set(wanted)) or [name for name in found if found[name] != wanted[name].shape]
    return f"vidi/model.py and vidi/checkpoint/names.py disagree about {', '.join(odd[:10])}"


def _select(config: VidiConfig, parts: Sequence[str] | None, layers: range | None) -> dict[str, names.Expected]:
    if unknown := sorted(set(parts or ()) - set(names.PARTS)):
        raise ValueError(f"parts {', '.join(unknown)}: the parts are {', '.join(names.PARTS)}")
    if layers is not None and not set(layers) <= set(range(config.decoder.num_layers)):
        raise ValueError(f"layers {layers}: the decoder has layers 0 to {config.decoder.num_layers - 1}")
    return {
        name: want
        for name, want in names.expected(config).items()
        if (parts is None or want.part in parts)
        and (layers is None or want.part != "decoder" or want.layer is None or want.layer in layers)
    }


def _blocking(report: Inspection, wanted: Mapping[str, names.Expected], whole: bool) -> list[Problem]:
    """All problems for a whole load; those of the wanted tensors for a partial one."""
    if whole:
        return list(report.problems)
    return [p for p in report.problems if p.kind == "model" or (p.tensor is not None and p.tensor in wanted)]


def _refusal(path: Path, problems: Sequence[Problem]) -> CheckpointError:
    first = problems[0]
    more = f" (and {len(problems) - 1:,} more problems; `vidi inspect {path}` lists them)" if len(problems) > 1 else ""
    file = path / first.file if first.file else path
    return CheckpointError(f"{first.kind}: {first.text}{more}", file=file, tensor=first.tensor)


# ---- bytes -> parameters --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chunk:
    """Elements [first, first + count) of a stored tensor, on their way into ``target`` (flat, in its final dtype)."""

    entry: Entry
    first: int
    count: int
    target: Tensor

    @property
    def nbytes(self) -> int:
        return self.count * STORED[self.entry.dtype].itemsize


def _chunks(jobs: Sequence[tuple[Entry, Tensor]]) -> Iterator[_Chunk]:
    for entry, parameter in jobs:
        flat, step = parameter.data.view(-1), CHUNK_BYTES // STORED[entry.dtype].itemsize
        for first in range(0, entry.numel, step):
            count = min(step, entry.numel - first)
            yield _Chunk(entry, first, count, flat[first : first + count])


def _fill(jobs: Sequence[tuple[Entry, Tensor]], progress: Progress | None) -> None:
    total, done = sum(entry.nbytes for entry, _ in jobs), 0
    slots = [_Slot(jobs[0][1].device) for _ in range(NUM_SLOTS)] if jobs else []
    bounds: list[tuple[Entry, Tensor]] = []
    with ExitStack() as stack:
        files = {path: stack.enter_context(_open(path)) for path in {entry.path for entry, _ in jobs}}
        pool = stack.enter_context(ThreadPoolExecutor(NUM_SLOTS // 2))
        queue: deque[tuple[_Chunk, _Slot, Future[Tensor]]] = deque()

        def finish_one() -> None:
            nonlocal done
            chunk, slot, future = queue.popleft()
            slot.deliver(chunk, future.result())
            bounds.append((chunk.entry, torch.stack(torch.aminmax(chunk.target))))
            done += chunk.nbytes
            if progress is not None:
                progress(done, total, chunk.entry.name)
            if len(bounds) >= 256:
                _check_finite(bounds)

        for number, chunk in enumerate(_chunks(jobs)):
            if len(queue) == NUM_SLOTS:
                finish_one()
            slot = slots[number % NUM_SLOTS]
            queue.append((chunk, slot, pool.submit(slot.read, chunk, files[chunk.entry.path].fileno())))
        while queue:
            finish_one()
    _check_finite(bounds)


class _Slot:
    """One staging buffer, made at first use: chunks that need no cast on a CPU are read into the parameter itself."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"
        self.buffer: Tensor | None = None
        self.busy: torch.cuda.Event | None = None

    def read(self, chunk: _Chunk, file: int) -> Tensor:
        """In a reader thread: the chunk's elements as a host tensor of the stored dtype."""
        stored = STORED[chunk.entry.dtype]
        if chunk.target.device.type == "cpu" and chunk.target.dtype == stored:
            where = chunk.target
        else:
            if self.buffer is None:
                self.buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=self.on_gpu)
            if self.busy is not None:
                self.busy.synchronize()
            where = self.buffer[: chunk.nbytes].view(stored)
        _read_exactly(file, chunk.entry, chunk.entry.start + chunk.first * stored.itemsize, where)
        return where

    def deliver(self, chunk: _Chunk, host: Tensor) -> None:
        if host is chunk.target:
            return
        # The cast happens on the device: copy_ across devices would cast on the host.
        chunk.target.copy_(host.to(self.device, non_blocking=self.on_gpu), non_blocking=self.on_gpu)
        if self.on_gpu:
            self.busy = torch.cuda.Event()
            self.busy.record(torch.cuda.current_stream(self.device))


def _open(path: Path) -> BinaryIO:
    with refusals():
        return strict.open_file(path, hub_cache=True)


def _read_exactly(file: int, entry: Entry, offset: int, into: Tensor) -> None:
    view = memoryview(into.view(torch.uint8).numpy())  # type: ignore[arg-type]
    while len(view):
        try:
            got = os.preadv(file, [view], offset)
        except OSError as error:
            raise CheckpointError(f"cannot be read ({error.strerror})", file=entry.path, tensor=entry.name) from None
        if got == 0:
            raise CheckpointError("the file ended while it was read", file=entry.path, tensor=entry.name)
        view, offset = view[got:], offset + got


def _check_finite(bounds: list[tuple[Entry, Tensor]]) -> None:
    """Minimum and maximum of each chunk tell: NaN spreads into both, an infinity is one of them. Empties the list."""
    if bounds:
        fine = torch.stack([bound.double() for _, bound in bounds]).isfinite().all(dim=1).tolist()
        for (entry, bound), good in zip(bounds, fine, strict=True):
            if not good:
                raise CheckpointError(_describe(entry, bound.dtype), file=entry.path, tensor=entry.name)
    bounds.clear()


def _describe(entry: Entry, dtype: torch.dtype) -> str:
    with _open(entry.path) as file:
        for first, host in _host_chunks(entry, file.fileno()):
            bad = host.to(dtype).isfinite().logical_not_().nonzero()
            if len(bad):
                where, value = int(bad[0]), float(host[int(bad[0])])
                if math.isfinite(value):
                    return f"element {first + where} is {value:g}, too large for {dtype}; load in a wider dtype"
                return f"element {first + where} is {value}: damaged weights, or a failed training run"
    return f"changed on disk while it was loaded as {dtype}"


def _host_chunks(entry: Entry, file: int) -> Iterator[tuple[int, Tensor]]:
    stored = STORED[entry.dtype]
    buffer = torch.empty(min(CHUNK_BYTES // stored.itemsize, max(entry.numel, 1)), dtype=stored)
    for first in range(0, entry.numel, len(buffer)):
        host = buffer[: min(len(buffer), entry.numel - first)]
        _read_exactly(file, entry, entry.start + first * stored.itemsize, host)
        yield first, host


def _check_tied(head: Entry, embed: Entry) -> None:
    with _open(head.path) as head_file, _open(embed.path) as embed_file:
        # Chunks hold equal numbers of elements only for equal item sizes, so step by the wider of the two.
        wide = max(STORED[head.dtype].itemsize, STORED[embed.dtype].itemsize)
        step = CHUNK_BYTES // wide
        for first in range(0, head.numel, step):
            pair = []
            for entry, file in ((head, head_file), (embed, embed_file)):
                host = torch.empty(min(step, head.numel - first), dtype=STORED[entry.dtype])
                _read_exactly(file.fileno(), entry, entry.start + first * host.itemsize, host)
                pair.append(host)
            if not torch.equal(*(pair if head.dtype == embed.dtype else [host.double() for host in pair])):
                where = first + int((pair[0].double() != pair[1].double()).nonzero()[0])
                raise CheckpointError(
                    f"differs from {names.HEAD_TIED_TO} at element {where}, to which it is tied in this model",
                    file=head.path,
                    tensor=head.name,
                )
