"""Reads each file named on standard input, both ways, and says how it went: run as a child process with limits.

One line before a file and one behind it, so that whoever waits knows which file hangs, and where a crash happened.
"""

from __future__ import annotations

import resource
import sys
import time

from vidi.config import VidiConfig
from vidi.inputs import video
from vidi.inputs.container import MediaError
from vidi.inputs.reader import Reader, Recounted

CONFIG = VidiConfig.tiny()


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def taken(reader: Reader) -> list[bytes]:
    with reader:
        pictures = [picture.numpy().tobytes() for picture in reader.pictures()]
        reader.sound()
    return pictures


def read(path: str) -> str:
    try:
        reader = Reader(path, CONFIG, fps=10)
        try:
            quick = taken(reader)
        except Recounted:
            reader = reader.again()
            quick = taken(reader)
    except MediaError as error:
        return f"refused {error}" if path in str(error) else f"nameless {error}"
    try:
        slow = video.read_frames(path, fps=10, size=26, check=True)
    except MediaError as error:
        return f"unnoticed {error}"
    same = b"".join(quick) == slow.images_u8.numpy().tobytes()
    return f"{'same' if same else 'differs'} {reader.video.reading} {reader.video.why}"


if __name__ == "__main__":
    before = peak_mib()
    for line in sys.stdin:
        path = line.rstrip("\n")
        print(f"start {path}", flush=True)
        started = time.perf_counter()
        found = read(path).replace("\n", " ")
        print(f"done {time.perf_counter() - started:.3f} {peak_mib() - before} {path} {found}", flush=True)
