"""Traces a foreign model stage by stage, in its own interpreter: one file, Python 3.9 or newer, numpy alone.

A copy of it lies beside every adapter, and is run there: `python stagetrace.py ADAPTER CASE_FOLDER OUT_FOLDER`. An adapter has
`build(config, weights)`, `forward(model, inputs)` and `STAGES`, which says where each stage's tensor is met:

    from stagetrace import call, tap

    STAGES = {
        "embed": "encoder.embed",                                      # path from what build() returned
        "layer.{i}.output": call("layers.{i}", item=0),                # member of a result
        "layer.{i}.t2{m}": call("layers.{i}.attn.cross", order="m"),   # a method; its calls are v, then a
        "layer.{i}.keys": call("...", layout="B L G H -> B (G r) L H"),
    }

The case runs twice: *chained*, as it is, and *forced*, where each recorded tensor is replaced by its golden. What this
leaves in OUT_FOLDER: `chained.safetensors` and `forced.safetensors` with tensors in the golden's layout, and `trace.json`,
which says `finished` only at the end.

A case too large to keep has sketches for goldens. It runs chained alone, and of each tensor a sketch is kept, computed where
the tensor lies: torch's by torch on its device, any other by NumPy.
"""

import fnmatch
import hashlib
import importlib
import inspect
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Mapping

import numpy as np

__all__ = ["Sketcher", "arrange", "call", "fingerprint", "tap", "words"]

VERSION = 1
SKETCH = 1  # of the generator and the form of sketches; a case says which it wants
SHOWN = "not forced: the port shows it and takes nothing back"
JITTED = "met inside jax.jit, where an array has no values: hook the jitted call itself, or run with JAX_DISABLE_JIT=1"
_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
          "uint8": "U8", "bool": "BOOL"}  # fmt: skip
_DTYPES = {short: name for name, short in _NAMES.items()}

# ---- what an adapter says ------------------------------------------------------------------------------------------------


class call:
    """Where a stage's tensor is met.

    path: attributes, indices and keys from what build() returned, or "package.module:function". What it names may be a module
    (torch, MLX, any object with __call__), a method or a function. Places of the stage's template, such as {i}, may stand in it.
    item: member of the result, an index or a name, a tuple of them for a nested one. arg: an argument in place of the result, by
    index or keyword. order: a place of the template; the nth call of a run is that of its nth value. when(args, kwargs): which
    calls count. join: several calls give pieces of the tensor, along this axis of the golden. keep(n, x): what
    of the nth piece is the tensor's, cut out by indexing alone (padded rows go). layout: "axes here -> axes of the golden", as
    einops writes it; a name on the right alone repeats; sizes: those that no shape tells. back=False: the tensor is shown, and
    nothing put in its place would act, as inside a compiled graph.
    """

    def __init__(
        self, path, item=None, arg=None, order=None, when=None, join=None, keep=None, layout=None, back=True, **sizes
    ):
        self.path, self.item, self.arg, self.order, self.when = path, item, arg, order, when
        self.join, self.keep, self.layout, self.back, self.sizes = join, keep, layout, back, sizes


def tap(stage, x, **how):
    """Records a stage where no module or method gives it, and returns the tensor to go on with; outside a trace x itself. how: as
    `call` takes it (join=0 for pieces)."""
    trace = sys.modules["stagetrace"].CURRENT  # run as a program, this file is __main__ as well
    return x if trace is None else trace.record(stage, x, call("", **how))


CURRENT = None

# ---- arrays of any library ---------------------------------------------------------------------------------------------------


def to_numpy(x):
    """(a copy in NumPy, the name of its dtype); bfloat16 comes as float32."""
    name = str(getattr(x, "dtype", type(x).__name__)).rpartition(".")[2]
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        return (x.float() if name == "bfloat16" else x).numpy().copy(), name
    if name == "bfloat16":
        x = x.astype(np.float32 if isinstance(x, np.ndarray) else importlib.import_module(_library(x)).float32)
    return np.array(x, order="C"), name  # flattened, it must be a view: a golden is written into it


def _dtype(x):
    dtype = getattr(x, "dtype", None)
    dtype = np.asarray(x).dtype if dtype is None else dtype
    return getattr(dtype, "name", str(dtype)).rpartition(".")[2]


