"""What a run says: the failure text of a planted fault word by word, a table that no width cuts, a page that stands alone."""

from __future__ import annotations

import html.parser
import io
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from stageparity import environment, store
from stageparity import run as runs
from stageparity.golden import Whole
from stageparity.port.explain import Explanation, Match
from stageparity.report import figures, page, terminal, verdict
from stageparity.report.verdict import Context, References
from stageparity.result import EXACT, Rule
from stageparity.run import CaseRun, Row, Run
from tests.harness.judged import GOLDENS, compare, rules
from vidi import cli
from vidi.attention import mask
from vidi.commands import outputs
from vidi.parity.faults import FAULTS
from vidi.parity.stages import SECTIONS, STAGES
from vidi.parity.subject import VidiSubject

RULE = Rule("float64-none", "because", max=1e-9, row=1e-9)
CONTEXT = Context(STAGES, SECTIONS, FAULTS, References(), ("vidi", "parity"), ("--backend", "eager"))


def one_key_short(q_pos, k_pos, window=None):
    """A window of w keys in place of w + 1."""
    return SEES(q_pos, k_pos, None if window is None else window - 1)


SEES = mask.sees


@pytest.fixture(scope="module")
def planted() -> Run:
    """small/base in float64 with a sliding window that is one key too short."""
    subject = VidiSubject("float64")
    with pytest.MonkeyPatch.context() as patch, subject.scope():
        patch.setattr(mask, "sees", one_key_short)
        done, _ = runs.run_case(subject, store.open_case(GOLDENS / "small", "base"), None, rules())
    return Run((replace(done, seconds=1.0),), "float64", subject.about, {"device": "x", "libraries": {"torch": "2"}})


def result(stage: str, error: float = 0.0, rule: Rule = RULE, shape: tuple[int, ...] = (1, 6, 4), at: int = 0):
    golden = np.ones(shape) if rule is not EXACT else np.ones(shape, bool)
    mine = golden.copy()
    if error and rule is EXACT:
        mine.reshape(-1)[at] = False
    elif error:
        mine.reshape(-1)[at] += error
    return compare(stage, mine, Whole(golden, golden.dtype.name), rule)


def run_of(*rows: Row, not_run: tuple[tuple[str, str], ...] = ()) -> Run:
    return Run((CaseRun("case", "set", "none", rows, not_run, 1.0),), "float64", {"backend": "eager"})


# ---- the failure text ----------------------------------------------------------------------------------------------------


def test_the_text_of_a_planted_fault(planted: Run) -> None:
    text = "\n".join(terminal.diagnosis(verdict.findings(planted, STAGES)[0], planted, CONTEXT))
    alike = re.search(r"faults that look like this: (.*)", text)
    assert alike is not None
    assert text == (
        "small/base: layer.0.t2t and in 1 more places (local 2.3e9×, forced 2.3e9×, inherited 0×)\n"
        "  its own error: fed its golden inputs alone, it differs\n"
        "  causal self-attention; window on even layers, 7B: on all (§7 of the specification)\n"
        "  layer.0.t2t: DIFFERENT under float64-none\n"
        "    168 of 384 values over budget\n"
        "    worst |d| 3.1216 at [0, 5, 3]: candidate -0.127234284, golden -3.24883188\n"
        "    max: 2.34 of rms, budget 1e-09  <-- over\n"
        "    7 of 16 rows differ, first: [0, 3], [0, 4], [0, 5], ...\n"
        f"  {alike[0]}\n"
        "  rerun: vidi parity --case small/base --stage layer.0.t2t --dtype float64 --backend eager"
    )


def test_the_planted_fault_is_among_those_that_look_like_it(planted: Run) -> None:
    alike = verdict.lookalikes(planted.cases[0], "layer.0.t2t", CONTEXT)
    assert "attention.window_one_short" in alike
    assert "bridge.pad_replicate" not in alike


