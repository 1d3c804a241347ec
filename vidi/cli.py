"""The command line: parsing, and the one place where errors become an exit status and a line of text.

What a command does is imported when it runs, so that help costs no torch. Nothing but `sys` is imported above `main`: until
`guarded` runs, Ctrl-C would end in a traceback.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Callable, Sequence
    from typing import Any

__all__ = ["BROKEN_PIPE", "COMMANDS", "INTERRUPTED", "UNUSABLE", "Ended", "guarded", "main", "parser"]

UNUSABLE, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
#: What ends a command from outside, and what is then said; the status is 128 and the signal's number, as of a shell.
SIGNALS = {1: "ended by SIGHUP: its terminal has gone", 2: "interrupted", 15: "ended by SIGTERM"}
#: Seconds after which Ctrl-C is raised again where it was lost: in a destructor, or in a library's `except:`.
PATIENCE = 3.0
COMMANDS = {
    "retrieve": "find time ranges in a video: vidi retrieve VIDEO QUERY --checkpoint DIR",
    "parity": "hold every stage of the model against stored goldens",
    "port": "hold someone else's port against the goldens: vidi port init CASE OUT, then vidi port run OUT/adapter.py",
    "faults": "plant known faults one by one: does the harness see each, and where",
    "budget": "what a stage may err by, and what that is made of",
    "inspect": "tell what a checkpoint folder holds, without loading it, and what a run of it needs",
    "synth": "write a synthetic checkpoint of any size",
    "bench": "time and memory of encoding, prefill and decoding",
}


class Ended(KeyboardInterrupt):
    """SIGTERM or SIGHUP: drafts and children of the command go with it, as on Ctrl-C. ``signal`` is its number."""

    def __init__(self, signal: int) -> None:
        super().__init__()
        self.signal = signal


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    words = [word for word in (sys.argv[1:] if argv is None else argv) if not word.startswith("-")]
    return guarded(_run, argv, name=f"vidi {words[0]}" if words and words[0] in COMMANDS else "vidi")


def guarded(
    run: Callable[[list[str]], int | None], argv: Sequence[str] | None = None, *, name: str | None = None
) -> int:
    """``run(arguments)`` as a program: its status, and whatever it raises as one line on stderr and a status.

    2: input that cannot be used (ValueError, OSError, a missing library), output that cannot be written, or an error
    of the program itself, which the line then says. 130, 143, 129: Ctrl-C, SIGTERM, SIGHUP. 141: who read the output has
    gone, as `| head` does; nothing is said. ``--debug`` among the arguments shows the traceback as well. argv: default the
    command line, for which closed standard streams and signals are looked after too.
    """
    import os

    given = list(sys.argv[1:] if argv is None else argv)
    name = name or os.path.basename(sys.argv[0])
    end = given.index("--") if "--" in given else len(given)
    debug = "--debug" in given[:end]
    given = [word for word in given[:end] if word != "--debug"] + given[end:]
    try:
        if argv is None:
            _own_process(name)
        try:
            return int(run(given) or 0)
        finally:
            sys.stdout.flush()
    except SystemExit as stop:
        if not isinstance(stop.__context__, BrokenPipeError):  # of which rich makes a 1
            raise
        status, said = BROKEN_PIPE, ""
    except BaseException as error:
        if argv is None:
            _heard()
        if debug:
            import traceback

            traceback.print_exc()
        status, said = _verdict(error)
    if said:
        _say(f"{name}: {said}")
    _drop_output()
    return status


def parser(**options: Any) -> ArgumentParser:
    """An argparse parser for a command or a tool, `parser.Parser`."""
    from vidi.parser import Parser

    return Parser(**options)


def _run(given: list[str]) -> int:
    import functools
    import importlib
    import os
    import warnings

    from vidi import __version__

    def module(command: str) -> Any:
        return importlib.import_module(f"vidi.commands.{command}")

    words = parser(
        prog="vidi",
        description="Vidi 1.5 9B and its golden-tensor parity harness",
        epilog="Exit status: 2 for input that cannot be used and for errors, 130 for Ctrl-C, 143 for "
        "SIGTERM, 129 for SIGHUP, 141 where the reader of the output has gone; 0, 1 and 3 as each command says.",
    )
    words.add_argument("--version", action="version", version=__version__)
    words.add_argument("--debug", action="store_true", help="show the traceback of an error; before or after COMMAND")
    commands = words.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name in given[:1]:
            module(name).add_arguments(command)
    args = words.parse_args(given)
    try:
        os.getcwd()
    except FileNotFoundError:  # torch's libraries would end the process with a riddle of their own
        raise ValueError("the folder that this runs in is gone; change to another one first (cd)") from None
    with warnings.catch_warnings():
        warnings.showwarning = functools.partial(_show, warnings.showwarning)
        return int(module(args.command).run(args))


def _show(others: Callable[..., None], message: Warning | str, category: type[Warning], *where: Any) -> None:
    """The model's own warnings are for whoever runs a command: one line, without the place in the code."""
    if category.__module__.startswith("vidi."):
        _say(f"warning: {message}")
    else:
        others(message, category, *where)


