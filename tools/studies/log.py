"""What a long study has finished, a line for each piece, so that a stopped one goes on where it stopped."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stageparity import evidence
from stageparity.evidence import Basis

__all__ = ["Log"]


class Log:
    """Finished pieces of a study by key. What was measured on another basis does not count."""

    def __init__(self, path: Path, basis: Basis, fresh: bool = False) -> None:
        self.path, self._under = path, evidence.digest(json.dumps(asdict(basis), sort_keys=True))
        if fresh:
            path.unlink(missing_ok=True)
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        kept = [json.loads(line) for line in lines if line.endswith("}")]  # a killed writer leaves half a line
        self.done: dict[str, Any] = {line["key"]: line["found"] for line in kept if line["under"] == self._under}

    def add(self, key: str, found: Any) -> None:
        self.done[key] = found
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as out:
            out.write("\n" * self._broken() + json.dumps({"under": self._under, "key": key, "found": found}) + "\n")

    def _broken(self) -> bool:
        if not self.path.exists() or not self.path.stat().st_size:
            return False
        with self.path.open("rb") as file:
            file.seek(-1, 2)
            return file.read() != b"\n"