def _library(x):
    root = type(x).__module__.partition(".")[0]
    return {"mlx": "mlx.core", "jax": "jax.numpy", "jaxlib": "jax.numpy"}.get(root, "numpy")


def like(array, x):
    """A NumPy array as the kind, dtype and device of x."""
    if hasattr(x, "detach"):
        return importlib.import_module("torch").from_numpy(np.ascontiguousarray(array)).to(x)
    library = _library(x)
    if library == "numpy":
        return np.asarray(array, dtype=getattr(x, "dtype", None))
    return importlib.import_module(library).array(array).astype(x.dtype)


def here(x):
    """(x where it lies if it is torch's, else a copy in NumPy; the name of its dtype)."""
    if not hasattr(x, "detach"):
        return to_numpy(x)
    x = x.detach()
    # Apple's GPUs have no float64, which sketches are computed in.
    return (x.cpu() if x.device.type == "mps" else x), str(x.dtype).rpartition(".")[2]


def _home(x):
    """The library of what `here` gives."""
    return sys.modules["torch"] if hasattr(x, "detach") else np


def is_array(x):
    return hasattr(x, "shape") and hasattr(x, "dtype") and not isinstance(x, type) and not is_jitted(x)


def is_jitted(x):
    """Is x what stands for an array while JAX compiles?"""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(x, jax.core.Tracer)


def fingerprint(array):
    """Few numbers that tell whether two arrays hold the same values: [shape, order-free moments, sums with the order in them]."""
    x = np.asarray(array, np.float64).reshape(-1)
    if not x.size:
        return [list(np.shape(array)), [], []]
    turn = np.arange(x.size) * 0.6180339887498949 % 1.0 - 0.5  # spread evenly, the same on every machine
    moments = [x.mean(), np.abs(x).mean(), np.sqrt((x * x).mean()), x.min(), x.max()]
    return [
        list(np.shape(array)),
        [float(m) for m in moments],
        [float((x * turn).mean()), float((x * x * turn).mean())],
    ]


def arrange(x, pattern, shape=None, **sizes):
    """x (NumPy's or torch's) with its axes as the right side of "a b -> b a" has them; shape: of the result, where sizes
    follow from it alone. Raises ValueError for a layout that does not fit."""
    left, right = (_groups(side) for side in pattern.split("->"))
    if len(left) != x.ndim:
        raise ValueError(f"layout {pattern!r} names {len(left)} axes, the tensor has shape {list(x.shape)}")
    sizes = dict(sizes, **{"1": 1})
    for groups, known in ((left, x.shape), (right, shape or ()), (left, x.shape)):
        for group, size in zip(groups, known):
            unknown = [name for name in group if name not in sizes]
            if len(unknown) == 1:
                sizes[unknown[0]] = size // int(np.prod([sizes[name] for name in group if name in sizes]) or 1)
    if missing := [name for group in left + right for name in group if name not in sizes]:
        raise ValueError(f"layout {pattern!r}: nothing tells the size of {missing[0]}; give {missing[0]}=NUMBER")
    here = [name for group in left for name in group if name != "1"]
    there = [name for group in right for name in group if name != "1"]
    x = x.reshape([sizes[name] for name in here])
    if lost := [name for name in here if name not in there]:
        raise ValueError(f"layout {pattern!r} drops {lost[0]}")
    kept, library = [name for name in there if name in here], _home(x)
    x = library.moveaxis(x, tuple(here.index(name) for name in kept), tuple(range(len(kept))))
    x = x.reshape([sizes[name] if name in here else 1 for name in there])
    x = library.broadcast_to(x, [sizes[name] for name in there])
    return x.reshape([int(np.prod([sizes[name] for name in group])) for group in right])


def _groups(side):
    return [word.strip("()").split() for word in re.findall(r"\([^)]*\)|\S+", side)]


# ---- files -------------------------------------------------------------------------------------------------------------------


def read_tensors(path):
    """A safetensors file of dtypes that NumPy has."""
    with open(path, "rb") as file:
        data = file.read()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    found = {}
    for name, at in header.items():
        flat = np.frombuffer(data, _DTYPES[at["dtype"]], int(np.prod(at["shape"])), start + at["data_offsets"][0])
        found[name] = flat.reshape(at["shape"])
    return found


