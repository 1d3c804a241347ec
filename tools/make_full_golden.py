"""Write the full-size case (`vidi.parity.full`): needs a GPU of 80 GB, about a minute.

python tools/make_full_golden.py [--out goldens/large/full] [--size full|tiny] [--device cuda]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vidi.config import VidiConfig
from vidi.parity import full

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "goldens" / full.FOLDER)
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    full.make(args.out, getattr(VidiConfig, args.size)(), device=args.device)
    data = args.out / f"{full.CASE}.h5"
    print(f"{data}: {data.stat().st_size / 1e6:.1f} MB")