def test_the_conclusion_names_the_fault_whose_tensors_these_are(planted: Run) -> None:
    fault, other = "attention.window_one_short", "attention.window_missing"
    found = [Match(name, "", distance, ("layer.0.t2t",)) for name, distance in ((fault, 0.03), (other, 1270.0))]
    told = replace(CONTEXT, explained={"small/base": [Explanation(("layer.0.t2t", "logits"), tuple(found), True)]})
    said = f"the same tensors as known fault `{fault}` within 0.03 of a budget; the next, `{other}`, is 1,270 away"
    assert said in verdict.conclusion(planted, told)[1]
    assert verdict.lookalikes(planted.cases[0], "layer.0.t2t", told) == [fault]
    unknown = [Explanation(("layer.0.t2t",), tuple(found[1:]), False)]
    text = verdict.conclusion(planted, replace(CONTEXT, explained={"small/base": unknown}))[1]
    assert f"no known fault fits: the nearest, `{other}`, is 1,270 budgets away" in text
    assert "known faults of this stage" not in text
    assert "known faults of this stage" in verdict.conclusion(planted, CONTEXT)[1]


def test_the_rerun_command_runs_just_that_stage(planted: Run, capsys: pytest.CaptureFixture[str]) -> None:
    context = replace(CONTEXT, options=("--device", "cpu"))
    words = shlex.split(verdict.rerun(planted.cases[0], planted.cases[0].rows[0], planted, context))
    assert words[0] == "vidi"
    assert cli.main(words[1:]) == 0
    assert capsys.readouterr().out.rstrip().endswith("1 stages of 1 cases in float64 with eager: all equal")


def test_cached_logits_are_rerun_with_their_target() -> None:
    row = Row("decode.cached.logits", result("decode.cached.logits", 1.0))
    run = run_of(row)
    assert "--stage decode.nocache.logits" in verdict.rerun(run.cases[0], row, run, CONTEXT)


def test_a_hostile_name_is_one_word_of_the_rerun_command() -> None:
    """It stands in a terminal and on a page, to be pasted."""
    row = Row("logits'; rm -rf ~; '", result("logits", 1.0))
    run = Run((CaseRun("$(touch x) `y`\nz", "set", "none", (row,)),), "float64", {"backend": "eager"})
    words = shlex.split(verdict.rerun(run.cases[0], row, run, CONTEXT))
    assert words[:6] == ["vidi", "parity", "--case", "set/$(touch x) `y`\nz", "--stage", row.stage]


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
    assert verdict.split(Row("logits", result("logits", chained), None, result("logits", alone))) == said


def test_what_cannot_be_split_says_so() -> None:
    assert "not fed alone" in verdict.split(Row("logits", result("logits", 1.0)))
    exact = result("vision.mask", 1.0, EXACT, (1, 6))
    assert verdict.split(Row("vision.mask", exact, None, exact)) == "local ∞, inherited not told apart"


# ---- the terminal --------------------------------------------------------------------------------------------------------

LONG = "grad.none.model.layers.0.self_attn.q_proj.weight"
ROWS = (
    Row("vision.space_to_depth", result("vision.space_to_depth", 1e-10), None, result("vision.space_to_depth")),
    Row(LONG, result(LONG, 1e-3)),
)


@pytest.mark.parametrize("width", [20, 60, 80, 100, 200, None])
def test_no_width_cuts_a_stage(width: int | None) -> None:
    lines = [line for line, _ in terminal.table(run_of(*ROWS).cases[0], width)]
    assert "…" not in "".join(lines)
    for row, line in zip(ROWS, lines[1:], strict=True):
        assert line.startswith(row.stage + " ")
        assert "equal" in line or "DIFFERENT" in line


def test_columns_give_way_one_by_one() -> None:
    case = run_of(*ROWS).cases[0]

    def header(width: int | None) -> str:
        return next(terminal.table(case, width))[0]

    shown = [len(header(width).split()) for width in (None, 112, 104, 92, 80, 20)]
    assert shown == sorted(shown, reverse=True)
    assert header(20).split() == ["stage", "verdict", "of", "budget"]
    assert header(None).split()[-1] == "values"
    for width in (112, 104, 92, 84):
        assert all(len(line) <= width for line, _ in terminal.table(case, width))


