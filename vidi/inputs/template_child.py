"""A chat template in a process of its own: it is a program that came with a checkpoint, and may loop or grow without end.

Run as a script: a request on standard input, an answer on standard output, both JSON. Not even reading a template is free: what
is constant in it, ``2 ** 10 ** 9``, is computed then. Imports nothing of this project, so that it starts in a tenth of a second.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["MAX_TEXT", "MEMORY_BYTES", "SECONDS"]

SECONDS, MEMORY_BYTES = 2, 512 << 20  #: of computing, and of address space, the interpreter included
MAX_TEXT = 1 << 20  #: characters of what a template may make of one question


def _answer(template: str, values: dict[str, Any] | None) -> dict[str, str]:
    """``text`` of a template with its ``values`` (none: it is only read), or why not: ``unreadable`` or ``refused``."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    try:
        ready = environment.from_string(template)
    except Exception as error:
        return {"unreadable": _reason(error)}
    try:
        text = "" if values is None else ready.render(**values)
    except Exception as error:  # a template computes: it may divide by zero, or add a text to a number
        return {"refused": _reason(error)}
    return {"refused": f"{len(text):,} characters; at most {MAX_TEXT:,}"} if len(text) > MAX_TEXT else {"text": text}


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__)[:1000]


def _main() -> None:
    for what, most in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, MEMORY_BYTES)):
        _, hard = resource.getrlimit(what)
        resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    request = json.load(sys.stdin)
    json.dump(_answer(request["template"], request["values"]), sys.stdout)


if __name__ == "__main__":
    _main()
