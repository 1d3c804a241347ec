"""Arguments that several commands take, spelled and checked in one place."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = [
    "DTYPES",
    "Joined",
    "add_checkpoint",
    "add_dtype",
    "check_path",
    "checkpoint",
    "dtype",
    "memory",
    "positive",
    "text",
    "unread",
]

DTYPES = ("float64", "float32", "bfloat16", "float16")
_SHORT = {"bf16": "bfloat16", "fp16": "float16"}


def dtype(*allowed: str) -> Callable[[str], str]:
    """An argparse type: a dtype among ``allowed`` (default: all four), given by its name or as bf16 or fp16."""
    names = allowed or DTYPES

    def parse(text: str) -> str:
        name = _SHORT.get(text, text)
        if name not in names:
            short = [short for short, long in _SHORT.items() if long in names]
            raise argparse.ArgumentTypeError(f"{text!r}: choose {', '.join(names)} ({', '.join(short)} for short)")
        return name

    return parse


def add_dtype(parser: argparse.ArgumentParser, default: str | None, *allowed: str, help: str | None = None) -> None:
    """``--dtype``; ``args.dtype`` is then a name in DTYPES, which is also torch's name."""
    names = allowed or DTYPES
    text = help or f"{', '.join(names)}; bf16 and fp16 for short (default: {default})"
    parser.add_argument("--dtype", metavar="DTYPE", type=dtype(*names), default=default, help=text)


class Joined(argparse.Action):
    """An option of comma-separated patterns: given again, it adds to them."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if before is None else f"{before},{values}")


def text(word: str) -> str:
    """A word of the command line as text: under an ASCII locale UTF-8 arrives as bytes. Raises ValueError for no UTF-8."""
    try:
        word.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(word).decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{word!r} holds bytes that are no UTF-8") from None
    return word


def positive(word: str) -> int:
    """An argparse type: a whole number from 1 to 10 million."""
    if not re.fullmatch(r"0*[1-9]\d{0,7}", word, re.ASCII) or int(word) > 10_000_000:
        raise argparse.ArgumentTypeError(f"{word!r}: a whole number from 1 to 10,000,000 is needed")
    return int(word)


def unread(args: argparse.Namespace, where: str, /, **defaults: object) -> None:
    """Raises ValueError for an option that is given where nothing reads it. defaults: what each is where it is not given."""
    for name, default in defaults.items():
        if getattr(args, name) != default:
            raise ValueError(f"--{name} means nothing {where}; leave it out")


def check_path(path: str, backend: str | None) -> None:
    """Raises ValueError for a backend of attention that the fast path would not read. backend: None where none is named."""
    if path == "fast" and backend is not None:
        raise ValueError(f"--backend {backend}: the fast path has kernels of its own; use --path plain")


_UNITS = {"MB": 10**6, "MiB": 2**20, "GB": 10**9, "GiB": 2**30, "TB": 10**12, "TiB": 2**40}


def memory(word: str) -> int:
    """An argparse type: an amount of memory with its unit, such as 24GiB or 80GB, in bytes."""
    found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?) ?([MGT]i?B)", word, re.ASCII)
    if not found:
        raise argparse.ArgumentTypeError(f"{word!r}: an amount with its unit is needed, such as 24GiB or 80GB")
    return int(float(found[1]) * _UNITS[found[2]])


def add_checkpoint(parser: argparse.ArgumentParser, name: str, **options: object) -> None:
    """A checkpoint, by folder or public name, and ``--download``; read both with `checkpoint`."""
    text = "folder with config.json, shards, tokenizer.json, or a public name such as bytedance-research/Vidi1.5-9B"
    parser.add_argument(name, metavar="CHECKPOINT", help=text, **options)  # type: ignore[arg-type]
    parser.add_argument(
        "--download",
        action="store_true",
        help="fetch a public name that is not in the Hugging Face cache yet (21 GB); without it nothing is downloaded",
    )


def checkpoint(given: str, args: argparse.Namespace) -> Path:
    """The folder that CHECKPOINT means. Raises CheckpointError for a public name that is not here."""
    from vidi.checkpoint import hub

    return hub.resolve(given, download=args.download)
