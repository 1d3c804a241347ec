"""Cases that break each limit of `tests.limited`, to see that it notices."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tests.limited import watched


def case(seed: int, folder: Path) -> str:
    if seed == 0:
        return str(len(bytearray(3 << 30)))
    if seed == 1:
        time.sleep(60)
    if seed == 2:
        os.abort()
    if seed == 4:
        with watched(folder / "outside"):
            (folder / "outside" / "new").touch()
    raise AssertionError("wrong")
