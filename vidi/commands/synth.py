"""`vidi synth` (see `vidi.checkpoint.commands`)."""

from vidi.checkpoint.commands import add_synth_arguments as add_arguments
from vidi.checkpoint.commands import run_synth as run

__all__ = ["add_arguments", "run"]
