#!/usr/bin/env python3
"""Draw the stage registry: docs/dataflow.svg, and the stage table in CONTRIBUTING.md.

    tools/draw_dataflow.py            write both
    tools/draw_dataflow.py --check    exit 1 where one is not what the registry says

Nodes and arrows are the registry's entries and their inputs. What is added here is the place on the page and the shapes,
which a test holds against the goldens.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from stageparity import atomic
from stageparity.stage import Stage
from vidi import cli
from vidi.parity.stages import STAGES

__all__ = ["DRAWN", "dataflow_svg", "main", "stage_table"]

ROOT = Path(__file__).resolve().parents[1]
SVG, PAGE = ROOT / "docs" / "dataflow.svg", ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- stages: tools/draw_dataflow.py -->", "<!-- end of stages -->"

DRAWN = [stage for stage in STAGES if stage.run or stage.code]  # not what is an input or told from others alone

# Lane on the page by id, first match wins: visual, visual side, audio side, audio, text, text side.
LANES = (
    (r"inputs\.images|layer\.\{i\}\.image_stream|layer\.0\.image_input", 0),
    (r"vision\.(pos_.\.embed|mask)|pos\.freq|xattn\.\{i\}\.\{m\}\.k$", 1),
    (r"vision\.", 0),
    (r"inputs\.audio_sizes|audio\.(pos_t\.embed|mask)|xattn.*\.(v|unpad\.\*|kv_mask)$|.*gate", 2),
    (r"inputs\.audios|audio\.|layer\.\{i\}\.audio_stream|layer\.0\.audio_input", 3),
    (r"inputs\.labels|text\.(mask|labels)|rope|.*\.q_mask|layer\.\{i\}\.t2t|loss", 5),
    (r"", 4),
)
KINDS = ("v", "p", "p", "a", "t", "t")  # colour class of a lane
FAMILY = "xattn.{i}.{m}.unpad."  # many ids with the same inputs, drawn as one node
WIDTH, HEIGHT, LANE, ROW, LEFT, TOP = 162, 66, 204, 96, 14, 40


@dataclass
class Node:
    name: str
    lane: int
    row: int = -1
    stage: Stage | None = None

    @property
    def x(self) -> int:
        return LEFT + self.lane * LANE

    @property
    def y(self) -> int:
        return TOP + self.row * ROW


def feeds(stage: Stage) -> Iterator[str]:
    """Names of the nodes that an entry's inputs stand for; a place that stands for both modalities gives two."""
    for template in stage.inputs:
        ways = {
            "{path}.mask": ("vision.mask", "audio.mask"),
            "{stream}": ("layer.0.image_input", "layer.0.audio_input"),
            "{last}": ("layer.{i}.output",),
            "layer.{i}.input": ("layer.0.input",),
            "layer.{i}.t2v": ("layer.{i}.t2{m}",),
            "layer.{i}.t2a": (),
        }.get(template, (template,))
        for name in ways:
            if template == "{stream}" and "_stream" in stage.name and name[8:13] != stage.name[10:15]:
                continue  # image_stream reads the visual stream alone
            yield name


def drawn_as(template: str) -> str:
    """Name of the node that shows an entry."""
    return f"{FAMILY}*" if template.startswith(FAMILY) else template


def what(node: Node) -> str:
    """A few words on a node: those of its entry, or the parts that a family has."""
    assert node.stage is not None
    if node.name != f"{FAMILY}*":
        return node.stage.what
    return ", ".join(s.name.removeprefix(FAMILY) for s in STAGES if s.name.startswith(FAMILY))


def layout() -> dict[str, Node]:
    """Every node on its lane, each above all that it feeds: what comes before the layers as late as possible, the rest
    as early as possible."""
    nodes = {name: Node(name, lane_of(name)) for s in DRAWN for name in feeds(s) if name.startswith("inputs.")}
    shown = {drawn_as(s.name): s for s in reversed(DRAWN)}
    shown = dict(reversed(shown.items()))
    nodes |= {name: Node(name, lane_of(name), stage=s) for name, s in shown.items()}
    edges = [(name, to) for to, s in shown.items() for name in feeds(s)]
    inside = [name for name in shown if is_later(name)]
    taken: set[tuple[int, int]] = set()

    def settle(node: Node, row: int, step: int) -> None:
        while (node.lane, row) in taken:
            row += step
        node.row = row
        taken.add((node.lane, row))

    for name in reversed([name for name in nodes if name not in inside]):  # inputs last, stages from the end on
        below = [nodes[t].row for s, t in edges if s == name and t not in inside]
        settle(nodes[name], min(below, default=0) - 1, -1)
    for name in inside:
        above = [nodes[s].row for s, t in edges if t == name and s in inside]
        settle(nodes[name], max(above, default=-1) + 1, 1)
    first = min(node.row for node in nodes.values())
    for node in nodes.values():
        node.row -= first
        if node.name in inside:
            node.row += 1  # room for the layer's frame
    return nodes