def printed(**options: object) -> str:
    out = io.StringIO()
    console = Console(file=out, width=80, **options)  # type: ignore[arg-type]
    terminal.print_run(run_of(*ROWS, not_run=(("logits", "no baseline for logits"),)), console, CONTEXT)
    return out.getvalue()


def test_plain_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    text = printed()
    assert "\x1b" not in text
    for line, _ in terminal.table(run_of(*ROWS).cases[0]):
        assert f"{line}\n" in text
    assert "NOT RUN set/case logits: no baseline for logits\n" in text
    assert "\n2 stages of 1 cases in float64 with eager: 1 different, 1 NOT RUN\n" in text


def test_the_last_three_lines_say_what_is_wrong_how_sure_that_is_and_what_to_type(planted: Run) -> None:
    references = References({"layer.{i}.t2t": 0.01}, {"layer.{i}.t2t": 7e8})
    out = io.StringIO()
    terminal.print_run(planted, Console(file=out, width=80), replace(CONTEXT, references=references), verbose=False)
    *_, wrong, sure, what_next = out.getvalue().splitlines()
    assert wrong.startswith(
        "WRONG: layer.{i}.t2t (layer.0.t2t of small/base, in 2 places): 3e9× its budget, its own error"
    )
    assert sure.startswith(
        "how sure: noise never passed 0.01 of this budget; the weakest known fault here reaches 7e8; "
    )
    assert re.search(r"\d+ of \d+ rows that differ only inherit$", sure)
    assert what_next == "next: vidi parity --case small/base --stage layer.0.t2t --dtype float64 --backend eager"


def test_a_reason_is_given_once(planted: Run) -> None:
    again = replace(planted, cases=tuple(replace(planted.cases[0], case=f"copy{n}") for n in range(16)))
    out = io.StringIO()
    terminal.print_run(again, Console(file=out, width=80), CONTEXT, verbose=False)
    assert out.getvalue().count("same mathematics: rounding in double precision") == 1
    assert len(out.getvalue().splitlines()) < 30


