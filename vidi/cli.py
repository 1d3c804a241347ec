"""The command line: parsing only. What a command does is imported when it runs, so that help costs no torch."""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from vidi import __version__

__all__ = ["main"]

INTERRUPTED = 130
COMMANDS = {
    "retrieve": "find time ranges in a video: vidi retrieve VIDEO QUERY --checkpoint DIR",
    "parity": "hold every stage of the model against stored goldens",
    "faults": "plant known faults one by one: does the harness see each, and where",
    "inspect": "tell what a checkpoint folder holds, without loading it",
    "synth": "write a synthetic checkpoint of any size",
    "bench": "time and memory of encoding, prefill and decoding",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="vidi", description="Vidi 1.5 9B and its golden-tensor parity harness")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name in given[:1]:
            _module(name).add_arguments(command)
    args = parser.parse_args(given)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = functools.partial(_show, warnings.showwarning)
            return int(_module(args.command).run(args))
    except KeyboardInterrupt:
        print(f"vidi {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _show(others: Callable[..., None], message: Warning | str, category: type[Warning], *where: Any) -> None:
    """The model's own warnings are for whoever runs a command: one line, without the place in the code."""
    if category.__module__.startswith("vidi."):
        print(f"warning: {message}", file=sys.stderr)
    else:
        others(message, category, *where)


def _module(command: str) -> Any:
    return importlib.import_module(f"vidi.commands.{command}")


if __name__ == "__main__":
    sys.exit(main())
