"""argparse as every command and tool has it: an error is one line that names what was probably meant."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from stageparity.strict import one_line, printable

__all__ = ["Parser", "meant"]

LONGEST = 400  # of an error
_COMPARED = 100  # of a word: difflib takes time by the square
_LONG = re.compile(r"(\S{60})\S{20,}")  # a word of 5,000 digits is cut, not what follows it


class _Once(argparse.Action):
    """What argparse calls store, which keeps the last value and forgets the others in silence."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if self.option_strings and self.dest in parser.given:
            raise argparse.ArgumentError(self, "is given twice, and one of them would be forgotten")
        parser.given.add(self.dest)
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """Beside argparse's own: words may follow options, none may be empty, an option of one value is given once, and the command
    whose option is unknown says so."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.given: set[str] = set()  # options of the command line that is being read
        for name in ("store", None):
            self.register("action", name, _Once)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        self.given.clear()
        words = sys.argv[1:] if args is None else list(args)
        found, rest = super().parse_known_args(words, namespace)
        if rest and not self._taken(found, rest):
            wrong = next((word for word in rest if word.startswith("-")), rest[0])
            self.error(f"unknown: {wrong}{meant(wrong.partition('=')[0], self._known(options=True))}")
        for before, word in zip(["", *words], words, strict=False):
            if not word or re.fullmatch("--[a-z-]+=", word):
                # A script's unset variable: it must not read as an option left out, nor as this folder.
                name = word.rstrip("=") or (before if before.startswith("-") else "a word")
                self.error(f"{name} is empty; give it a value, or leave it out")
        return found, []

    def error(self, message: str) -> NoReturn:
        """One line, and exit 2."""
        if wrong := re.search(r"invalid choice: '(.*)' \(choose from", message, re.DOTALL):
            message += meant(wrong[1], self._known(options=False))
        elif "are required" in message and (names := self._known(options=False, commands=True)):
            message += f", one of {', '.join(names)}"
        said = one_line(_LONG.sub(r"\1…", message), LONGEST)
        self.exit(2, f"{self.prog}: {said}; {self.prog} --help tells more\n")

    # argparse's own swallows what a full disk says.
    def _print_message(self, message: str, file: Any = None) -> None:
        (file or sys.stderr).write(message)

    def _known(self, *, options: bool, commands: bool = False) -> list[str]:
        """Options, or what arguments may be; of these the commands alone."""
        kept = [a for a in self._actions if not commands or isinstance(a, argparse._SubParsersAction)]
        return [str(word) for action in kept for word in (action.option_strings if options else action.choices or ())]

    def _taken(self, found: argparse.Namespace, rest: Sequence[str]) -> bool:
        """Words behind an option go where those before it went; argparse ends a `*` at the first option (until 3.13)."""
        end = rest.index("--") if "--" in rest else len(rest)
        several = [action.dest for action in self._actions if action.nargs == "*" and not action.option_strings]
        if not several or any(word.startswith("-") for word in rest[:end]):
            return False
        setattr(found, several[0], [*getattr(found, several[0]), *rest[:end], *rest[end + 1 :]])
        return True


def meant(word: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` with the known name nearest to ``word``; nothing where none is near."""
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), names, n=1) if len(word) <= _COMPARED else []
    return f" (did you mean {printable(names[near[0]])}?)" if near else ""
