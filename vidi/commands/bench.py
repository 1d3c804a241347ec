"""`vidi bench` (see `vidi.bench`)."""

from vidi.bench import add_arguments, run

__all__ = ["add_arguments", "run"]
