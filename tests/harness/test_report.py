"""What a run says: the failure text of a planted fault word by word, a table that no width cuts, a page that stands alone."""

from __future__ import annotations

import html.parser
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from vidi import cli
from vidi.attention import mask
from stageparity import fingerprint, store, tolerance
from vidi.parity import feed, figures, report, suite
from vidi.parity import html as page
from stageparity.compare import EXACT, Rule, compare
from stageparity.golden import Whole
from stageparity.run import CaseRun, Row, Run

GOLDENS = Path(__file__).parents[2] / "goldens"
RULE = Rule("float64-none", "because", max=1e-9, row=1e-9)
NOTHING = page.References({}, {})


def one_key_short(q_pos, k_pos, window=None):
    """A window of w keys in place of w + 1."""
    return SEES(q_pos, k_pos, None if window is None else window - 1)


SEES = mask.sees


@pytest.fixture(scope="module")
def planted() -> Run:
    """small/base in float64 with a sliding window that is one key too short."""
    with pytest.MonkeyPatch.context() as patch, fingerprint.ieee():
        patch.setattr(mask, "sees", one_key_short)
        case = store.open_case(GOLDENS / "small", "base")
        model = feed.load_model(case, feed.DTYPES["float64"])
        done, _ = suite.run_case(case, model, tolerance.load(GOLDENS), dtype="float64")
    return Run((replace(done, seconds=1.0),), "float64", "eager", {"device": "x", "libraries": {"torch": "2"}})


def result(stage: str, error: float = 0.0, rule: Rule = RULE, shape: tuple[int, ...] = (1, 6, 4), at: int = 0):
    golden = np.ones(shape) if rule is not EXACT else np.ones(shape, bool)
    mine = golden.copy()
    if error and rule is EXACT:
        mine.reshape(-1)[at] = False
    elif error:
        mine.reshape(-1)[at] += error
    return compare(stage, mine, Whole(golden, golden.dtype.name), rule)


def run_of(*rows: Row, not_run: tuple[tuple[str, str], ...] = ()) -> Run:
    return Run((CaseRun("case", "set", "none", rows, not_run, 1.0),), "float64", "eager")


# ---- the failure text ----------------------------------------------------------------------------------------------------


def test_the_text_of_a_planted_fault(planted: Run) -> None:
    text = "\n".join(report.diagnosis(planted.cases[0], planted))
    why = tolerance.load(GOLDENS).rule("float64-none", "layer.0.t2t", "base").why
    alike = re.search(r"faults that look like this: (.*)", text)
    assert alike is not None
    assert text == (
        "small/base: first divergence at layer.0.t2t (local 2.3e9×, inherited 0×)\n"
        "  causal self-attention, window on even layers (§7 of the specification)\n"
        "  layer.0.t2t: DIFFERENT under float64-none\n"
        "    168 of 384 values over budget\n"
        "    worst |d| 3.1216 at [0, 5, 3]: candidate -0.127234284, golden -3.24883188\n"
        "    max: 2.34 of rms, budget 1e-09  <-- over\n"
        "    7 of 16 rows differ, first: [0, 3], [0, 4], [0, 5], ...\n"
        f"    budget: {why}\n"
        f"  {alike[0]}\n"
        "  rerun: vidi parity --case small/base --stage 'layer.0.t2t' --dtype float64 --backend eager"
    )


def test_the_planted_fault_is_among_those_that_look_like_it(planted: Run) -> None:
    alike = report.lookalikes(planted.cases[0], "layer.0.t2t")
    assert "attention.window_one_short" in alike
    assert "bridge.pad_replicate" not in alike


def test_the_rerun_command_runs_just_that_stage(planted: Run, capsys: pytest.CaptureFixture[str]) -> None:
    command = report.rerun(planted.cases[0], planted.cases[0].rows[0], planted, "--device cpu")
    words = [word.strip("'") for word in command.split()]
    assert words[0] == "vidi"
    assert cli.main(words[1:]) == 0
    assert capsys.readouterr().out.rstrip().endswith("1 stages of 1 cases in float64 with eager: all equal")


def test_cached_logits_are_rerun_with_their_target() -> None:
    row = Row("decode.cached.logits", result("decode.cached.logits", 1.0), None)
    run = run_of(row)
    assert "--stage 'decode.nocache.logits'" in report.rerun(run.cases[0], row, run)


@pytest.mark.parametrize(
    ("chained", "alone", "said"),
    [
        (9e-9, 1.1e-9, "local 1.1×, inherited 8.9×"),
        (5e-9, 5e-9, "local 5×, inherited 0×"),
        (2e-9, 0.0, "local 0×, inherited 2×"),
        (1e-3, 1e-2, "local 1e7×, inherited 0×"),
    ],
)
def test_local_and_inherited(chained: float, alone: float, said: str) -> None:
    assert report.split(Row("logits", result("logits", chained), result("logits", alone))) == said


