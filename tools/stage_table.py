"""Writes the table of stages as data, for where the model cannot be imported: goldens/stages.json. A test holds it current."""

from __future__ import annotations

import json
import sys

from stageparity import atomic, table
from stageparity.stage import Stage
from vidi import cli
from vidi.checkpoint import names
from vidi.parity.goldens import goldens_dir
from vidi.parity.port import TABLE
from vidi.parity.stages import SECTIONS, STAGES


def text() -> str:
    weights = {stage.template: found for stage in STAGES if stage.alone_only is None and (found := _weights(stage))}
    return json.dumps(table.to_data(STAGES, SECTIONS, weights), indent=1, ensure_ascii=False) + "\n"


def _weights(stage: Stage) -> list[str]:
    """Official names of the weights that are a stage's own, {i} a layer of the decoder and * one of a tower."""
    parts = [code.name.removeprefix("model.") for code in stage.code if code.name.startswith("model.")]
    found, embedding = [], stage.template in ("text.embeds", "logits")  # tied: the head of 1.5 9B
    for row in (*names.TABLE, *names.TABLE_7B):
        own = any(row.ours == part or row.ours.startswith(f"{part}.") for part in parts)
        if own or (embedding and row.official in (names.HEAD, names.HEAD_TIED_TO)):
            found.append(row.official if "{i}" in stage.template else row.official.replace("{i}", "*"))
    return sorted(set(found))


def run(argv: list[str]) -> int:
    cli.parser(description=__doc__).parse_args(argv)
    atomic.write_text(goldens_dir() / TABLE, text())
    return 0


if __name__ == "__main__":
    sys.exit(cli.guarded(run))
