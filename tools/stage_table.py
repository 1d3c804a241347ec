"""Writes the table of stages as data, for where the model cannot be imported: goldens/stages.json. A test holds it current."""

from __future__ import annotations

import json
import sys

from stageparity import atomic, table
from vidi.cli import guarded
from vidi.parity.goldens import goldens_dir
from vidi.parity.port import TABLE
from vidi.parity.stages import SECTIONS, STAGES


def text() -> str:
    return json.dumps(table.to_data(STAGES, SECTIONS), indent=1, ensure_ascii=False) + "\n"


def run(argv: list[str]) -> int:
    atomic.write_text(goldens_dir() / TABLE, text())
    return 0


if __name__ == "__main__":
    sys.exit(guarded(run))
