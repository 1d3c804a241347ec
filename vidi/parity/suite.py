"""A parity run: golden cases through a model, every stage judged twice.

*Chained*: the case runs from its raw inputs, so a stage's error holds all errors before it. *Isolated*: the stage is fed
its golden inputs, so its error is its own. Where the first stage diverges, the two say what is local and what inherited.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidi.fast import accelerate
from vidi.parity import casts, feed, fingerprint, ids, stages, store, tolerance, trace
from vidi.parity.compare import EXACT, Result, compare, nothing_compared
from vidi.parity.golden import Golden, GoldenError, Whole
from vidi.parity.store import Case, CaseRef, Targets
from vidi.parity.tolerance import Tolerances

__all__ = ["CaseRun", "Row", "Run", "judge", "run", "run_case", "select"]


@dataclass(frozen=True)
class Row:
    """One stage of one case. ``isolated`` is None where the case cannot feed the stage alone."""

    stage: str
    chained: Result | None
    isolated: Result | None

    @property
    def ok(self) -> bool:
        return all(r.ok for r in (self.chained, self.isolated) if r is not None)

    @property
    def results(self) -> list[Result]:
        return [r for r in (self.chained, self.isolated) if r is not None]


@dataclass(frozen=True)
class CaseRun:
    """All rows of one case, in pipeline order, and what could not be judged, with the reason."""

    case: str
    set: str
    reference: str  #: which goldens judged: none, official or recorded
    rows: tuple[Row, ...]
    not_run: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0
    notes: tuple[str, ...] = ()  #: what is the machine's doing, not the model's

    @property
    def name(self) -> str:
        return f"{self.set}/{self.case}"

    @property
    def first_divergence(self) -> Row | None:
        return next((row for row in self.rows if not row.ok), None)


@dataclass(frozen=True)
class Run:
    cases: tuple[CaseRun, ...]
    dtype: str
    backend: str
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    path: str = "plain"  #: plain, or fast (`vidi.fast`)

    @property
    def nothing(self) -> bool:
        return nothing_compared([r for case in self.cases for row in case.rows for r in row.results])

    @property
    def exit_code(self) -> int:
        """0 every compared stage is equal, 1 some differ, 3 nothing was compared."""
        if self.nothing:
            return 3
        return int(any(case.first_divergence is not None for case in self.cases))


def select(goldens: Path, case: str | None = None) -> list[CaseRef]:
    """Cases of a golden folder; ``case`` is a name, or SET/NAME. Raises GoldenError naming the choices."""
    refs = store.list_cases(goldens)
    wanted = [ref for ref in refs if case in (None, ref.name, f"{ref.set}/{ref.name}")]
    if not wanted:
        raise GoldenError(f"no case {case!r} in {goldens}: there are {', '.join(f'{r.set}/{r.name}' for r in refs)}")
    return wanted


def reference_of(case: Case, dtype: str) -> tuple[str, str]:
    """(variant of the goldens, gate) that judge a run in ``dtype`` (`goldens/tolerances.toml`)."""
    if "none" in case.variants:
        variant = "none" if dtype == "float64" else "official"
        return variant, tolerance.gate_name(dtype, variant)
    return "recorded", tolerance.gate_name(dtype, "recorded")


def unfit(recorded: str, dtype: str) -> str | None:
    """Why a recording in one dtype cannot judge a run in another, None where it can."""
    if recorded in ("bfloat16", "float16"):
        return f"a {recorded} recording has noise of its own as large as a run's: it tells how large an error may be"
    if dtype == "float64" and recorded != "float64":
        # In float64 the model's float32 steps vanish; the recording's did not, and one ulp there is 6e-4 rad in pos_t.
        return f"a {recorded} recording holds float32 steps that a float64 run does not have"
    return None


def run(
    refs: Sequence[CaseRef],
    tolerances: Tolerances,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    backend: str = "eager",
    glob: str | None = None,
    isolate: bool = True,
    fast: bool = False,
    on_case: Callable[[CaseRun, Mapping[str, Tensor]], None] | None = None,
) -> Run:
    """Run cases one after another. ``on_case`` sees each finished case and its chained tensors.

    ``fast``: through the fast path (`vidi.fast`), chained only; what it does not do (training) is NOT RUN.

    Raises GoldenError for goldens that cannot be trusted, ValueError where model or backend refuse the case.
    """
    finished = []
    with fingerprint.ieee():
        for ref in refs:
            case = store.open_case(ref.folder, ref.name)
            model = feed.load_model(case, feed.DTYPES[dtype], device, backend)
            if fast and (reason := trains(case)):
                tensors: dict[str, Tensor] = {}
                missing = tuple((stage, reason) for stage in ids.matching(case.targets, glob))
                result = CaseRun(case.name, case.set, reference_of(case, dtype)[0], (), missing)
            else:
                runner = accelerate(model) if fast else model
                isolate = isolate and not fast
                result, tensors = run_case(case, runner, tolerances, dtype=dtype, glob=glob, isolate=isolate)
            finished.append(result)
            if on_case is not None:
                on_case(result, tensors)
        return Run(tuple(finished), dtype, backend, fingerprint.fingerprint(device), "fast" if fast else "plain")


def trains(case: Case) -> str | None:
    """Why the fast path does not run a case; None where it does."""
    trained = "inputs.labels" in case.inputs
    return "the fast path is for inference: no loss, no gradients, no position noise" if trained else None


def run_case(
    case: Case,
    model: Any,
    tolerances: Tolerances,
    *,
    dtype: str,
    glob: str | None = None,
    isolate: bool = True,
) -> tuple[CaseRun, dict[str, Tensor]]:
    """One case through one model: its rows, and the chained tensors under their stage ids."""
    start = time.perf_counter()
    variant, gate = reference_of(case, dtype)
    targets = case.variant(variant)
    wanted = ids.matching(targets, glob)
    if variant == "recorded" and (reason := unfit(case.provenance["dtype"], dtype)):
        return CaseRun(case.name, case.set, variant, (), tuple((stage, reason) for stage in wanted)), {}
    chosen = set(wanted)
    chained = trace.capture(
        case, model, None if glob is None else (lambda stage: stage in chosen or stage[:6] == "xattn.")
    )
    alone: dict[str, Tensor] = {}
    bits: dict[str, Result] = {}
    if isolate and "inputs.input_ids" in case.inputs:
        bench = stages.Bench(case, model, targets)
        alone = dict(stages.isolated(bench, wanted))
        if dtype in casts.DTYPES and variant == "official" and (model.device.type, model.backend) == ("cpu", "eager"):
            bits = dict(casts.compare(bench, alone))
    rows, not_run, notes = [], [], []
    for stage in wanted:
        golden = targets[stage]
        try:
            rule, own_rule = (
                tolerances.rule(gate, stage, f"{case.set}/{case.name}", kind=kind)
                for kind in (tolerance.KINDS if stage in alone else tolerance.KINDS[:1] * 2)
            )
        except ValueError as error:
            not_run.append((stage, str(error)))
            continue
        result = compare_tensor(stage, chained.get(stage), golden, rule)
        own = compare_tensor(stage, alone[stage], golden, own_rule) if stage in alone else None
        if own is None and (entry := stages.find(stage)) is not None and entry[0].reads_raw:
            own = result
        if stage in bits and (own is None or bits[stage].ratio > max(own.ratio, 1)):
            own = bits[stage]  # within its error budget, and rounded in the wrong place
        rows.append(Row(stage, result, own))
        if stage == "pos.freq" and not result.ok and (note := machine_note(golden, chained[stage])):
            notes.append(note)
            rows[-1] = Row(stage, replace(result, ok=True, problems=()), None)
        if stage.endswith(".nocache.logits"):  # the same truth for decoding step by step
            cached = stage.replace("nocache", "cached")
            rows.append(Row(cached, compare_tensor(cached, chained[cached], golden, rule), None))
        elif stage.endswith((".tokens", ".lengths")) and not rows[-1].ok:
            rows[-1] = forgive_ties(rows[-1], stage, chained, targets)
    return CaseRun(
        case.name, case.set, variant, tuple(rows), tuple(not_run), time.perf_counter() - start, tuple(notes)
    ), chained


def machine_note(golden: Golden, found_K: Tensor) -> str | None:
    """Why a table of frequencies that is not the stored one is no fault of the model: it is what torch gives on this
    machine. None where it is neither. The chain runs with the stored table either way (`feed.load_model`)."""
    if not isinstance(golden, Whole) or not torch.equal(found_K, feed.machine_table(2 * len(found_K))):
        return None
    differ = int((found_K.numpy() != golden.array).sum())
    return (
        f"pos.freq: torch.exp on this machine differs in {differ} of {len(found_K)} entries; the stored table was used"
    )


def compare_tensor(stage: str, candidate: Tensor | None, golden: Golden, rule: Any) -> Result:
    """`compare.compare` for a tensor of any dtype on any device."""
    if candidate is None:
        return compare(stage, None, golden, rule)
    value = candidate.detach().cpu()
    name = str(value.dtype).removeprefix("torch.")
    array = value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
    return compare(stage, array, golden, rule, candidate_dtype=name)


def forgive_ties(row: Row, stage: str, chained: Mapping[str, Tensor], targets: Targets) -> Row:
    """Free-running tokens may part from the golden's where its two best logits are closer than the run's own logit
    error at that step; what follows the parting is another text and judges nothing."""
    variant = stage.rsplit(".", 1)[0]
    tokens, logits = targets.get(f"{variant}.tokens"), targets.get(f"{variant}.nocache.logits")
    mine, own = chained.get(f"{variant}.tokens"), chained.get(f"{variant}.nocache.logits")
    if not (isinstance(tokens, Whole) and isinstance(logits, Whole)) or mine is None or own is None:
        return row
    error, parted = np.abs(own.detach().cpu().double().numpy() - logits.array), set[int]()
    for b, golden_row in enumerate(tokens.array):
        found = mine[b].cpu().numpy()
        same = found[: len(golden_row)] == golden_row[: len(found)]
        if not same.all():
            parting = int(np.argmin(same))
            parted.add(b)
            second, first = np.sort(logits.array[b, parting])[-2:]
            if first - second > 2 * error[b, parting].max():
                return row
    lengths, ends, other = targets.get(f"{variant}.lengths"), chained.get(f"{variant}.lengths"), set[int]()
    if isinstance(lengths, Whole) and ends is not None:
        other = set(np.flatnonzero(ends.cpu().numpy() != lengths.array).tolist())
    if not parted or other - parted:  # the same tokens, and another end: no tie says why
        return row
    assert row.chained is not None
    tie = replace(
        row.chained, ok=True, problems=(), rule=replace(EXACT, why="parts only where two logits tie within the noise")
    )
    return Row(row.stage, tie, None)


def judge(run_: Run) -> Iterable[tuple[CaseRun, Row]]:
    """(case, row) of every stage that differs."""
    return ((case, row) for case in run_.cases for row in case.rows if not row.ok)