class Checkpoint(Mapping):
    """The weights of a folder of safetensors files by official name, each read when it is asked for: NumPy arrays, bfloat16
    as float32. Without a folder the first look into it raises ValueError with ``missing``."""

    def __init__(self, folder, missing):
        self.place, self.missing = folder, missing

    @property
    def folder(self):
        if self.place is None:
            raise ValueError(self.missing)
        return self.place

    def _entries(self):
        if "_at" not in vars(self):
            self._at = {}
            for name in sorted(n for n in os.listdir(self.folder) if n.endswith(".safetensors")):
                path = os.path.join(self.folder, name)
                with open(path, "rb") as file:
                    size = int.from_bytes(file.read(8), "little")
                    header = json.loads(file.read(size))
                self._at.update((key, (path, 8 + size, at)) for key, at in header.items() if key != "__metadata__")
        return self._at

    def __iter__(self):
        return iter(self._entries())

    def __len__(self):
        return len(self._entries())

    def __getitem__(self, name):
        path, start, at = self._entries()[name]
        half = at["dtype"] == "BF16"
        kind, count = np.dtype("<u2" if half else _DTYPES[at["dtype"]]), int(np.prod(at["shape"]))
        flat = np.fromfile(path, kind, count, offset=start + at["data_offsets"][0])
        return ((flat.astype(np.uint32) << 16).view(np.float32) if half else flat).reshape(at["shape"])


def write_tensors(path, tensors):
    header, parts, start = {}, [], 0
    for name in sorted(tensors):
        data = np.ascontiguousarray(tensors[name])
        header[name] = {
            "dtype": _NAMES[data.dtype.name],
            "shape": list(np.shape(tensors[name])),
            "data_offsets": [start, start + data.nbytes],
        }
        parts.append(data)
        start += data.nbytes
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for data in parts:
            file.write(data.tobytes())


# ---- sketches ----------------------------------------------------------------------------------------------------------------


def words(seed, stream, counters):
    """uint64 words of the counter-based generator: a hash of seed, stream and counter, the same on every machine."""
    ratio = np.uint64(0x9E3779B97F4A7C15)

    def mix(z):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    with np.errstate(over="ignore"):
        key = mix(np.array([(seed << 32) + stream], np.uint64) + ratio)
        return mix(key + (counters.astype(np.uint64) + np.uint64(1)) * ratio)