def _verdict(error: BaseException) -> tuple[int, str]:
    """Status and line of an exception; an unforeseen one is named with its type and how to see more."""
    from stageparity.atomic import said
    from stageparity.strict import one_line

    if isinstance(error, KeyboardInterrupt):
        number = error.signal if isinstance(error, Ended) else 2
        return 128 + number, SIGNALS[number]
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE, ""
    text = one_line(" ".join(str(error).split("\n")[:3]))
    # torch says so on a GPU by the type, on a CPU in the text alone.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        text = f"not enough memory{f' ({text})' if text else ''}; use a smaller input or a larger machine"
    elif isinstance(error, OSError) and error.strerror:
        # Whatever writes a file names it: only a stream is full without a name.
        name = "standard output" if error.filename is None and error.errno in (27, 28) else error.filename
        text = one_line(said(error) if name is None else f"{name}: {said(error)}")
    elif not text or not isinstance(error, ValueError | ImportError) or isinstance(error, UnicodeError):
        text = f"unexpected {type(error).__name__}: {text}; a fault of this program: --debug shows where"
    return UNUSABLE, text


def _own_process(name: str) -> None:
    """What concerns the process as a whole: its standard streams and their width, and signals, also while a module is being
    imported."""
    import os
    import re
    import signal
    from contextlib import suppress

    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # a standard stream is closed: no file of ours may take its number
    os.close(handle)
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    if sys.stdout is None:
        raise OSError(9, "standard output is closed; send it to a file or to /dev/null")
    for stream in (sys.stdout, sys.stderr):
        # An ASCII terminal shows é as \xe9, and names of files that are no text as the bytes they are.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]

    last = signal.SIGINT

    def interrupted(number: int, frame: Any) -> None:
        nonlocal last
        last = last if number == signal.SIGALRM else signal.Signals(number)
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                # Half-imported extensions turn the exception into others, or crash. No work has begun.
                with suppress(OSError):  # of a terminal that has gone
                    os.write(2, f"{name}: {SIGNALS[last]}\n".encode("utf-8", "backslashreplace"))
                os._exit(128 + last)
            frame = frame.f_back
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        raise KeyboardInterrupt if last == signal.SIGINT else Ended(last)

    signal.signal(signal.SIGALRM, interrupted)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # else the caller wants it ignored, as nohup does
            signal.signal(number, interrupted)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupted)
    # A destructor cannot pass it on; what Python would say of it would stand beside our own line.
    others = sys.unraisablehook
    sys.unraisablehook = lambda lost: None if lost.exc_type in (KeyboardInterrupt, Ended) else others(lost)
    for size in ("COLUMNS", "LINES"):
        # At a width of 0 rich prints nothing at all, and takes ² for a number.
        if not re.fullmatch(r"[1-9]\d{0,3}", os.environ.get(size, "80"), re.ASCII):
            del os.environ[size]


def _heard() -> None:
    """Whatever was interrupted has come to its end; Ctrl-C need not be raised again."""
    import signal

    signal.setitimer(signal.ITIMER_REAL, 0)


def _say(text: str) -> None:
    from contextlib import suppress

    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _drop_output() -> None:
    """What still waits to be written to a stream that takes no more must not fail again when the process ends."""
    import os
    from contextlib import suppress

    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        return
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
