"""Opening files that someone else wrote: regular ones, inside their folder, of bounded size and content.

Nothing here blocks on a pipe or a device, follows a link out of a folder, or lets a few bytes ask for much memory. Whatever
a file holds, the answer is its content or `Refused`, whose text is one line that a terminal can show. Standard library
alone.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["MAX_INTEGER", "MAX_JSON_BYTES", "Missing", "Refused", "locate", "open_file", "parse_json", "parse_toml"]
__all__ += ["one_line", "printable", "read_bytes", "read_json", "read_toml", "reason", "shaped"]

MAX_JSON_BYTES, MAX_TOML_BYTES = 4 << 20, 1 << 20
MAX_DEPTH, MAX_VALUES = 64, 1_000_000
MAX_INTEGER = 2**63 - 1
_LONGEST_NUMBER, _LONGEST_TOML_LINE = 400, 10_000  # characters


class Refused(ValueError):
    """A file that is not read: ``problem`` says why, ``file`` and ``field`` where."""

    def __init__(self, problem: str, *, file: str | Path | None = None, field: str | None = None) -> None:
        self.problem, self.file, self.field = problem, None if file is None else str(file), field
        super().__init__(one_line(": ".join(part for part in (self.file, _short(field), problem) if part)))


class Missing(Refused):
    """There is no such file."""


@contextmanager
def shaped(file: str | Path) -> Iterator[None]:
    """In the block a document is used as what it should be; where it is of another form, Refused names its file."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, OverflowError) as error:
        problem = f"is not of the form that is read here ({type(error).__name__}: {reason(error)})"
        raise Refused(problem, file=file) from error


def printable(text: str, keep: str = "") -> str:
    """``text`` as a terminal can show it: control, format and unpaired characters escaped, but those in ``keep``.

    For everything that came from outside: names of files, keys and tensors in them, answers of a model, error texts.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def one_line(text: str, limit: int = 1200) -> str:
    """An error's text: printable, and cut where names out of a file would make it longer than anybody reads."""
    return printable(text if len(text) <= limit else f"{text[:limit]} …")


# ---- opening --------------------------------------------------------------------------------------------------------


def locate(folder: str | Path, name: str, *, hub_cache: bool = False) -> Path | None:
    """The real path of the regular file ``folder/name``, None where there is none.

    Raises Refused for a name that leaves the folder, for a link that does, and for what is no regular file. hub_cache: one
    layout of links out is allowed, that of the Hugging Face cache: ``snapshots/REVISION/FILE`` may point into the
    ``blobs`` folder beside ``snapshots``.
    """
    folder = Path(folder)
    if not name or "\x00" in name or "\\" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise Refused(f"names {name[:200]!a}, a path that leaves the folder; refused", file=folder)
    path = folder / name
    try:
        real, root = path.resolve(strict=True), folder.resolve(strict=True)
        allowed = [root]
        if hub_cache and root.parent.name == "snapshots":
            allowed.append(root.parent.parent / "blobs")
        if not any(real.is_relative_to(place) for place in allowed):
            raise Refused("is a link to a place outside the folder; refused. Copy the file here", file=path)
        _check_regular(real.lstat(), path)
    except FileNotFoundError:
        return None
    except Refused:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long, no permission
        raise Refused(f"cannot be opened ({reason(error)})", file=path) from None
    return real


def open_file(
    path: str | Path, *, limit: int | None = None, hub_cache: bool = False, inside: str | Path | None = None
) -> BinaryIO:
    """Open a regular file for reading, unbuffered; it must lie in the folder that ``path`` names, or in ``inside`` above that.

    limit: bytes. Raises Missing where there is none, Refused as `locate` does and for a larger file.
    """
    path = Path(path)
    root = Path(inside) if inside is not None else path.parent
    real = locate(root, str(path.relative_to(root)), hub_cache=hub_cache)
    if real is None:
        raise Missing("no such file", file=path)
    try:
        handle = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise Refused(f"cannot be opened ({reason(error)})", file=path) from None
    file = os.fdopen(handle, "rb", buffering=0)
    try:
        found = os.fstat(handle)
        _check_regular(found, path)
        if limit is not None and found.st_size > limit:
            raise Refused(f"{found.st_size:,} bytes; at most {limit:,} are read", file=path)
    except Refused:
        file.close()
        raise
    return file


def read_bytes(path: str | Path, *, limit: int, hub_cache: bool = False, inside: str | Path | None = None) -> bytes:
    """The whole file, at most ``limit`` bytes. Raises as `open_file` does."""
    with open_file(path, limit=limit, hub_cache=hub_cache, inside=inside) as file:
        parts, left = [], limit + 1  # the file may grow while it is read
        try:
            while left and (part := file.read(min(left, 1 << 20))):
                parts.append(part)
                left -= len(part)
        except OSError as error:
            raise Refused(f"cannot be read ({reason(error)})", file=path) from None
    if not left:
        raise Refused(f"more than {limit:,} bytes", file=path)
    return b"".join(parts)