def is_later(template: str) -> bool:
    return bool(re.match(r"(layer|xattn)\.\{i\}|final|lm_head|logits|loss|\{n\}", template))


def lane_of(name: str) -> int:
    return next(lane for pattern, lane in LANES if re.match(pattern, name))


def dataflow_svg() -> str:
    """The picture, as text; the same registry gives the same bytes."""
    nodes = layout()
    wide = LEFT + 6 * LANE
    high = TOP + (max(node.row for node in nodes.values()) + 1) * ROW
    layer = [n for n in nodes.values() if re.match(r"(layer|xattn)\.\{i\}", n.name)]
    top, bottom = min(n.y for n in layer) - 58, max(n.y for n in layer) + HEIGHT + 14
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" height="{high}" role="img" '
        'aria-label="Data flow of Vidi, stage by stage">',
        f"<style>{STYLE}</style>",
        *(
            f'<marker id="m{k}" viewBox="0 0 6 6" refX="6" refY="3" markerWidth="6" markerHeight="6" orient="auto">'
            f'<path d="M0 0 6 3 0 6z" class="f{k}"/></marker>'
            for k in "vpat"
        ),
        f'<rect width="{wide}" height="{high}" class="bg"/>',
        *(f'<text x="{LEFT + lane * LANE}" y="20" class="head">{text}</text>' for lane, text in HEADS),
        f'<rect x="3" y="{top}" width="{wide - 6}" height="{bottom - top}" rx="8" class="frame"/>',
        *arrows(nodes),
        f'<text x="{LEFT}" y="{top + 18}" class="head halo">layer i: three streams, one set of weights; '
        "layer.i.output, image_stream and audio_stream enter layer i + 1</text>",
        *(f'<text x="{LEFT}" y="{bottom + 30 + 16 * k}" class="note">{line}</text>' for k, line in enumerate(NOTES)),
        *(box(node) for node in nodes.values()),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


NOTES = (
    "Solid frame: judged by error against its budget. Dashed: compared exactly.",
    "B samples, F frames of all videos, P audio pieces, L patches, l positions of a piece, S s padded and resized grid side,",
    "h w token grid, C encoder width, D decoder width, V A T visual, audio, text tokens, n audio tokens joined, N heads,",
    "H head dim, U vocabulary, · a length of its own. Released sizes: L 729, C 1152 (audio 1280), S 28, h = w = 14, D 3584.",
    "{g} nothing, or a video's number under a token budget for each video. {b} a sample, {i} a layer, {m} v or a, {n} a name.",
)
HEADS = ((0, "visual path"), (3, "audio path"), (4, "text"))
STYLE = (
    "text{font:10px system-ui,'DejaVu Sans',sans-serif;fill:#1b1f24}.id{font:600 11px ui-monospace,'DejaVu Sans Mono',monospace}"
    ".sh{font:10px ui-monospace,'DejaVu Sans Mono',monospace}.head{font-size:13px;font-weight:600}.note{font-size:11.5px}"
    ".soft{fill:#59636e}"
    ".halo{paint-order:stroke;stroke:#f6f8fa;stroke-width:5px}"
    ".bg{fill:#fff}.frame{fill:#f6f8fa;stroke:#c3cad2}.box{fill:#fff;stroke-width:1.4}.e{fill:none;stroke-width:1.2}"
    ".v{stroke:#0068a8}.p{stroke:#8a3b76}.a{stroke:#0a7d5c}.t{stroke:#9a5b00}"
    ".fv{fill:#0068a8}.fp{fill:#8a3b76}.fa{fill:#0a7d5c}.ft{fill:#9a5b00}.exact{stroke-dasharray:5 3}"
    "@media(prefers-color-scheme:dark){text{fill:#e3e8ee}.halo{stroke:#161c23}.soft{fill:#9aa6b2}.bg{fill:#0e1217}.frame{fill:#161c23;stroke:#3b4652}"
    ".box{fill:#0e1217}.v{stroke:#6cb6f0}.p{stroke:#d99ac6}.a{stroke:#5fcfab}.t{stroke:#e0a95a}"
    ".fv{fill:#6cb6f0}.fp{fill:#d99ac6}.fa{fill:#5fcfab}.ft{fill:#e0a95a}}"
)


