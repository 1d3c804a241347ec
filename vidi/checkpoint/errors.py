"""The one exception of this package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stageparity.strict import Refused, one_line

__all__ = ["CheckpointError", "refusals"]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: says which file, which tensor where one is meant, and what to do.

    Every broken or hostile folder ends in this exception and in no other.
    """

    def __init__(self, problem: str, *, file: str | Path | None = None, tensor: str | None = None) -> None:
        self.problem, self.file, self.tensor = problem, None if file is None else str(file), tensor
        where = [self.file or "", f"tensor {_short(tensor)}" if tensor is not None else ""]
        super().__init__(one_line(": ".join([*filter(None, where), problem])))


@contextmanager
def refusals(*, of_tensors: bool = False) -> Iterator[None]:
    """What the strict opener refuses in the block, as CheckpointError. of_tensors: fields of the file are tensors' names."""
    try:
        yield
    except Refused as error:
        field = _short(error.field) if error.field is not None else None
        tensor = error.field if of_tensors else None
        problem = error.problem if tensor is not None or field is None else f"{field}: {error.problem}"
        raise CheckpointError(problem, file=error.file, tensor=tensor) from None


def _short(name: str, limit: int = 200) -> str:
    return name if len(name) <= limit else f"{name[:limit]}… ({len(name)} characters)"
