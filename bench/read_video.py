"""How long reading a video takes, beside FFmpeg's own full decode and beside decord, in one run on one machine.

    python bench/read_video.py [--seconds 240] [--mbit 5] [--video FILE] [--runs 3] [--json OUT]

Without --video a film is made first: 1080p30 H.264 (libx264, preset fast, B-frames, a key frame every 250) with AAC
sound, 60 s encoded once and repeated. Needs PyAV, NumPy, Pillow and torch; decord and the ffmpeg command (imageio-ffmpeg)
are measured where they are installed, and named NOT RUN where not.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from stageparity import atomic, evidence
from vidi import cli
from vidi.commands import outputs
from vidi.commands.arguments import positive, unread
from vidi.config import VidiConfig
from vidi.inputs import video
from vidi.inputs.reader import Reader

ROOT = Path(__file__).parents[1]
WIDTH, HEIGHT, FPS, MADE_SEC = 1920, 1080, 30, 60


def make(path: Path, seconds: int, mbit: int) -> None:
    """A film of ``seconds`` at ``mbit`` Mbit/s: what `encode` makes, as often as it takes."""
    once, once_sec = path.with_suffix(".once.mp4"), min(seconds, MADE_SEC)
    encode(once, once_sec, mbit)
    repeat(once, once_sec, path, seconds)
    once.unlink()


def encode(path: Path, seconds: int, mbit: int) -> None:
    """A drifting texture with grain, squares that move over it, a sweep to hear."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(40, 200, (HEIGHT // 8 + 80, WIDTH // 8 + 80), dtype=np.uint8)
    texture = np.asarray(
        av.VideoFrame.from_ndarray(coarse, format="gray")
        .reformat(width=8 * coarse.shape[1], height=8 * coarse.shape[0], interpolation="BICUBIC")
        .to_ndarray()
    )
    grain = rng.integers(0, 6, (8, HEIGHT, WIDTH), dtype=np.uint8)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=FPS, options={"preset": "fast"})
        stream.bit_rate = 1_000_000 * mbit
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        track = out.add_stream("aac", rate=48000)
        track.layout = "stereo"
        t = np.arange(seconds * 48000) / 48000
        sound = np.stack([np.sin(2 * np.pi * (220 + 2 * t) * t), np.sin(2 * np.pi * 330 * t)]) * 9000
        heard = av.AudioFrame.from_ndarray(
            sound.astype(np.int16).T.reshape(1, -1).copy(), format="s16", layout="stereo"
        )
        heard.sample_rate, heard.pts = 48000, 0
        packets = [*track.encode(heard), *track.encode(None)]
        yuv = np.full((HEIGHT * 3 // 2, WIDTH), 128, np.uint8)
        for index in range(seconds * FPS):
            y, x = int(280 + 250 * np.cos(index / 70)), int(280 + 250 * np.sin(index / 90))
            np.add(texture[y : y + HEIGHT, x : x + WIDTH], grain[index % 8], out=yuv[:HEIGHT])
            for k in range(6):
                top = int((HEIGHT - 240) * (0.5 + 0.5 * np.cos(index / (33 + 5 * k) + 2 * k)))
                left = int((WIDTH - 240) * (0.5 + 0.5 * np.sin(index / (25 + 7 * k) + k)))
                yuv[top : top + 200, left : left + 200] = 40 * k + 20
                yuv[HEIGHT + top // 4 : HEIGHT + top // 4 + 50, left : left + 100] = 30 * k + index % 40
            picture = av.VideoFrame.from_ndarray(yuv, format="yuv420p")
            picture.pts, picture.time_base = index, Fraction(1, FPS)
            out.mux(stream.encode(picture))
            while packets and packets[0].pts * packets[0].time_base <= Fraction(index, FPS):
                out.mux(packets.pop(0))
        out.mux([*stream.encode(None), *packets])


def repeat(once: Path, once_sec: int, path: Path, seconds: int) -> None:
    """The film ``once`` of ``once_sec``, again and again, nothing encoded anew."""
    with av.open(str(path), "w") as out, av.open(str(once)) as source:
        copies = [out.add_stream_from_template(stream) for stream in source.streams]
        for turn in range(-(-seconds // once_sec)):
            source.seek(0)
            for packet in source.demux():
                # What an encoder adds in front of the first second and behind the last would stand twice.
                at_sec = 0 if packet.pts is None else packet.pts * packet.time_base
                if not packet.size or not 0 <= at_sec < min(once_sec, seconds - turn * once_sec):
                    continue
                shift = int(turn * once_sec / packet.time_base)
                packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                packet.stream = copies[packet.stream.index]
                out.mux(packet)


def full_decode(path: Path) -> int:
    """Every frame of the pictures, by all of FFmpeg's threads; nothing is done with them."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_type = "AUTO"
        return sum(1 for _ in container.decode(stream))


def command_decode(path: Path) -> str | int:
    try:
        import imageio_ffmpeg
    except ImportError:
        return "NOT RUN: pip install imageio-ffmpeg"
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", path, "-an", "-f", "null", "-"], check=True)
    return 0


def by_decord(path: Path) -> str | int:
    try:
        import decord
    except ImportError:
        return "NOT RUN: pip install decord"
    reader = decord.VideoReader(str(path), ctx=decord.cpu(0))
    step = video.frame_step(reader.get_avg_fps())
    return len(reader.get_batch(list(range(0, len(reader), step))))


def with_sound(path: Path) -> int:
    with Reader(path, VidiConfig.full()) as reader:
        frames = sum(1 for _ in reader.pictures())
        reader.sound()
    return frames


def survey(path: Path) -> int:
    found = video.Video(path)
    print(f"  {found.reading} {found.why}", file=sys.stderr)
    return found.num_kept or 0


WAYS: dict[str, Callable[[Path], str | int]] = {
    "FFmpeg's full decode (PyAV, all threads)": full_decode,
    "FFmpeg's full decode (ffmpeg command)": command_decode,
    "decord, the frames that are kept, not resized": by_decord,
    "vidi in sequence (--check), frames": lambda path: len(video.read_frames(path, check=True).images_u8),
    "vidi survey alone": survey,
    "vidi, frames": lambda path: len(video.read_frames(path).images_u8),
    "vidi, frames and sound": with_sound,
}


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    return cli.guarded(_run, arguments, name="read_video.py")


def _run(arguments: list[str]) -> None:
    parser = cli.parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=positive, default=240)
    parser.add_argument("--mbit", type=positive, default=5, help="Mbit/s of the film that is made (default: 5)")
    parser.add_argument("--video", type=Path, help="measure this file instead of one that is made")
    parser.add_argument("--keep", type=Path, help="keep the film that is made here")
    parser.add_argument("--make", type=Path, help="make a film here, and measure nothing")
    parser.add_argument("--runs", type=positive, default=3, help="the quickest of so many is shown")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    outputs.check(args.json, args.keep, args.make)
    if args.make is not None:
        unread(args, "with --make", video=None, keep=None, json=None, runs=3)
    if args.video is not None:
        unread(args, "with --video", seconds=240, mbit=5, keep=None)
        video.Video(args.video)  # what cannot be read is said before anything is measured
        outputs.apart(args.video, args.json)
    kept = args.keep or args.make
    with tempfile.TemporaryDirectory() as folder:
        path = args.video or (args.keep if args.keep and args.keep.exists() else Path(folder) / "film.mp4")
        if not path.exists():
            started = time.perf_counter()
            make(path, args.seconds, args.mbit)
            print(f"made in {time.perf_counter() - started:.0f} s", file=sys.stderr)
            if kept is not None:
                atomic.write_bytes(kept, path.read_bytes())
        if args.make is not None:
            return
        cores = len(os.sched_getaffinity(0))
        report: dict[str, Any] = {"cores": cores, "bytes": path.stat().st_size, "load": os.getloadavg()[0], "rows": {}}
        print(f"{path.stat().st_size / 1e6:.0f} MB, {cores} cores, load {report['load']:.1f}; quickest of {args.runs}")
        best: dict[str, tuple[float, float]] = {}
        # Turn by turn, so that a machine that slows down slows all of them.
        for _ in range(args.runs):
            for name, way in WAYS.items():
                cpu, started = cpu_seconds(), time.perf_counter()
                said = way(path)
                took = time.perf_counter() - started, cpu_seconds() - cpu
                if isinstance(said, str):
                    report["rows"][name] = said
                elif name not in best or took < best[name]:
                    best[name] = took
        whole = best[next(iter(WAYS))][0]
        for name in WAYS:
            if name in best:
                wall, cpu = best[name]
                report["rows"][name] = {"seconds": wall, "cpu_seconds": cpu, "of_full_decode": wall / whole}
                print(f"{name:46} {wall:7.2f} s {cpu:7.2f} s of CPU   {wall / whole:5.2f} of the full decode")
            else:
                print(f"{name:46} {report['rows'][name]}")
        if args.json is not None:
            basis = evidence.Basis(evidence.code(["bench/read_video.py"], ROOT, evidence.ASIDE))
            evidence.write(args.json, {"measured_on": evidence.measured_on(basis, ROOT)} | report)


if __name__ == "__main__":
    sys.exit(main())