def test_what_cannot_be_split_says_so() -> None:
    assert "not fed alone" in report.split(Row("logits", result("logits", 1.0), None))
    exact = result("vision.mask", 1.0, EXACT, (1, 6))
    assert report.split(Row("vision.mask", exact, exact)) == "local ∞, inherited not told apart"


# ---- the terminal --------------------------------------------------------------------------------------------------------

LONG = "grad.none.model.layers.0.self_attn.q_proj.weight"
ROWS = (
    Row("vision.space_to_depth", result("vision.space_to_depth", 1e-10), result("vision.space_to_depth")),
    Row(LONG, result(LONG, 1e-3), None),
)


@pytest.mark.parametrize("width", [20, 60, 80, 100, 200, None])
def test_no_width_cuts_a_stage(width: int | None) -> None:
    lines = [line for line, _ in report.table(run_of(*ROWS).cases[0], width)]
    assert "…" not in "".join(lines)
    for row, line in zip(ROWS, lines[1:], strict=True):
        assert line.startswith(row.stage + " ")
        assert "equal" in line or "DIFFERENT" in line


def test_columns_give_way_one_by_one() -> None:
    case = run_of(*ROWS).cases[0]

    def header(width: int | None) -> str:
        return next(report.table(case, width))[0]

    shown = [len(header(width).split()) for width in (None, 112, 104, 92, 80, 20)]
    assert shown == sorted(shown, reverse=True)
    assert header(20).split() == ["stage", "verdict", "of", "budget"]
    assert header(None).split()[-1] == "values"
    for width in (112, 104, 92, 84):
        assert all(len(line) <= width for line, _ in report.table(case, width))


def printed(**options: object) -> str:
    out = io.StringIO()
    console = Console(file=out, width=80, **options)  # type: ignore[arg-type]
    report.print_run(run_of(*ROWS, not_run=(("logits", "no baseline for logits"),)), console)
    return out.getvalue()


def test_plain_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    text = printed()
    assert "\x1b" not in text
    for line, _ in report.table(run_of(*ROWS).cases[0]):
        assert f"{line}\n" in text
    assert "NOT RUN set/case logits: no baseline for logits\n" in text
    assert text.endswith("2 stages of 1 cases in float64 with eager: 1 different, 1 NOT RUN\n")


