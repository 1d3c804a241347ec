"""`vidi inspect` (see `vidi.checkpoint.commands`)."""

from vidi.checkpoint.commands import add_inspect_arguments as add_arguments
from vidi.checkpoint.commands import run_inspect as run

__all__ = ["add_arguments", "run"]