def box(node: Node) -> str:
    """One node: its id, shape and section, and what it is. Dashed where values are compared exactly."""
    kind = KINDS[node.lane]
    stage = node.stage
    exact = " exact" if stage is not None and stage.exact else ""
    size = 11 if len(node.name) <= 22 else 9.3
    lines = [
        f'<g transform="translate({node.x} {node.y})">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="5" class="box {kind}{exact}"/>',
        f'<text x="7" y="14" class="id" style="font-size:{size}px">{escape(node.name)}</text>',
    ]
    if stage is not None:
        shape = f"({stage.shape.replace(' ', ', ')})" if stage.shape else ""
        lines.append(f'<text x="7" y="27" class="sh">{shape}</text>')
        lines.append(f'<text x="{WIDTH - 7}" y="27" text-anchor="end" class="soft">{stage.spec}</text>')
        for k, line in enumerate(wrap(what(node), 28)[:3]):
            lines.append(f'<text x="7" y="{39 + 11 * k}" class="soft">{escape(line)}</text>')
    else:
        lines.append('<text x="7" y="28" class="soft">input</text>')
    return "".join(lines) + "</g>"


def wrap(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def arrows(nodes: dict[str, Node]) -> Iterator[str]:
    """Straight down to the next row of a lane; otherwise down the gutter right of the source, then along the gap above
    the target, so that no arrow crosses a node. Each source has a track of its own in both."""
    fed = {drawn_as(s.name): s for s in DRAWN}
    pairs = [(nodes[name], nodes[to]) for to, s in fed.items() for name in dict.fromkeys(feeds(s))]
    bent = [(s, t) for s, t in pairs if not (s.lane == t.lane and t.row == s.row + 1)]
    ends: dict[str, int] = {}
    for source, target in bent:
        ends[source.name] = max(ends.get(source.name, 0), target.row)
    gutters: dict[int, list[int]] = {}
    track: dict[str, int] = {}
    for source in sorted((nodes[name] for name in ends), key=lambda n: n.row):
        used = gutters.setdefault(source.lane, [])
        free = next((k for k, end in enumerate(used) if end < source.row), len(used))
        used[free : free + 1] = [ends[source.name]]
        track[source.name] = free
    gaps: dict[int, list[str]] = {}
    for source, target in pairs:
        kind = KINDS[source.lane]
        middle = target.x + WIDTH // 2
        if (source, target) not in bent:
            path = f"M{middle} {source.y + HEIGHT}V{target.y}"
        else:
            gap = gaps.setdefault(target.row, [])
            if source.name not in gap:
                gap.append(source.name)
            level = target.y - 8 - 4 * (gap.index(source.name) % 6)
            out, half = source.x + WIDTH + 5 + 4 * track[source.name], source.y + HEIGHT // 2
            enter = middle + 7 * (sorted(gap).index(source.name) - 3) if len(gap) > 1 else middle
            enter = min(max(enter, target.x + 8), target.x + WIDTH - 8)
            path = f"M{source.x + WIDTH} {half}H{out}V{level}H{enter}V{target.y}"
        yield f'<path d="{path}" class="e {kind}" marker-end="url(#m{kind})"/>'


def stage_table() -> str:
    """The registry as a Markdown table."""
    lines = ["| stage | spec | judged | fed by | what |", "|---|---|---|---|---|"]
    for s in STAGES:
        fed = ", ".join(f"`{name}`" for name in s.inputs) or "-"
        lines.append(
            f"| `{s.name}` | {s.spec} | {'exact' if s.exact else 'numeric'} | {fed} | {s.what.replace('|', chr(92) + '|')} |"
        )
    return "\n".join(lines)


def contributing(text: str) -> str:
    """The page with its table replaced. Raises ValueError where the markers are gone."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{PAGE.name} must hold {BEGIN} and {END} once each: the table stands between them")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{stage_table()}\n{END}{rest.split(END)[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return cli.guarded(_run, argv, name="draw_dataflow.py")


def _run(argv: list[str]) -> int:
    parser = cli.parser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file is out of date")
    args = parser.parse_args(argv)
    stale = 0
    for path, wanted in ((SVG, dataflow_svg()), (PAGE, contributing(PAGE.read_text(encoding="utf-8")))):
        if path.exists() and path.read_text(encoding="utf-8") == wanted:
            continue
        if args.check:
            print(f"{path.relative_to(ROOT)} is not what the registry says: run tools/draw_dataflow.py")
            stale = 1
        else:
            path.parent.mkdir(exist_ok=True)
            atomic.write_text(path, wanted)
            print(f"wrote {path.relative_to(ROOT)}")
    return stale


if __name__ == "__main__":
    sys.exit(main())