class Sketcher:
    """Sketches as a case's ``sketch`` says: version, seed, block_rows, row_buckets, column_buckets, samples; stages: of each
    the axes that tell its rows apart (rows) and the places of its golden's largest entries (top).

    A tensor is a matrix of rows and columns. Every row and column has a bucket and a sign, and a block of rows adds up to
    (row buckets, column buckets); the difference of two such sums tells the size of the difference of the tensors.
    """

    COLUMNS = 8192  # projected at a time: the matrix of their signs is 8 MB

    def __init__(self, rule):
        if rule["version"] != SKETCH:
            raise ValueError(f"the case wants sketches of version {rule['version']}, this tracer makes {SKETCH}")
        self.rule, self.known = rule, {}
        tops = [np.array(own["top"], np.int64) for own in rule["stages"].values()]
        self.tops = np.concatenate([np.zeros(0, np.int64), *tops])
        ends = np.cumsum([0, *map(len, tops)]).tolist()
        self.spans = dict(zip(rule["stages"], map(slice, ends, ends[1:])))

    def __call__(self, stage, x):
        """Parts by name, where x lies: blocks (n, row_buckets, column_buckets) float32, the others float64: block_max (n,), which
        is not finite where x is not, top_value, sample_value. What comes from NumPy, which waits
        for a GPU, is kept, but for signs of wide tensors."""
        rule, rows, library = self.rule, self.rule["stages"][stage]["rows"], _home(x)
        x = library.moveaxis(x, tuple(rows), tuple(range(len(rows))))
        matrix = x.reshape(int(np.prod(x.shape[: len(rows)])), -1)
        flat = matrix.reshape(-1)
        size, samples = int(np.prod(matrix.shape)), rule["samples"]
        strided = np.arange(size) if size <= samples else np.arange(samples) * ((size // samples - 1) | 1)
        top = self._held("top", flat, lambda: _beside(self.tops, flat))[self.spans[stage]]
        blocks, largest = [], []
        for first in range(0, len(matrix), rule["block_rows"]):
            block = matrix[first : first + rule["block_rows"]]
            left = self._added(block, first)
            parts = [
                left[:, at : at + self.COLUMNS]
                @ self._signs(left, 2, at, min(self.COLUMNS, left.shape[1] - at), rule["column_buckets"])
                for at in range(0, left.shape[1], self.COLUMNS)
            ]
            blocks.append(sum(parts[1:], parts[0]))
            largest.append(_largest(block))
        blocks = library.stack(blocks)
        return {
            "blocks": blocks.float() if library is not np else blocks.astype(np.float32),
            "block_max": library.stack(largest),
            "top_value": _double(flat[top]),
            "sample_value": _double(flat[self._held(size, flat, lambda: _beside(strided, flat))]),
        }

    def _added(self, block, first):
        """The rows of a block, added up in their buckets: (row_buckets, columns) float64."""
        kind = str(block.dtype).rpartition(".")[2] if _half_on_gpu(block) else "float64"
        signs = self._signs(block, 0, first, len(block), self.rule["row_buckets"], kind)
        # Signs are exact in any dtype: a product that adds up in float32 reads halves as they are, without a copy.
        return signs.T @ _double(block) if kind == "float64" else _double(_product(signs.T, block))

    def _signs(self, block, stream, first, count, buckets, dtype="float64"):
        """(count, buckets): of each row (stream 0) or column (stream 2) from ``first`` on its sign, in its bucket."""

        def made():
            counters, library = np.arange(first, first + count), _home(block)
            sign = 1.0 - 2.0 * (words(self.rule["seed"], stream, counters) >> np.uint64(63)).astype(np.float64)
            high = words(self.rule["seed"], stream + 1, counters) >> np.uint64(32)
            bucket = ((high * np.uint64(buckets)) >> np.uint64(32)).astype(np.int64)
            more = {} if library is np else {"device": block.device}
            signs = library.zeros((count, buckets), dtype=getattr(library, dtype), **more)
            sign = _beside(sign, block)
            signs[_beside(np.arange(count), block), _beside(bucket, block)] = (
                sign if library is np else sign.to(signs.dtype)
            )
            return signs

        if first and stream:  # of a wide tensor, met once
            return made()
        return self._held((stream, first, count, dtype), block, made)

    def _held(self, key, x, made):
        """made(), made once for where x lies."""
        key = (key, str(getattr(x, "device", "")))
        if key not in self.known:
            self.known[key] = made()
        return self.known[key]


def _half_on_gpu(x):
    """Of which torch gives sums of products as they are added up, in float32?"""
    torch, dtype = _home(x), str(x.dtype)
    return (
        getattr(x, "is_cuda", False)
        and dtype in ("torch.bfloat16", "torch.float16")
        and hasattr(torch.ops.aten.mm, "dtype")
    )


def _product(a, b):
    torch = _home(a)
    return torch.mm(a, b, out_dtype=torch.float32)


def _double(x):
    return x.double() if hasattr(x, "detach") else x.astype(np.float64)


def _largest(x):
    """The largest |x| in float64."""
    if not hasattr(x, "detach"):
        return np.maximum(np.float64(x.max()), -np.float64(x.min()))
    least, most = x.aminmax()
    return _home(x).maximum(-least.double(), most.double())


def _beside(array, x):
    """A NumPy array in x's library, on x's device."""
    return _home(x).from_numpy(array).to(x.device) if hasattr(x, "detach") else array


def _copied(tensors):
    """Tensors in NumPy. Of many small ones on a GPU each copy would wait: those of one kind are copied as one."""
    found, kinds = {}, {}
    for name, x in tensors.items():
        if getattr(x, "is_cuda", False):
            kinds.setdefault((x.dtype, str(x.device)), []).append(name)
        else:
            found[name] = to_numpy(x)[0]
    for names in kinds.values():
        whole = to_numpy(_home(tensors[names[0]]).cat([tensors[name].reshape(-1) for name in names]))[0]
        ends = np.cumsum([tensors[name].numel() for name in names])
        found.update((n, x.reshape(tuple(tensors[n].shape))) for n, x in zip(names, np.split(whole, ends[:-1])))
    return found


# ---- one run -----------------------------------------------------------------------------------------------------------------


class Trace:
    """Tensors of one run by stage id. goldens: what to go on with in their place (none: as it is). sketcher: sketches are kept
    in their place."""

    def __init__(self, ids, shapes, goldens=None, sketcher=None):
        self.ids, self.shapes, self.goldens, self.sketcher = set(ids), shapes, goldens, sketcher
        self.pieces, self.joins, self.dtypes, self.notes, self.seen, self.kept = {}, {}, {}, {}, {}, {}
        self.fed, self.inside, self.open, self.last = {}, {}, [], ""

    def record(self, stage, x, where):
        """One tensor, or a piece of it, of a stage; what to go on with in its place."""
        if stage not in self.ids or x is None:
            return x
        if is_jitted(x):
            self.note(stage, JITTED)
            return x
        self.last = stage
        for within in self.open:
            within.add(stage)
        if (name := _dtype(x)) not in _NAMES and name != "bfloat16":
            self.note(stage, f"holds {name}, no real numbers: item= or another place gives the tensor")
            return x
        pieces = self.pieces.setdefault(stage, [])
        if where.join is None and (pieces or stage in self.seen):
            self.note(
                stage, "met more than once: the first counts; several pieces need join=, several stages order= or when="
            )
            return x
        if self.sketcher is not None:
            self._sketch(stage, x, where, pieces)
            return x
        raw, dtype = to_numpy(x)
        axis = where.join or 0
        index = np.arange(raw.size).reshape(raw.shape)
        try:
            if where.keep is not None:
                index = where.keep(len(pieces), index)
            if where.layout is not None:
                shape = list(self.shapes.get(stage, ()))
                if where.join is not None and shape:
                    shape = []  # a piece's sizes are its own
                index = arrange(index, where.layout, shape, **where.sizes)
        except Exception as error:
            self.note(stage, f"{type(error).__name__}: {error}")
        piece = raw.reshape(-1)[index]
        before = sum(np.shape(p)[axis] for p in pieces) if pieces else 0
        pieces.append(piece)
        self.joins[stage], self.dtypes[stage] = axis, dtype
        golden = (self.goldens or {}).get(stage)
        if golden is None:
            return x
        if not where.back:
            self.note(stage, SHOWN)
            return x
        if where.join is not None and golden.ndim > axis:
            golden = golden[(slice(None),) * axis + (slice(before, before + piece.shape[axis]),)]
        if golden.shape != piece.shape:
            self.note(stage, "not forced: the golden has another shape")
            return x
        raw.reshape(-1)[index] = golden
        return like(raw, x)

    def _sketch(self, stage, x, where, pieces):
        """Keeps what `Sketcher` makes of a tensor once all its pieces are there, the tensor where the golden is whole, and of one
        that has another shape than its golden that shape alone."""
        x, self.dtypes[stage] = here(x)
        try:
            if where.keep is not None:
                x = where.keep(len(pieces), x)
            if where.layout is not None:
                x = arrange(x, where.layout, self.shapes.get(stage, ()) if where.join is None else (), **where.sizes)
        except Exception as error:
            self.note(stage, f"{type(error).__name__}: {error}")
        axis, torch = where.join or 0, _home(x) is not np
        shape, golden = list(x.shape), list(self.shapes.get(stage, ()))
        if stage in self.seen:
            shape[axis] += self.seen[stage][axis]
        self.seen[stage] = shape
        if self.kept.pop(stage, None):  # more pieces than the golden has
            return
        if where.join is None and shape != golden:
            return
        pieces.append(x.clone() if torch and where.join is not None else x)  # the port may write into its own
        if shape != golden:
            return
        if len(pieces) > 1:
            x = _home(x).cat(pieces, axis) if torch else np.concatenate(pieces, axis)
        sketched = stage in self.sketcher.rule["stages"]
        parts = self.sketcher(stage, x) if sketched else {"": x.clone() if torch else to_numpy(x)[0]}
        self.kept[stage] = {stage + "/" * bool(name) + name: part for name, part in parts.items()}
        pieces.clear()

    def note(self, stage, text):
        self.notes.setdefault(stage, text)

    def tensors(self):
        if self.sketcher is not None:
            return _copied({name: part for parts in self.kept.values() for name, part in parts.items()})
        found = {}
        for stage, pieces in self.pieces.items():
            try:
                found[stage] = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, self.joins[stage])
            except ValueError as error:
                self.note(stage, f"pieces do not join along axis {self.joins[stage]}: {error}")
                found[stage] = pieces[0]
        return found


# ---- hooks -------------------------------------------------------------------------------------------------------------------


class Hooks:
    """Wraps what an adapter's STAGES name, once; afterwards every call goes to the trace of the day."""

    def __init__(self, model, stages, case):
        self.model, self.trace, self.counts, self.paths, self.unused = model, None, {}, {}, []
        for template, places in stages.items():
            for where in places if isinstance(places, list) else [places]:
                where = call(where) if isinstance(where, str) else where
                self._add(template, where, case)
        self.undo = [self._wrap(path) for path in self.paths]

    def _add(self, template, where, case):
        pattern = re.sub(
            r"\\\{(\w+)\\\}", lambda m: f"(?P<{m[1]}>{case['places'][m[1]]['pattern']})", re.escape(template)
        )
        found = [m for m in (re.fullmatch(pattern, stage) for stage in case["stages"]) if m]
        if not found:
            self.unused.append(template)
        if where.order is not None:
            values = case["places"][where.order]["values"]
            found.sort(key=lambda m: values.index(m[where.order]) if values else int(m[where.order]))
        by_path = {}
        for m in found:
            path = re.sub(r"\{(\w+)\}", lambda place: m[place[1]], where.path)  # noqa: B023
            by_path.setdefault(path, []).append(m[0])
        for path, ids in by_path.items():
            if len(ids) > 1 and where.order is None:
                raise ValueError(
                    f"STAGES: {template} stands for {', '.join(ids[:3])}, all met at {path}: tell its calls apart with order="
                )
            self.paths.setdefault(path, []).append((where, ids))

    def start(self, trace):
        self.trace, self.counts = trace, {}

    def _wrap(self, path):
        owner, name, target = self._resolve(path)
        if inspect.isroutine(target):
            wrapped = self._wrapped(path, target)
            try:
                setattr(owner, name, wrapped)
            except AttributeError:
                object.__setattr__(owner, name, wrapped)
            return owner, name, target
        if hasattr(target, "register_forward_hook"):  # a torch module
            forward = target.forward
            target.forward = self._wrapped(path, forward)
            return target, "forward", forward
        kind = type(target)
        if not callable(target):
            raise ValueError(f"STAGES: {path} is a {kind.__name__}, nothing that is called")
        hooks = self

        def called(self, *args, **kwargs):
            return hooks._wrapped(path, lambda *a, **k: kind.__call__(self, *a, **k))(*args, **kwargs)

        target.__class__ = type(kind.__name__, (kind,), {"__call__": called})
        return target, "__class__", kind

    def _resolve(self, path):
        module, colon, rest = path.partition(":")
        owner, at = (importlib.import_module(module), rest) if colon else (self.model, path)
        name, target = "", owner
        for name in at.split("."):
            owner = target
            try:
                target = _member(owner, name)
            except (AttributeError, KeyError, IndexError, TypeError):
                known = [
                    n for n in (list(owner) if isinstance(owner, dict) else dir(owner)) if not str(n).startswith("_")
                ]
                raise ValueError(
                    f"STAGES: {path}: a {type(owner).__name__} has no {name!r}; it has {', '.join(map(str, known[:12]))}"
                ) from None
        return owner, name, target

    def _wrapped(self, path, function):
        def run(*args, **kwargs):
            trace = self.trace
            if trace is None:
                return function(*args, **kwargs)
            stages = [
                (where, stage)
                for where, ids in self.paths[path]
                if (stage := self._stage(path, where, ids, args, kwargs))
            ]
            if trace.goldens is not None:
                given = known(_arrays((args, kwargs)))
                for _, stage in stages:
                    trace.fed.setdefault(stage, given)
            for where, stage in stages:
                if where.arg is not None:
                    args, kwargs = _replaced_argument(trace, stage, where, args, kwargs)
            inside = set()
            trace.open.append(inside)
            try:
                result = function(*args, **kwargs)
            finally:
                trace.open.pop()
            for where, stage in stages:
                trace.inside.setdefault(stage, sorted(inside - {s for _, s in stages}))
                if where.arg is None:
                    steps = where.item if isinstance(where.item, tuple) else () if where.item is None else (where.item,)
                    result = _exchanged(result, steps, lambda x: trace.record(stage, x, where))  # noqa: B023
            return result

        return run

    def _stage(self, path, where, ids, args, kwargs):
        """The stage that this call gives, None where it is none of these."""
        if where.when is not None and not where.when(args, kwargs):
            return None
        key = (path, id(where))
        n = self.counts[key] = self.counts.get(key, -1) + 1
        if where.order is None:
            return ids[0]
        return ids[n] if n < len(ids) else None


def _member(owner, name):
    if name.lstrip("-").isdigit() and not isinstance(owner, dict):
        return owner[int(name)]
    if isinstance(owner, dict) and name in owner:
        return owner[name]
    return getattr(owner, name)


def known(arrays):
    """Fingerprints of the arrays that can be goldens: a mask of -inf, or of the least number, is none, nor is NaN. JSON has no
    word for what comes of them."""
    with np.errstate(all="ignore"):
        prints = [fingerprint(to_numpy(x)[0]) for x in arrays]
    return [one for one in prints if np.isfinite(one[1] + one[2]).all()]


def _arrays(given):
    """Arrays of some size among arguments, nested ones too."""
    if is_array(given):
        return [given] if int(np.prod(given.shape)) > 8 else []
    if isinstance(given, dict):
        given = list(given.values())
    return [x for part in given for x in _arrays(part)][:16] if isinstance(given, (list, tuple)) else []


def _replaced_argument(trace, stage, where, args, kwargs):
    if isinstance(where.arg, int) and where.arg < len(args):
        new = trace.record(stage, args[where.arg], where)
        return (*args[: where.arg], new, *args[where.arg + 1 :]), kwargs
    if where.arg in kwargs:
        return args, dict(kwargs, **{where.arg: trace.record(stage, kwargs[where.arg], where)})
    trace.note(stage, f"the call has no argument {where.arg!r}")
    return args, kwargs


def _exchanged(result, steps, exchange):
    """A result with the member at ``steps`` exchanged; the result itself where nothing changes."""
    if not steps:
        return exchange(result)
    first, rest = steps[0], steps[1:]
    old = result[first] if isinstance(first, int) or isinstance(result, dict) else getattr(result, first)
    new = _exchanged(old, rest, exchange)
    if new is old:
        return result
    if isinstance(result, tuple):
        parts = [new if n == first else part for n, part in enumerate(result)]
        return type(result)(*parts) if hasattr(result, "_fields") else type(result)(parts)
    if isinstance(result, (list, dict)) and (isinstance(first, int) or first in result):
        result[first] = new
    else:
        setattr(result, first, new)
    return result


# ---- the program ---------------------------------------------------------------------------------------------------------------


def main(adapter_path, case_folder, out):
    """Both runs of one case. 0: done. 3: the port failed; `trace.json` says where. 2: the adapter cannot be used."""
    global CURRENT
    with open(os.path.join(case_folder, "case.json"), encoding="utf-8") as file:
        case = json.load(file)
    with open(adapter_path, "rb") as file:
        adapter_hash = hashlib.sha256(file.read()).hexdigest()
    if case["dtype"] == "float64":
        os.environ.setdefault("JAX_ENABLE_X64", "1")  # without it JAX makes float32 of float64
    about = {key: case[key] for key in ("case", "golden", "dtype")}
    about.update(
        version=VERSION, run=os.urandom(8).hex(), adapter=adapter_hash, python=sys.version.split()[0], finished=False
    )
    os.makedirs(out, exist_ok=True)
    _write(out, about)
    step, trace = "importing the adapter", None
    try:
        sys.path.insert(0, os.path.dirname(os.path.abspath(adapter_path)))
        adapter = importlib.import_module(os.path.splitext(os.path.basename(adapter_path))[0])
        if missing := [name for name in ("build", "forward", "STAGES") if not hasattr(adapter, name)]:
            raise ValueError(f"the adapter has no {missing[0]}")
        if os.environ.get("STAGETRACE_PLAIN"):
            _plain()
        step = "reading the case"
        sketcher = Sketcher(case["sketch"]) if "sketch" in case else None
        read = {
            name: read_tensors(os.path.join(case_folder, name + ".safetensors"))
            for name in (("inputs",) if sketcher else ("inputs", "goldens", "weights"))
        }
        held = Checkpoint(**case["weights"]) if sketcher else read["weights"]
        weights = Weights(held, getattr(adapter, "ALIASES", {}), case["dtype"])
        step, start = "build", time.perf_counter()
        model = adapter.build(dict(case["config"], dtype=case["dtype"]), weights if sketcher else dict(weights))
        about["build_seconds"] = time.perf_counter() - start
        step = "STAGES"
        hooks = Hooks(model, adapter.STAGES, case)
        inputs = {name: _cast(x, case["dtype"]) for name, x in read["inputs"].items()}
        shapes = case["shapes"]
        seen = {}
        timed = ("warm", "plain") if os.environ.get("STAGETRACE_TIME") else ()
        for kind in (*timed, "chained", *([] if sketcher else ["forced"])):  # no run can go on with a sketch
            step, start = kind + " run", time.perf_counter()
            if kind not in timed:
                trace = CURRENT = Trace(case["stages"], shapes, read["goldens"] if kind == "forced" else None, sketcher)
                hooks.start(trace)
            adapter.forward(model, {name: x.copy() for name, x in inputs.items()})
            _wait()
            tensors = {} if kind in timed else trace.tensors()
            about[kind + "_seconds"] = time.perf_counter() - start
            if kind in timed:
                continue
            seen[kind] = trace
            hooks.start(None)
            CURRENT = None
            write_tensors(os.path.join(out, kind + ".safetensors"), tensors)
    except BaseException as error:
        of_adapter = step in ("importing the adapter", "reading the case", "STAGES")
        about["failed"] = {
            "step": step, "adapter": of_adapter, "error": f"{type(error).__name__}: {error}",
            "last": getattr(trace, "last", ""), "traceback": traceback.format_exc()[-4000:],
        }  # fmt: skip
        _write(out, about)
        return 2 if of_adapter else 3
    chained = seen["chained"]
    forced = seen.get("forced", chained)
    notes = {}
    for trace in (chained, forced):
        for stage, text in trace.notes.items():
            notes[stage] = text if notes.get(stage, text) == text else notes[stage] + "; " + text
    about.update(
        finished=True, notes=notes, dtypes=chained.dtypes, fed=forced.fed, inside=forced.inside, unused=hooks.unused
    )  # fmt: skip
    if sketcher:
        rule = {key: value for key, value in case["sketch"].items() if key != "stages"}
        about.update(sketch=rule, shapes=chained.seen)
    _write(out, about)
    return 0


def _wait():
    """Until a GPU has done what it was told: a run is timed to its end."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _plain():
    """Reduced precision and fused kernels off, in libraries that have switches for it."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.mkldnn.enabled = False
        for kernel in ("flash", "mem_efficient", "cudnn"):
            getattr(torch.backends.cuda, f"enable_{kernel}_sdp", lambda on: None)(False)


def _cast(x, dtype):
    return x.astype(dtype if dtype != "bfloat16" else np.float32) if x.dtype.kind == "f" else x


class Weights(Mapping):
    """Weights under their official names, and under the adapter's where it has ALIASES; each made when it is asked for."""

    def __init__(self, held, aliases, dtype):
        self.held, self.aliases, self.dtype = held, aliases, dtype

    @property
    def folder(self):
        """Of a checkpoint, for a port that loads it in its own way."""
        return self.held.folder

    def _names(self):
        if "_official" not in vars(self):
            self._official = {name: name for name in self.held}
            for official, theirs in self.aliases.items():
                for name in fnmatch.filter(self.held, official):
                    stars = re.fullmatch(re.escape(official).replace(r"\*", "(.*)"), name).groups()
                    parts = theirs.split("*")
                    self._official["".join(part + star for part, star in zip(parts, (*stars, "")))] = name
        return self._official

    def __iter__(self):
        return iter(self._names())

    def __len__(self):
        return len(self._names())

    def __getitem__(self, name):
        return _cast(self.held[self._names()[name]], self.dtype)


def _write(out, about):
    path = os.path.join(out, "trace.json")
    with open(path + ".part", "w", encoding="utf-8") as file:
        json.dump(about, file, indent=1, sort_keys=True)
    os.replace(path + ".part", path)


if __name__ == "__main__":
    sys.modules["stagetrace"] = sys.modules["__main__"]  # one trace, whoever imports this file
    sys.exit(main(*sys.argv[1:4]))
