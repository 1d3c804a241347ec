"""What `run_all.sh` leaves in a folder, as one JSON: parts with their counts, failures, and the worst error over budget.

python tests/gpu/summary.py FOLDER        writes FOLDER/gpu_tests.json
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from stageparity import evidence
from tools.studies import gpu


def part(path: Path) -> dict[str, Any]:
    """Counts of one JUnit file. not_run: named in full, because a part may pass without having run anything."""
    failed, not_run, worst, count = [], [], 0.0, 0
    for case in ElementTree.parse(path).iter("testcase"):
        count += 1
        name, kinds = case.get("name", "?"), {child.tag for child in case}
        if kinds & {"failure", "error"}:
            failed.append(name)
        elif "skipped" in kinds:
            not_run.append(name)
        for entry in case.iter("property"):
            if "over budget" in entry.get("name", "") and math.isfinite(value := float(entry.get("value", "nan"))):
                worst = max(worst, value)
    found = {"passed": count - len(failed) - len(not_run), "failed": failed, "not_run": not_run}
    return found | ({"worst_error_over_budget": worst} if worst else {})


def main() -> None:
    folder = Path(sys.argv[1])
    parts = {path.stem: part(path) for path in sorted(folder.glob("*.xml"))}
    logs = {path.stem for path in folder.glob("*.log")} - {"bench"}
    found = {
        "measured_on": gpu.measured_on(
            "gpu_tests.json", torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        ),
        "parts": parts,
        "not_finished": sorted(logs - set(parts)),  # stopped at the time limit, before it could write its file
    }
    evidence.write(folder / "gpu_tests.json", found)


if __name__ == "__main__":
    main()
