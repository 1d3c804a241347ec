"""What a ``tokenizer.json`` may hold before the library sees it.

The library runs what the file says: patterns that backtrack without end, replacements that make a thousand characters of one,
options on which it panics or aborts the process. None of it belongs to this model, whose tokenizer is a byte-fallback
BPE with a replaced space. So the file is read by the strict reader, held against the short list below, and what was
checked, nothing else, is handed on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stageparity import strict
from stageparity.strict import Refused

__all__ = ["MAX_BYTES", "read"]

MAX_BYTES, MAX_VALUES = 64 << 20, 4_000_000  # Gemma 2's takes 17 to 35 MB by how its merges are written
MAX_TOKEN, MAX_WORD, MAX_STEPS, MAX_ADDED = 256, 16, 8, 10_000
MAX_ID = 1 << 24
DROPPED = ("truncation", "padding", "post_processor")


def read(path: str | Path) -> str:
    """The file as JSON for ``Tokenizer.from_str``, without padding, truncation and what stands around special tokens.

    Raises Missing where there is none, Refused naming the field for whatever this model's tokenizer has no use for.
    """
    raw = strict.read_json(path, limit=MAX_BYTES, max_values=MAX_VALUES, hub_cache=True)
    try:
        _check(raw)
    except _Wrong as wrong:
        field, problem = wrong.args
        raise Refused(problem, file=path, field=field) from None
    kept = ("version", "added_tokens", "normalizer", "pre_tokenizer", "decoder", "model")
    return json.dumps({**dict.fromkeys(DROPPED), **{name: raw[name] for name in kept if name in raw}})


class _Wrong(Exception):
    """Field and problem."""


def _check(raw: Mapping[str, Any]) -> None:
    unread = dict.fromkeys(("version", *DROPPED), _any)
    steps = dict.fromkeys(("normalizer", "pre_tokenizer", "decoder"), _step)
    _fields(raw, "", added_tokens=_added, model=_model, **steps, **unread)


Check = Callable[[Any, str], None]


def _fields(value: Any, at: str, **checks: Check) -> None:
    """An object whose fields are among ``checks``, each held against its own."""
    if not isinstance(value, dict):
        raise _Wrong(at, f"an object is expected, found {type(value).__name__}")
    for name, item in value.items():
        place = f"{at}.{name[:40]}".removeprefix(".")
        if name not in checks:
            raise _Wrong(place, f"is no field known here; known are {', '.join(checks)}")
        checks[name](item, place)


def _any(value: Any, at: str) -> None:
    pass


def _one_of(*allowed: Any) -> Check:
    def check(value: Any, at: str) -> None:
        if not any(value is one or (type(value) is type(one) and value == one) for one in allowed):
            raise _Wrong(at, f"is {value!r:.60}; only {' or '.join(map(repr, allowed))} is read")

    return check


def _text(longest: int, shortest: int = 0) -> Check:
    def check(value: Any, at: str) -> None:
        if not isinstance(value, str) or not shortest <= len(value) <= longest:
            raise _Wrong(at, f"a text of {shortest} to {longest} characters is expected, found {value!r:.60}")

    return check


def _count(most: int) -> Check:
    def check(value: Any, at: str) -> None:
        if type(value) is not int or not 0 <= value <= most:
            raise _Wrong(at, f"a number from 0 to {most:,} is expected, found {value!r:.60}")

    return check


def _list(value: Any, at: str, most: int, each: Check) -> None:
    if not isinstance(value, list) or len(value) > most:
        found = f"{len(value):,}" if isinstance(value, list) else type(value).__name__
        raise _Wrong(at, f"a list of at most {most:,} is expected, found {found}")
    for number, item in enumerate(value):
        each(item, f"{at}[{number}]")


_BOOL = _one_of(True, False)


def _added(value: Any, at: str) -> None:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), _BOOL)

    def token(item: Any, place: str) -> None:
        _fields(item, place, id=_count(MAX_ID), content=_text(MAX_TOKEN, 1), **flags)

    _list(value, at, MAX_ADDED, token)


# Steps before and after the model. None makes a text longer, none searches by a pattern from the file.
_BYTE_LEVEL: dict[str, Check] = dict.fromkeys(("add_prefix_space", "trim_offsets", "use_regex"), _BOOL)
_METASPACE: dict[str, Check] = {
    "replacement": _text(1, 1),
    "prepend_scheme": _one_of("always", "never", "first"),
    **dict.fromkeys(("split", "add_prefix_space"), _BOOL),
}
_BEHAVIOURS = ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")


def _pattern(value: Any, at: str) -> None:
    if isinstance(value, dict) and "Regex" in value:
        raise _Wrong(at, "a regular expression, which can take time without end; this model's tokenizer has none")
    _fields(value, at, String=_text(MAX_WORD, 1))


_STEPS: dict[str, dict[str, dict[str, Check]]] = {
    "normalizer": {
        "Replace": {"pattern": _pattern, "content": _text(MAX_WORD)},
        "Prepend": {"prepend": _text(MAX_WORD)},
        "NFC": {},
    },
    "pre_tokenizer": {
        "Split": {"pattern": _pattern, "behavior": _one_of(*_BEHAVIOURS), "invert": _BOOL},
        "ByteLevel": _BYTE_LEVEL,
        "Metaspace": _METASPACE,
    },
    "decoder": {
        "Replace": {"pattern": _pattern, "content": _text(MAX_WORD)},
        "ByteFallback": {},
        "Fuse": {},
        "Strip": {"content": _text(1, 1), "start": _count(MAX_WORD), "stop": _count(MAX_WORD)},
        "ByteLevel": _BYTE_LEVEL,
        "Metaspace": _METASPACE,
    },
}
_LISTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}


def _step(value: Any, at: str, *, inner: bool = False) -> None:
    if value is None:
        return
    what = at.partition(".")[0].partition("[")[0]
    known = _STEPS[what]
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "Sequence" and not inner:

        def each(item: Any, place: str) -> None:
            if item is None:
                raise _Wrong(place, "an object is expected, found None")
            _step(item, place, inner=True)

        _fields(value, at, type=_any, **{_LISTS[what]: lambda items, place: _list(items, place, MAX_STEPS, each)})
        return
    if not isinstance(kind, str) or kind not in known:
        raise _Wrong(at, f"a {what} of type {kind!r:.60}; known are {', '.join(known)}, and one Sequence of them")
    _fields(value, at, type=_any, **known[kind])
    if kind == "Replace" and len(value.get("content", "")) > len(value.get("pattern", {}).get("String", "")):
        raise _Wrong(at, "replaces a text by a longer one, so that a short question could grow without bound")


def _model(value: Any, at: str) -> None:
    def vocab(items: Any, place: str) -> None:
        if not isinstance(items, dict):
            raise _Wrong(place, f"an object is expected, found {type(items).__name__}")
        for token, number in items.items():
            if len(token) > MAX_TOKEN or type(number) is not int or not 0 <= number < MAX_ID:
                raise _Wrong(f"{place}.{token[:40]}", f"at most {MAX_TOKEN} characters and an id below {MAX_ID:,}")

    def merges(items: Any, place: str) -> None:
        if not isinstance(items, list):
            raise _Wrong(place, f"a list is expected, found {type(items).__name__}")
        for number, item in enumerate(items):
            pair = item.split(" ") if isinstance(item, str) else item
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(one, str) for one in pair):
                raise _Wrong(f"{place}[{number}]", "a pair of tokens is expected")

    flags = dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), _BOOL)
    nothing = _one_of(None, "")
    _fields(
        value,
        at,
        type=_one_of("BPE"),
        dropout=_one_of(None, 0.0),  # else the ids of a question are a matter of chance
        unk_token=lambda item, place: None if item is None else _text(MAX_TOKEN)(item, place),
        continuing_subword_prefix=nothing,
        end_of_word_suffix=nothing,
        vocab=vocab,
        merges=merges,
        **flags,
    )
