"""How close other tokens come where the 7B decodes freely: the oracle's float64 logits along the golden's own text. Such a text
parts from the one along which logits are recorded, so these do not tell. Writes goldens/margins.json; a test holds it current.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import numpy as np

from goldens import oracle
from stageparity import atomic, store
from stageparity.golden import Whole
from stageparity.store import Case
from stageparity.tolerance import MARGINS
from vidi import cli
from vidi.parity import feed
from vidi.parity.goldens import goldens_dir, inputs_of

SETS = ("official-7b",)
NEAR = 1.0  #: of the logits' rms: about twice what one logit may err by in bfloat16, which is the most
GREEDY = "{}.greedy_nocache.tokens"


def text() -> str:
    """The file: case -> stage -> row -> step -> {token: how far it lies below the golden's, of the logits' rms}."""
    goldens = goldens_dir()
    cases = (store.open_case(ref.folder, ref.name) for name in SETS for ref in store.list_cases(goldens / name))
    found = {f"{case.folder.name}/{case.name}": dict(_of(case)) for case in cases if "generate" in case.info}
    return json.dumps(found, indent=None, separators=(",", ":")).replace("]],", "]],\n") + "\n"


def _of(case: Case) -> Iterator[tuple[str, list[list[dict[int, float]]]]]:
    inputs, weights, table = inputs_of(case), case.weights(), feed.table_of(case)
    assert table is not None
    for variant, settings in case.info["generate"].items():
        golden = case.targets.get(GREEDY.format(variant))
        assert isinstance(golden, Whole)
        given = {name: x for name, x in inputs.items() if name.startswith(("inputs.images", "inputs.audio"))}
        given["inputs.input_ids"] = inputs[f"{variant}.prompt_ids"]
        config = dict(case.config) | {"sliding_window": settings["window"]}
        logits_BSU = oracle.teacher_forced(config, weights, given, golden.array, pos_freq=table)
        best_BS1 = np.take_along_axis(logits_BSU, golden.array[..., None].astype(np.int64), -1)
        below_BSU = (best_BS1 - logits_BSU) / np.sqrt(np.square(logits_BSU).mean())
        assert (below_BSU >= 0).all(), f"{case.name} {variant}: the oracle says another text"
        yield (
            GREEDY.format(variant),
            [
                [_near(step, own) for step, own in zip(*row, strict=True)]
                for row in zip(below_BSU, golden.array, strict=True)
            ],
        )


def _near(below_U: np.ndarray, own: int) -> dict[int, float]:
    return {int(token): round(float(below_U[token]), 4) for token in np.flatnonzero(below_U < NEAR) if token != own}


def run(argv: list[str]) -> int:
    """Write the file."""
    cli.parser(description=__doc__).parse_args(argv)
    atomic.write_text(goldens_dir() / MARGINS, text())
    return 0


if __name__ == "__main__":
    sys.exit(cli.guarded(run))