def test_colour_for_a_terminal_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b[31m" in printed(force_terminal=True)
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in printed(force_terminal=True)


def test_a_pipe_without_unicode() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    report.print_run(run_of(Row("logits", result("logits", 1.0), result("logits", 1.0))), Console(file=out, width=80))
    assert b"(local 1e9x, inherited 0x)" in raw.getvalue()


# ---- the page ------------------------------------------------------------------------------------------------------------


class Tags(html.parser.HTMLParser):
    """Names of the elements, whether they close, and what anchors point to."""

    EMPTY = frozenset({"meta", "input", "br", "wbr", "rect", "use", "circle", "path"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.ids: set[str] = set()
        self.hrefs: set[str] = set()
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        given = dict(attrs)
        self.ids |= {given["id"] or ""} if "id" in given else set()
        self.hrefs |= {given["href"] or ""} if "href" in given else set()
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.EMPTY:
            assert self.open.pop() == tag


def test_the_page_stands_alone(planted: Run) -> None:
    text = page.render(planted, NOTHING)
    tags = Tags(text)
    assert tags.hrefs
    assert all(href.startswith("#") and href[1:] in tags.ids for href in tags.hrefs)
    assert not tags.seen & {"script", "link", "img", "iframe"}
    assert not re.search(r"https?:|src=|url\(|@import", text)


def test_the_first_divergence_is_on_top(planted: Run) -> None:
    text = page.render(planted, NOTHING, "--goldens /x")
    top = text[text.index("<main>") : text.index("<h2")]
    assert "<code>layer.0.t2t</code>" in top
    assert "<b>local: the stage differs when fed its golden inputs</b>" in top
    assert "7 of 16 rows differ, first: [0, 3]" in top
    assert "--dtype float64 --backend eager --goldens /x" in top
    assert "✗ Different" in text[: text.index("<main>")]


def test_an_inherited_divergence_is_said_to_be_one() -> None:
    text = page.render(run_of(Row("logits", result("logits", 5e-9), result("logits", 1e-12))), NOTHING)
    assert "<b>inherited: alone, the stage is within its budget</b>" in text


def test_an_equal_run_names_what_is_closest() -> None:
    rows = [Row(s, result(s, e), None) for s, e in (("vision.norm", 1e-12), ("logits", 4e-10))]
    text = page.render(run_of(*rows), NOTHING)
    assert "✓ Equal" in text
    assert text.index("0.4×") < text.index("<code>logits</code>") < text.index("<code>vision.norm</code>")


def test_what_was_not_run_is_named() -> None:
    run = run_of(
        Row("logits", result("logits"), None), not_run=(("vision.norm", "no <baseline>"), ("loss.mid", "no <baseline>"))
    )
    text = page.render(run, NOTHING)
    assert "as far as it ran" in text
    assert '2 stages. <span class="soft">no &lt;baseline&gt;</span>' in text
    assert "vision.norm, loss.mid" in text


def test_nothing_compared_is_no_success() -> None:
    text = page.render(run_of(not_run=(("logits", "why"),)), NOTHING)
    assert "∅ Nothing compared" in text
    assert "✓" not in text


def test_errors_stand_between_noise_and_fault(tmp_path: Path) -> None:
    noise = {
        "noise_by_stage": {"float64": {"layer.{i}.t2t": 1e-4, "layer.{i}.input": 0.1, "logits": None}, "float32": {}}
    }
    faults = [
        {"expected_stage": "layer.0.t2t", "dtype": "float64", "margin": 1e6},
        {"expected_stage": "layer.2.t2t", "dtype": "float64", "margin": 100.0},
        {"expected_stage": "layer.2.t2t", "dtype": "bfloat16", "margin": 3.0},
        {"expected_stage": "layer.2.t2t", "dtype": "float64", "margin": 2.0, "crashed": "boom"},
        {"expected_stage": "layer.2.t2t", "dtype": "float64", "margin": 0.0, "not_run": "no GPU"},
        {"expected_stage": None, "dtype": "float64", "margin": 0.1},
        {"expected_stage": "vision.mask", "dtype": "float64", "margin": None},
    ]
    (tmp_path / "noise.json").write_text(json.dumps(noise))
    faults[0]["name"], low = "known", {"float32": {"margins": {"known": 5.0}}}
    (tmp_path / "faults.json").write_text(json.dumps({"faults": faults, "dtypes": low}))
    assert page.References.load(tmp_path, "float32").of("layer.1.t2t") == (None, 5.0)
    references = page.References.load(tmp_path, "float64")
    assert references.of("layer.1.t2t") == (1e-4, 100.0)
    assert references.of("vision.mask") == references.of("logits") == (None, None)
    assert references.of("layer.2.input") == (0.1, None)
    text = page.render(run_of(Row("layer.1.t2t", result("layer.1.t2t", 1e-10), None)), references)
    assert "<rect class=n width=25%" in text
    assert re.search(r"<use href=#fault x=62.5% /><use href=#chained x=43.[78]% />", text)
    assert page.References.load(tmp_path / "none", "float64") == NOTHING


@pytest.mark.parametrize(
    ("ratio", "percent"), [(1.0, 50), (0.0, 0), (1e-8, 0), (1e-20, 0), (1e4, 75), (1e30, 100), (np.inf, 100)]
)
def test_places_on_the_axis(ratio: float, percent: float) -> None:
    assert figures.place(ratio) == pytest.approx(percent)


def test_the_heat_map_shows_the_worst_row_of_a_cell() -> None:
    few = figures.heat_row(result("logits", 1.0, at=5 * 4))  # row 5 of 6
    assert 'viewBox="0 0 6 1"' in few
    assert f'<path class=h{len(figures.LEVELS)} d="M5 0h1v1h-1z"/>' in few
    many = figures.heat_row(result("logits", 1.0, shape=(1, 9600, 4), at=9599 * 4))
    assert f'viewBox="0 0 {figures.BINS} 1"' in many
    assert f"M{figures.BINS - 1} 0h1v1h-1z" in many


def test_a_whole_run_is_small() -> None:
    """17 cases of 120 stages, all different, each cell of the heat map another colour than its neighbours."""
    noisy = compare(
        "logits",
        np.ones((1, 9600, 2)) + np.geomspace(1e-16, 1, 9600)[::-1, None] * np.ones(2),
        Whole(np.ones((1, 9600, 2)), "float64"),
        RULE,
    )
    rows = tuple(Row(f"layer.{i}.t2t", replace(noisy, stage=f"layer.{i}.t2t"), noisy) for i in range(120))
    cases = tuple(CaseRun(f"case{n}", "set", "none", rows) for n in range(17))
    assert len(page.render(Run(cases, "float64", "eager"), NOTHING).encode()) < 2_000_000


def test_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "deep" / "run.html"
    page.write(run_of(*ROWS), out, references=NOTHING)
    before = out.read_bytes()
    monkeypatch.setattr(page, "render", lambda *a: "half" + str(1 // 0))
    with pytest.raises(ZeroDivisionError):
        page.write(run_of(*ROWS), out, references=NOTHING)
    assert out.read_bytes() == before
    assert list(out.parent.iterdir()) == [out]


def test_the_case_on_top_is_the_one_that_parts_earliest() -> None:
    late, early = (
        CaseRun(n, "set", "none", (Row(s, result(s, 1.0), None),))
        for n, s in (("late", "logits"), ("early", "vision.pad"))
    )
    assert page.worst_case(Run((late, early), "float64", "eager")) is early