def _check_regular(found: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise Refused(f"is {kinds.get(stat.S_IFMT(found.st_mode), 'a device')}, no regular file", file=path)


# ---- JSON and TOML --------------------------------------------------------------------------------------------------


def read_json(
    path: str | Path,
    *,
    limit: int = MAX_JSON_BYTES,
    hub_cache: bool = False,
    inside: str | Path | None = None,
    **bounds: int,
) -> dict[str, Any]:
    """The JSON object in a file, opened as by `open_file`; bounds as in `parse_json`."""
    value = parse_json(read_bytes(path, limit=limit, hub_cache=hub_cache, inside=inside), file=path, **bounds)
    if not isinstance(value, dict):
        raise Refused(f"a JSON object is expected, found {type(value).__name__}", file=path)
    return value


def parse_json(
    data: bytes, *, file: str | Path | None = None, max_depth: int = MAX_DEPTH, max_values: int = MAX_VALUES
) -> Any:
    """JSON in UTF-8. Refused naming the field: keys that appear twice, integers beyond 64 bits, numbers that are not
    finite; also deeper nesting and more values than the bounds. Parsed values take about 100 bytes each beside their text.
    """
    if data.count(b"[") + data.count(b"{") + data.count(b",") >= max_values:
        raise Refused(f"more than {max_values:,} values of JSON", file=file)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise Refused("appears twice", file=file, field=twice)
        return found

    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=unique, parse_constant=_Odd, parse_int=_integer, parse_float=_float
        )
    except Refused:
        raise
    except RecursionError:
        raise Refused("JSON nested too deeply", file=file) from None
    except ValueError as error:  # also UnicodeDecodeError and JSONDecodeError
        raise Refused(f"damaged JSON ({reason(error)})", file=file) from None
    _check_values(value, max_depth, max_values, file)
    return value


def read_toml(path: str | Path, *, limit: int = MAX_TOML_BYTES, hub_cache: bool = False) -> dict[str, Any]:
    """A TOML file, bounded as `parse_json` bounds JSON."""
    return parse_toml(read_bytes(path, limit=limit, hub_cache=hub_cache), file=path)


def parse_toml(
    data: bytes, *, file: str | Path | None = None, max_depth: int = MAX_DEPTH, max_values: int = MAX_VALUES
) -> dict[str, Any]:
    """TOML in UTF-8; refused as by `parse_json`, and a line of more than 10,000 bytes: dotted keys cost their square."""
    if any(len(line) > _LONGEST_TOML_LINE for line in data.split(b"\n")):
        raise Refused(f"a line of more than {_LONGEST_TOML_LINE:,} bytes", file=file)
    import tomllib  # not at once: the pytest plugin is loaded where nobody asked for it

    try:
        value = tomllib.loads(data.decode("utf-8"), parse_float=_float)
    except RecursionError:
        raise Refused("TOML nested too deeply", file=file) from None
    except ValueError as error:  # also integers of thousands of digits
        raise Refused(f"damaged TOML ({reason(error)})", file=file) from None
    _check_values(value, max_depth, max_values, file)
    return value


class _Odd(str):
    """A number that no reader takes, kept until the field that holds it is known."""

    __slots__ = ()


def _integer(text: str) -> Any:
    return int(text) if len(text) <= 20 and abs(int(text)) <= MAX_INTEGER else _Odd(text)


def _float(text: str) -> Any:
    if len(text) > _LONGEST_NUMBER:
        return _Odd(text)
    value = float(text)
    return value if value - value == 0 else _Odd(text)


def _check_values(value: Any, max_depth: int, max_values: int, file: str | Path | None) -> None:
    count = 0
    levels: list[Iterator[tuple[Any, Any]]] = [iter([("", value)])]
    keys: list[Any] = []
    while levels:
        for key, item in levels[-1]:
            count += 1
            if isinstance(item, dict | list):
                if len(levels) > max_depth:
                    raise Refused(f"nested deeper than {max_depth}", file=file, field=_path([*keys, key]))
                keys.append(key)
                levels.append(iter(item.items()) if isinstance(item, dict) else enumerate(item))
                break
            if type(item) is _Odd or (type(item) is int and abs(item) > MAX_INTEGER):
                text = str(item) if len(str(item)) <= 40 else f"{str(item)[:40]}…"
                raise Refused(f"{text} is no number that is read here", file=file, field=_path([*keys, key]))
        else:
            levels.pop()
            if keys:
                keys.pop()
    if count > max_values:
        raise Refused(f"more than {max_values:,} values", file=file)


def _path(keys: list[Any]) -> str:
    """``a.b[3]`` for the keys on the way to a value; the first stands for the whole."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys[1:])
    return text.removeprefix(".")


def _short(text: str | None, limit: int = 200) -> str:
    return "" if text is None else text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


def reason(error: BaseException) -> str:
    """One short line of an exception."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return printable(text.splitlines()[0][:200])
