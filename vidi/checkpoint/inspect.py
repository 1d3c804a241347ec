"""Hold a folder's names, shapes and dtypes against its config, from headers alone."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stageparity.strict import printable
from vidi.checkpoint import explain, names
from vidi.checkpoint.errors import CheckpointError
from vidi.checkpoint.folder import CONFIG_NAME, Folder, Problem, read_folder
from vidi.checkpoint.headers import Entry
from vidi.config import VidiConfig

__all__ = ["Inspection", "PartCount", "inspect_folder", "read_config"]

SHOWN_PROBLEMS = 30
KINDS = {"gemma2": "Vidi 1.5 9B", "mistral": "Vidi 7B"}
IN_MISSING_SHARD = "in the missing shard"


@dataclass(frozen=True)
class PartCount:
    """One line of the report: tensors and parameters of a part, stored and wanted."""

    part: str
    stored: int
    wanted: int
    parameters: int
    wanted_parameters: int
    dtypes: Mapping[str, int]
    problems: int


@dataclass(frozen=True)
class Inspection:
    """What a folder holds. ``recognised`` names the model; ``problems`` is empty exactly where the folder fits."""

    path: Path
    recognised: str
    config: VidiConfig | None
    parts: tuple[PartCount, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    tensors: Mapping[str, Entry]
    file_bytes: int
    synthetic: str | None

    @property
    def fits(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """The same as ``render``, for programs: every problem, at most 10,000."""
        report: dict[str, Any] = {"path": str(self.path), "fits": self.fits, "recognised": self.recognised}
        report |= {"file_bytes": self.file_bytes, "parts": [asdict(part) for part in self.parts]}
        report["tensors"] = {"stored": sum(part.stored for part in self.parts), "wanted": self._wanted()}
        report["parameters"] = sum(part.parameters for part in self.parts)
        report |= {"num_problems": len(self.problems), "problems": [asdict(p) for p in self.problems[:10_000]]}
        return report | {"notes": list(self.notes), "synthetic": self.synthetic}

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=1)

    def render(self) -> str:
        """The report as text: a table by part, then problems, one line for all layers that share one."""
        lines = [f"{self.path}: {self.recognised}, {_bytes(self.file_bytes)}", ""]
        lines.append(f"{'part':<13}{'tensors':>9}{'wanted':>8}{'parameters':>17}{'problems':>10}  stored as")
        for part in self.parts:
            stored_as = ", ".join(f"{dtype} ×{count:,}" for dtype, count in sorted(part.dtypes.items()))
            numbers = f"{part.stored:>9,}{part.wanted:>8,}{part.parameters:>17,}{part.problems:>10,}"
            lines.append(f"{part.part:<13}{numbers}  {stored_as}")
        stored, parameters = sum(p.stored for p in self.parts), sum(p.parameters for p in self.parts)
        wanted = sum(p.wanted for p in self.parts)
        lines.append(f"{'stored':<13}{stored:>9,}{wanted:>8,}{parameters:>17,}{len(self.problems):>10,}")
        head = " with the tied head" if self._tied else ""
        lines.append(f"wanted: {self._wanted():,} tensors{head}, {self._wanted_parameters():,} unique parameters")
        lines.append("")
        grouped = _grouped(self.problems)
        shown = (
            4 if any(p.kind == "model" for p in self.problems) else SHOWN_PROBLEMS
        )  # of another model, not all is news
        lines += grouped[:shown]
        if len(grouped) > shown:
            lines.append(f"… and {len(grouped) - shown:,} more kinds of problem; --json has them")
        lines += [f"note: {note}" for note in self.notes]
        lines.append("fits" if self.fits else f"does not fit: {len(self.problems):,} problems")
        return "\n".join(printable(line) for line in lines)

    def _wanted(self) -> int:
        return sum(part.wanted for part in self.parts) + self._tied

    @property
    def _tied(self) -> bool:
        return self.config is None or self.config.decoder.kind == "gemma2"

    def _wanted_parameters(self) -> int:
        return sum(part.wanted_parameters for part in self.parts)


def inspect_folder(folder: str | Path, *, config: VidiConfig | None = None) -> Inspection:
    """Read headers only and compare them with ``config`` (default: the folder's config.json).

    Tensors of the one model under a config of the other are told by name. Raises CheckpointError for a folder that cannot
    be judged (see ``read_folder``; also a config that no model here can honour).
    """
    found = read_folder(folder)
    config = config or read_config(found)
    said, other = config.decoder.kind, "gemma2" if config.decoder.kind == "mistral" else "mistral"
    signs = explain.signs_of(other, found.tensors)
    try:
        wanted = names.expected(config)
    except ValueError as error:
        raise CheckpointError(str(error), file=found.path / CONFIG_NAME) from None
    problems = [*found.problems, *_compare(found, wanted, config)]
    if signs:
        text = f"config.json describes {KINDS[said]}, the tensors are those of {KINDS[other]}: {'; '.join(signs)}"
        problems.insert(0, Problem("model", text, file=CONFIG_NAME))
        recognised = KINDS[other]
    elif said == "gemma2":
        recognised = "Vidi 1.5 9B" if config == VidiConfig.full() else "Vidi 1.5 of another size"
    else:
        recognised = "Vidi 7B" if config.decoder.hidden_size == 4096 else "Vidi 7B of another size"
    made_up = [f"synthetic weights ({found.synthetic}): such a model speaks nonsense"] if found.synthetic else []
    notes = [*found.notes, *made_up, *_dtype_notes(found.tensors, wanted)]
    if not signs:
        notes += explain.facts(config, names.HEAD in found.tensors)
    return Inspection(
        path=found.path,
        recognised=recognised,
        config=config,
        parts=tuple(_count(part, found.tensors, wanted, problems) for part in _parts(found.tensors)),
        problems=tuple(problems),
        notes=tuple(notes),
        tensors=found.tensors,
        file_bytes=sum(shard.file_bytes for shard in found.shards),
        synthetic=found.synthetic,
    )


def read_config(found: Folder) -> VidiConfig:
    """The folder's config. Raises CheckpointError naming the file and the fields."""
    file = found.path / CONFIG_NAME
    try:
        return VidiConfig.from_official(found.config)
    except ValueError as error:
        raise CheckpointError(str(error)[:2000], file=file) from None


def _compare(found: Folder, wanted: Mapping[str, names.Expected], config: VidiConfig) -> list[Problem]:
    problems = []
    away = {tensor: file for file, tensors in found.absent_shards.items() for tensor in tensors}
    stored_layers = {(names.part_of(name), names.layer_of(name)) for name in found.tensors}
    for name, want in wanted.items():
        entry = found.tensors.get(name)
        if entry is None:
            file = away.get(name)
            text = IN_MISSING_SHARD if file else explain.missing(want, stored_layers)
            problems.append(Problem("missing", text, name, file, want.part))
        elif entry.shape != want.shape:
            text = explain.shape(want, entry.shape, config)
            problems.append(Problem("shape", text, name, entry.path.name, want.part))
        elif entry.dtype not in explain.FLOATS:
            problems.append(Problem("dtype", explain.dtype(want, entry.dtype), name, entry.path.name, want.part))
    for name, entry in found.tensors.items():
        if name == names.HEAD and name not in wanted:
            problems += _head(entry, wanted[names.HEAD_TIED_TO])
        elif name not in wanted:
            text, part = explain.unexpected(name, entry, wanted, config), names.part_of(name)
            problems.append(Problem("unexpected", text, name, entry.path.name, part))
    return problems


def _head(entry: Entry, embed: names.Expected) -> list[Problem]:
    """A stored head is fine where it repeats the embedding."""
    if entry.shape == embed.shape and entry.dtype in explain.FLOATS:
        return []
    text = f"{entry.dtype} {list(entry.shape)} cannot repeat the embedding {list(embed.shape)} that it is tied to"
    return [Problem("shape", text, names.HEAD, entry.path.name, "decoder")]


def _parts(tensors: Mapping[str, Entry]) -> tuple[str, ...]:
    return (*names.PARTS, "other") if any(names.part_of(name) is None for name in tensors) else names.PARTS


def _count(
    part: str, tensors: Mapping[str, Entry], wanted: Mapping[str, names.Expected], problems: list[Problem]
) -> PartCount:
    key = None if part == "other" else part
    entries = [
        entry
        for name, entry in tensors.items()
        if names.part_of(name) == key and (name != names.HEAD or name in wanted)
    ]
    mine = [want for want in wanted.values() if want.part == part]
    wrong = sum(p.tensor is not None and (p.part or names.part_of(p.tensor)) == key for p in problems)
    return PartCount(
        part=part,
        stored=len(entries),
        wanted=len(mine),
        parameters=sum(entry.numel for entry in entries),
        wanted_parameters=sum(math.prod(want.shape) for want in mine),
        dtypes=dict(Counter(entry.dtype for entry in entries)),
        problems=wrong,
    )


def _dtype_notes(tensors: Mapping[str, Entry], wanted: Mapping[str, names.Expected]) -> list[str]:
    rounded = {e.dtype for n, e in tensors.items() if n in wanted and wanted[n].is_float32} & {"BF16", "F16"}
    notes = []
    if rounded:
        notes.append(f"position MLPs are stored as {'/'.join(sorted(rounded))}; they are computed in float32")
    return notes


def _grouped(problems: tuple[Problem, ...]) -> list[str]:
    """One line for each kind of tensor and reason; layers joined."""
    groups: dict[tuple[str, str, str, str], list[Problem]] = {}
    for problem in problems:
        if problem.text == IN_MISSING_SHARD:
            continue  # the shard's own line counts them
        key = (problem.kind, names.without_layer(problem.tensor or ""), problem.text, problem.file or "")
        if problem.tensor is not None and names.layer_of(problem.tensor) is not None:
            key = (*key[:3], "")  # the layers of one kind lie in several shards
        groups.setdefault(key, []).append(problem)
    lines = []
    for (kind, tensor, text, file), members in groups.items():
        subject = tensor or file
        if tensor and len(members) == 1:
            subject = members[0].tensor or ""
        if len(members) > 1:
            layers = sorted({names.layer_of(p.tensor or "") or 0 for p in members})
            text += f" ({len(members)} tensors, layers {_ranges(layers)})"
        where = f" [{members[0].file}]" if tensor and members[0].file and len(members) == 1 else ""
        lines.append(f"{kind:<11}{subject[:200]}{where}: {text}")
    return lines


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    shown = ", ".join("-".join(map(str, run)) for run in runs[:8])
    return shown + (" …" if len(runs) > 8 else "")


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
