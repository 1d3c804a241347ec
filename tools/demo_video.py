"""Make a short video with sound, for trying the commands on.

    python tools/demo_video.py OUT.mp4 [--seconds 8]

A disc crosses a slowly turning gradient from left to right, and a tone rises while it does.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np

from stageparity import atomic
from stageparity.strict import printable
from vidi import cli
from vidi.commands import outputs

__all__ = ["main", "make"]

WIDTH, HEIGHT, FPS, RATE_HZ = 160, 120, 10, 48000


def picture(index: int, count: int) -> np.ndarray:
    """Frame ``index`` of ``count``: (H, W, 3) uint8."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    turn = 2 * np.pi * index / count
    shade = 90 + 60 * np.sin(x / 40 + turn) + 40 * np.cos(y / 30 - turn)
    rgb = np.stack([shade, shade[::-1], 255 - shade], axis=-1)
    disc = (x - WIDTH * (index + 0.5) / count) ** 2 + (y - HEIGHT / 2) ** 2 < 18**2
    rgb[disc] = (230, 40, 40)
    return rgb.clip(0, 255).astype(np.uint8)


def make(path: Path, seconds: float = 8.0) -> None:
    """Write an mp4 of ``seconds`` at 10 frames a second (H.264) with mono sound (AAC), whole or not at all."""
    count = max(1, round(seconds * FPS))
    time = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    tone = np.sin(2 * np.pi * (220 + 60 * time) * time) * 0.4
    film = io.BytesIO()
    with av.open(film, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast"})
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        audio = container.add_stream("aac", rate=RATE_HZ)
        audio.layout = "mono"
        sound = av.AudioFrame.from_ndarray(np.round(tone * 32767).astype(np.int16)[None], format="s16", layout="mono")
        sound.sample_rate, sound.pts = RATE_HZ, 0
        container.mux(audio.encode(sound))
        container.mux(audio.encode(None))
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(picture(index, count), format="rgb24")
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    atomic.write_bytes(path, film.getvalue())


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    return cli.guarded(_run, arguments, name="demo_video.py")


def _run(arguments: list[str]) -> int:
    parser = cli.parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.mp4")
    parser.add_argument("--seconds", type=float, default=8.0)
    args = parser.parse_args(arguments)
    if not 0.1 <= args.seconds <= 300:
        parser.error(f"--seconds is {args.seconds}: between 0.1 and 300")
    if args.out.suffix != ".mp4":
        raise ValueError(f"{args.out}: a name that ends in .mp4 is needed")
    outputs.check(args.out)
    make(args.out, args.seconds)
    print(printable(str(args.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