def test_colour_for_a_terminal_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b[31m" in printed(force_terminal=True)
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in printed(force_terminal=True)


def test_a_pipe_without_unicode() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    row = Row("logits", result("logits", 1.0), None, result("logits", 1.0))
    terminal.print_run(run_of(row), Console(file=out, width=80), CONTEXT)
    assert b"(local 1e9x, inherited 0x)" in raw.getvalue()


def test_names_out_of_files_reach_a_terminal_and_a_page_as_text() -> None:
    """A case, a stage and a reason may hold what a terminal or a browser would obey."""
    hostile = "\x1b]0;owned\x07\x9b2J\u202e[red]<script>"
    row = Row(hostile, result("logits", 1.0), None, None)
    run = Run((CaseRun(hostile, hostile, "none", (row,), ((hostile, hostile),), 1.0, (hostile,)),), "float64")
    out = io.StringIO()
    terminal.print_run(run, Console(file=out, width=80, force_terminal=True, no_color=True), CONTEXT)
    shown = re.sub(r"\x1b\[\d*m", "", out.getvalue())
    assert all(line.isprintable() for line in shown.split("\n")), ascii(shown)
    assert "\\x1b]0;owned\\x07\\x9b2J\\u202e[red]" in shown
    text = page.render(run, CONTEXT)
    assert "script" not in Tags(text).seen
    assert "&lt;script&gt;" in text
    assert all(line.isprintable() for line in text.split("\n"))


def test_a_dash_has_a_reason() -> None:
    row = Row("logits", result("logits"))
    assert "\n- = not fed alone, not forced: " in printed_run(run_of(row))
    assert "- = " not in printed_run(run_of(replace(row, forced=row.chained, alone=row.chained)))
    assert "- under <i>alone</i>: not fed alone" in page.render(run_of(row), CONTEXT)


def printed_run(run: Run) -> str:
    out = io.StringIO()
    terminal.print_run(run, Console(file=out, width=80), CONTEXT)
    return out.getvalue()


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
    text = page.render(planted, CONTEXT)
    tags = Tags(text)
    assert tags.hrefs
    assert all(href.startswith("#") and href[1:] in tags.ids for href in tags.hrefs)
    assert not tags.seen & {"script", "link", "img", "iframe"}
    assert not re.search(r"https?:|src=|url\(|@import", text)


def test_the_first_divergence_is_on_top(planted: Run) -> None:
    text = page.render(planted, replace(CONTEXT, options=("--backend", "eager", "--goldens", "/x")))
    top = text[text.index("<main>") : text.index("<h2")]
    assert "<code>layer.<wbr>0.<wbr>t2t</code>" in top
    assert "<b>its own error: fed its golden inputs alone, it differs</b>" in top
    assert "7 of 16 rows differ, first: [0, 3]" in top
    assert "--dtype float64 --backend eager --goldens /x" in top
    assert "✗ Different" in text[: text.index("<main>")]


def test_a_stage_id_breaks_between_its_words() -> None:
    """A phone's column holds some 17 letters."""
    stages = ("generate_nowindow.nocache.logits", "vision.space_to_depth")
    text = page.render(run_of(*(Row(stage, result(stage, 1e-12)) for stage in stages)), CONTEXT)
    assert ">generate_<wbr>nowindow.<wbr>nocache.<wbr>logits</code>" in text
    assert ">vision.<wbr>space_to_depth</code>" in text


def test_an_inherited_divergence_is_said_to_be_one() -> None:
    text = page.render(run_of(Row("logits", result("logits", 5e-9), None, result("logits", 1e-12))), CONTEXT)
    assert "<b>inherited: fed its golden inputs, it is within its budget</b>" in text


def test_an_equal_run_names_what_is_closest() -> None:
    rows = [Row(s, result(s, e)) for s, e in (("vision.norm", 1e-12), ("logits", 4e-10))]
    text = page.render(run_of(*rows), CONTEXT)
    assert "✓ Equal" in text
    assert text.index("0.4×") < text.index("<code>logits</code>") < text.index("<code>vision.<wbr>norm</code>")


def test_what_was_not_run_is_named() -> None:
    run = run_of(
        Row("logits", result("logits")), not_run=(("vision.norm", "no <baseline>"), ("loss.mid", "no <baseline>"))
    )
    text = page.render(run, CONTEXT)
    assert "as far as it ran" in text
    assert '2 stages. <span class="soft">no &lt;baseline&gt;</span>' in text
    assert "vision.<wbr>norm, loss.<wbr>mid" in text


def test_nothing_compared_is_no_success() -> None:
    text = page.render(run_of(not_run=(("logits", "why"),)), CONTEXT)
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
    single = References.load(tmp_path, "float32", STAGES)
    assert (single.noise, single.faults) == ({}, {"layer.{i}.t2t": 5.0})
    references = References.load(tmp_path, "float64", STAGES)
    assert references.noise == {"layer.{i}.t2t": 1e-4, "layer.{i}.input": 0.1}
    assert references.faults == {"layer.{i}.t2t": 100.0}
    text = page.render(
        run_of(Row("layer.1.t2t", result("layer.1.t2t", 1e-10))), replace(CONTEXT, references=references)
    )
    assert "<rect class=n width=25%" in text
    assert re.search(r"<use href=#fault x=62.5% /><use href=#chained x=43.[78]% />", text)
    assert References.load(tmp_path / "none", "float64", STAGES) == References()


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
    rows = tuple(Row(f"layer.{i}.t2t", replace(noisy, stage=f"layer.{i}.t2t"), None, noisy) for i in range(120))
    cases = tuple(CaseRun(f"case{n}", "set", "none", rows) for n in range(17))
    assert len(page.render(Run(cases, "float64"), CONTEXT).encode()) < 2_000_000


def test_written_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "run.html"
    outputs.write(out, lambda: page.render(run_of(*ROWS), CONTEXT))
    before = out.read_bytes()
    with pytest.raises(ZeroDivisionError):
        outputs.write(out, lambda: "half" + str(1 // 0))
    assert out.read_bytes() == before
    assert list(out.parent.iterdir()) == [out]


def test_the_case_on_top_is_the_one_that_parts_earliest() -> None:
    late, early = (
        CaseRun(n, "set", "none", (Row(s, result(s, 1.0)),)) for n, s in (("late", "logits"), ("early", "vision.pad"))
    )
    found = verdict.findings(Run((late, early), "float64"), STAGES)
    assert [f.first[0] for f in found] == [early, late]


def test_independent_errors_are_named_at_once() -> None:
    """Two stages wrong alone, one wrong through its caller, one that inherits."""
    rows = (
        Row("vision.pad", result("vision.pad", 1e-3), None, result("vision.pad", 1e-3)),
        Row("vision.projector", result("vision.projector", 1e-3), None, result("vision.projector", 1e-12)),
        Row("vision.pos_h", *(result("vision.pos_h", e) for e in (1e-3, 1e-3, 0.0)), "vidi/bridge/visual.py"),
        Row("logits", result("logits", 1e-3), None, result("logits", 1e-3)),
    )
    found = verdict.findings(run_of(*rows), STAGES)
    assert [(f.name, f.kind) for f in found] == [
        ("vision.pad", "stage"), ("vision.pos_h{g}", "wiring"), ("logits", "stage"),
    ]  # fmt: skip
    assert "vidi/bridge/visual.py: fed goldens in the run it differs and alone it does not" in found[1].whose
    wrong, sure, _ = verdict.conclusion(run_of(*rows), CONTEXT)
    assert "Also wrong by themselves: vision.pos_h{g}, logits." in wrong
    assert sure.endswith("1 of 4 rows that differ only inherit")


def test_how_far_over_is_told_where_no_multiple_of_a_budget_tells_it() -> None:
    """`∞ its budget` says neither how much nor what: bits that differ, a padding that holds values."""
    golden = np.zeros((1, 6, 4), np.float32)
    golden[0, :3] = 1.0
    padded = compare("vision.packed", np.ones_like(golden), Whole(golden, "float32"), RULE)
    bits = compare("vision.mask", np.arange(6)[None] > 3, Whole(np.arange(6)[None] > 2, "bool"), EXACT)
    for found, said in (
        (padded, "3 rows are exactly zero in the golden (padding), not in the candidate"),
        (bits, "1 of 6 exact values differ"),
    ):
        run = run_of(Row(found.stage, found, found, found))
        line = verdict.conclusion(run, Context(STAGES))[0]
        assert said in line
        assert "∞" not in line
        assert f"</a>: {verdict.over(verdict.findings(run, STAGES)[0])}</h3>" in page.render(run, Context(STAGES))
        assert json.loads(terminal.to_text(run, Context(STAGES)))["headline"] == line


def test_circumstances_without_a_figure_are_still_told() -> None:
    under = dict.fromkeys(environment.SETTINGS, float("inf"))
    said = environment.sentence(float("inf"), under)
    assert said.endswith("also in float64, with one thread, with reduced precision and fused kernels off")
    assert "5 of budget" in environment.sentence(float("inf"), under | {"float64": 5.0})


def test_the_figure_of_the_place_that_is_named_stands_beside_the_worst() -> None:
    """What other circumstances make of it is told of the first place: 1.5 there beside 32 read as if it had fallen."""
    rule = replace(RULE, max=0.1, row=None)
    small, large = (result(f"layer.{i}.t2t", error, rule) for i, error in ((0, 0.15), (1, 3.2)))
    both = run_of(*(Row(r.stage, r, r, r) for r in (small, large)))
    line = verdict.conclusion(both, Context(STAGES))[0]
    assert "(layer.0.t2t of set/case, in 2 places): 32× its budget at most, 1.5× there, its own error" in line
    assert "set/case</a>: 32× its budget at most, 1.5× there</h3>" in page.render(both, Context(STAGES))
    line = verdict.conclusion(run_of(Row(large.stage, large, large, large)), Context(STAGES))[0]
    assert "(layer.1.t2t of set/case): 32× its budget, its own error" in line
