"""The 7B's question: its text with the video's length, the checkpoint's chat template, bos and placeholder; its answers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vidi import sizes_7b
from vidi.config import VidiConfig
from vidi.inputs import dialect, prompt_7b
from vidi.inputs.prompt import PromptError
from vidi.retrieval import format_ranges, parse_ranges

CONFIG = sizes_7b.config("tiny")
ASKED = (
    "[INST] <image>\nGiven the frames from a video, answer the time range in percentage that corresponds to query text split "
    "by comma. Video length is: 12.35 and text query is: a red car.[/INST]"
)
FILE = "tokenizer_config.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in prompt_7b.tiny_files().items():
        (tmp_path / name).write_text(text)
    return tmp_path


def edited(folder: Path, **changes: object) -> Path:
    said = json.loads((folder / FILE).read_text()) | changes
    (folder / FILE).write_text(json.dumps({k: v for k, v in said.items() if v is not None}))
    return folder


@pytest.mark.parametrize("query", ["a red car", "a red car."])
def test_the_ids_are_bos_a_side_the_placeholder_and_the_other_side(folder: Path, query: str) -> None:
    """One trailing dot goes, the length has two decimals, one bos in all, and both sides decode to what was asked."""
    chat = dialect.of(CONFIG).load(folder, CONFIG)
    ids = dialect.of(CONFIG).ids(chat, query, 12.345678, CONFIG)
    at = ids.index(CONFIG.image_placeholder)
    assert (ids[0], ids.count(1), ids.count(CONFIG.image_placeholder)) == (1, 1, 1)
    left, right = (chat.tokenizer.decode(side, skip_special_tokens=False) for side in (ids[1:at], ids[at + 1 :]))
    assert f"{left}<image>{right}" == ASKED
    assert ids[1] == 3, "[INST] is one token"
    assert ids[-1] == 4


def test_other_templates_and_where_they_stand(folder: Path) -> None:
    """In a file of its own, among several, with special tokens written as objects."""
    template = "{{ bos_token }}<<{{ messages[0]['content'] }}>>{{ eos_token if add_generation_prompt }}"
    edited(folder, chat_template=[{"name": "tools", "template": "no"}, {"name": "default", "template": template}])
    edited(folder, bos_token={"content": "<s>"}, model_max_length=1000000000000000019884624838656)
    assert prompt_7b.load(folder, CONFIG).render("x") == "<s><<x>>"
    edited(folder, chat_template=None)
    (folder / "chat_template.jinja").write_text("other {{ messages[0].content }}")
    assert prompt_7b.load(folder, CONFIG).render("x") == "other x"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: edited(f, chat_template=None), "chat_template, bos_token and eos_token are needed"),
        (lambda f: edited(f, eos_token="[INST]"), r"\[INST\] is 3, not 2"),
        (lambda f: edited(f, chat_template="{% for"), "the chat template cannot be read"),
        (lambda f: (f / FILE).write_text("["), "not readable as JSON"),
        (lambda f: (f / FILE).unlink(), "no such file; the checkpoint's chat template"),
        (lambda f: (f / FILE).write_bytes(b"\xff"), "not readable as text"),
        (lambda f: (f / "tokenizer.json").unlink(), "no such file"),
    ],
)
def test_what_cannot_be_used_is_named(folder: Path, change: Callable[[Path], object], said: str) -> None:
    change(folder)
    with pytest.raises(PromptError, match=said):
        prompt_7b.load(folder, CONFIG)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no system turn') }}", "refuses one user turn: no system turn"),
        ("<s>nothing", "gives <image> 0 times"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "gives <image> 2 times"),
        ("{{ ''.__class__.__mro__ }}", "refuses one user turn"),
        ("{{ 1 // 0 }}", "refuses one user turn"),
    ],
)
def test_a_template_that_loses_the_question_or_leaves_its_sandbox(folder: Path, template: str, said: str) -> None:
    chat = prompt_7b.load(edited(folder, chat_template=template), CONFIG)
    with pytest.raises(PromptError, match=said):
        chat.ids("a red car", 1.0, CONFIG)


@pytest.mark.parametrize(
    ("status", "said"), [(-9, "SIGKILL"), (-24, "SIGXCPU"), (3, "status 3: MemoryError"), (0, "status 0: MemoryError")]
)
def test_how_a_templates_process_ended_is_named(status: int, said: str) -> None:
    """By the signal that stopped it, such as its limit of processor time, or else by its last words."""
    done = subprocess.CompletedProcess([], status, "", "Traceback:\n  a line\nMemoryError\n")
    assert prompt_7b._ended(done) == said


@pytest.mark.parametrize("query", ["", ".", "a <image>", "a [/INST]", "a </s>"])
def test_queries_that_steer_are_refused(folder: Path, query: str) -> None:
    with pytest.raises(PromptError):
        prompt_7b.load(folder, CONFIG).ids(query, 1.0, CONFIG)


def test_answers_are_fractions_of_the_length() -> None:
    """In spite of "percentage"; what is no number is skipped, seconds have two digits and no decimals."""
    pattern = dialect.of(CONFIG).ranges
    text = "0.1-0.25, 0.5 - 0.6, 0.1.2-0.3, .5-1, 9-10 |"
    assert parse_ranges(text, pattern) == [(0.1, 0.25), (0.5, 1.0), (9.0, 10.0)]
    assert format_ranges(parse_ranges("0.1-0.25", pattern), 123.4) == "00:00:12-00:00:30"
    assert parse_ranges(text, dialect.of(VidiConfig.tiny()).ranges) == [(0.1, 0.25), (1.2, 0.3)]


def test_tokens_that_were_added_count_among_those_that_the_checkpoint_must_embed(folder: Path) -> None:
    path = folder / "tokenizer.json"
    told = json.loads(path.read_text())
    size = len(told["model"]["vocab"])
    added = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    told["added_tokens"].append({"id": size, "content": "<added>", **added})
    path.write_text(json.dumps(told))
    config = VidiConfig.from_official(sizes_7b.TINY | {"vocab_size": size})
    with pytest.raises(PromptError, match=f"{size + 1} tokens, but the checkpoint embeds {size}"):
        prompt_7b.load(folder, config)
