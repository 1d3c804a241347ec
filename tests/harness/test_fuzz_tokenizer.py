"""Hostile tokenizer.json by seed: read and able to encode and decode within bounds, or one line that says why not.

At the start of this project the library itself was the reader: it panics (an exception that is no Exception), aborts the
process, expands one character into a million and backtracks without end.
"""

from __future__ import annotations

import copy
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from tests.limited import one_line, run_cases, watched
from vidi.config import VidiConfig
from vidi.inputs import prompt

TINY = json.loads(prompt.tiny_tokenizer().to_str())
#: The shape of Gemma 2's own file, few tokens.
GEMMA: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {
            "id": number,
            "content": word,
            "special": True,
            "normalized": False,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
        }
        for number, word in (
            (0, "<pad>"),
            (1, "<eos>"),
            (2, "<bos>"),
            (3, "<unk>"),
            (106, "<start_of_turn>"),
            (107, "<end_of_turn>"),
        )
    ],
    "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
    },
    "decoder": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ],
    },
    "model": {
        "type": "BPE",
        "dropout": None,
        "unk_token": "<unk>",
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<start_of_turn>": 106, "<end_of_turn>": 107}
        | {f"<unused{number}>": number for number in range(4, 106)}
        | {f"<0x{byte:02X}>": 108 + byte for byte in range(256)}
        | {word: 364 + number for number, word in enumerate(["▁", "a", "r", "e", "d", "▁a", "re"])},
        "merges": [["▁", "a"], ["r", "e"]],
    },
}


def write(folder: Path, raw: Any) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


@pytest.mark.parametrize("merges", [["▁ a", "r e"], [["▁", "a"], ["r", "e"]]], ids=["words", "pairs"])
def test_the_shape_of_gemmas_own_file_is_read(merges: list[Any], tmp_path: Path) -> None:
    raw = {**GEMMA, "model": {**GEMMA["model"], "merges": merges}}
    tokenizer = prompt.load_tokenizer(write(tmp_path, raw), VidiConfig.full())
    ids = prompt.build_ids(tokenizer, "a red é")
    assert ids[:2] == [2, 106]
    assert {tokenizer.token_to_id(token) for token in ("▁a", "re", "d", "<0xC3>", "<0xA9>")} <= set(ids)
    assert prompt.decode(tokenizer, ids[-40:]).count("a red é?") == 1


def _with(**fields: Any) -> dict[str, Any]:
    return {**TINY, **fields}


def _model(**fields: Any) -> dict[str, Any]:
    return {**TINY, "model": {**TINY["model"], **fields}}


def _growing(kind: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 16} | (
        {} if kind else {"content": "e" * 1_000_000}
    )


REFUSED = {
    "panic": (_model(continuing_subword_prefix="##é"), "continuing_subword_prefix: is '##é'"),
    "chance": (_model(dropout=0.5), "model.dropout: is 0.5"),
    "unigram": (_with(model={"type": "Unigram", "unk_id": 10**9, "vocab": []}), "model.type|model.unk_id"),
    "grow": (_with(normalizer=_growing("")), "normalizer.content: a text of 0 to 16 characters"),
    "grow-often": (_with(normalizer={"type": "Sequence", "normalizers": [_growing("x")] * 8}), "by a longer one"),
    "grow-a-little": (
        _with(normalizer=_growing("x") | {"content": "ee"}),
        "normalizer: replaces a text by a longer one",
    ),
    "grow-decoder": (_with(decoder=_growing("x")), "decoder: replaces a text by a longer one"),
    "regex": (
        _with(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}),
        "pre_tokenizer.pattern: a regular expression",
    ),
    "charsmap": (_with(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "of type 'Precompiled'"),
    "nested": (
        _with(normalizer={"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": []}]}),
        "'Sequence'",
    ),
    "many-steps": (
        _with(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}] * 9}),
        "normalizer.normalizers: a list of at most 8 is expected, found 9",
    ),
    "no-list": (_with(added_tokens={"id": 0}), "added_tokens: a list of at most 10,000 is expected, found dict"),
    "huge-id": (_with(added_tokens=[{"id": 2**32 - 1, "content": "x"}]), r"added_tokens\[0\].id: a number from 0 to"),
    "long-token": (_model(vocab={"a" * 1_000_000: 0}), "at most 256 characters"),
    "digits": (_with(version=10**400), "version: 1"),
    "unknown": (_with(magic=1), "magic: is no field known here"),
    "no-model": (_with(model=None), "model: an object is expected"),
    "merges": (_model(merges=[["a", "b", "c"]]), r"model.merges\[0\]: a pair"),
    "lost-merge": (_model(merges=[["q", "zzz"]]), "no readable tokenizer.json"),
    "surrogate": (_model(vocab={"\ud800": 0}), "no readable tokenizer.json"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_this_model_has_no_use_for(name: str, tmp_path: Path) -> None:
    raw, said = REFUSED[name]
    path = write(tmp_path, raw)
    with pytest.raises(prompt.PromptError, match=said) as refused:
        prompt.load_tokenizer(path)
    one_line(refused.value, path)


def test_a_template_that_repeats_the_question_has_no_effect(tmp_path: Path) -> None:
    template = {"Sequence": {"id": "A", "type_id": 0}}
    processor = {"type": "TemplateProcessing", "single": [template] * 1000, "pair": [], "special_tokens": {}}
    tokenizer = prompt.load_tokenizer(write(tmp_path, _with(post_processor=processor)))
    assert prompt.build_ids(tokenizer, "a car") == prompt.build_ids(prompt.tiny_tokenizer(), "a car")


def test_a_panic_of_the_library_is_an_error_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should one get past the list: it derives from BaseException, and nothing else that does is swallowed."""
    panic = type("PanicException", (BaseException,), {})

    class Broken:
        def __init__(self, error: BaseException) -> None:
            self.error = error

        def get_vocab_size(self, **_: Any) -> int:
            return 10

        def decode(self, *_: Any, **__: Any) -> str:
            raise self.error

    with pytest.raises(prompt.PromptError, match="index out of range"):
        prompt.decode(Broken(panic("index out of range")), [1])  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        prompt.decode(Broken(KeyboardInterrupt()), [1])  # type: ignore[arg-type]


# ---- by seed ----------------------------------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**32, 2**63, 10**400, 1.5, 1e-300, "", "a", "é" * 300, "\x00", "\x1b[2J", "\ud800"),
    *([], {}, [[]], {"a": 1}, "Sequence", "BPE", "Regex", "BertNormalizer", "WordPiece", "Unigram", "a" * 1_000_000),
    *(entry[0].get(key) for entry in REFUSED.values() for key in ("model", "normalizer", "pre_tokenizer", "decoder")),
    {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": True,
    },
    {"type": "Strip", "content": "é", "start": 10**6, "stop": 2**63 - 1},
    {"type": "Strip", "strip_left": True, "strip_right": True},
    {"type": "FixedLength", "length": 0},
    {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
    {"type": "WordPiece", "prefix": "é", "cleanup": True},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    {"type": "Prepend", "prepend": "▁"},
    {"type": "NFKD"},
    {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": True},
    {"type": "Split", "pattern": {"String": "e"}, "behavior": "Contiguous", "invert": True},
    {"type": "BPE", "vocab": {}, "merges": []},
)


def _places(value: Any, found: list[tuple[Any, Any]], depth: int = 0) -> list[tuple[Any, Any]]:
    """Containers and keys in them, those near the top more often than a vocabulary's."""
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    for key, item in items[:30]:
        found += [(value, key)] * (1 if len(items) > 30 else 4)
        if isinstance(item, dict | list):
            _places(item, found, depth + 1)
    return found


def case(seed: int, folder: Path) -> str:
    rng = random.Random(seed)
    raw = copy.deepcopy(rng.choice((TINY, GEMMA)))
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        container, key = rng.choice(_places(raw, []))
        kind = rng.randrange(5)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[rng.choice(("Regex", "type", "prefix", "extra", str(seed)))] = copy.deepcopy(rng.choice(ODD))
        elif kind == 2 and isinstance(container, list):
            container += [container[key]] * rng.choice((1, 10, 1000))
        else:
            container[key] = copy.deepcopy(rng.choice(ODD))
    path = folder / "inside" / "tokenizer.json"
    text = bytearray(json.dumps(raw), "utf-8")
    if rng.random() < 0.3:
        at = rng.randrange(len(text))
        text[at : at + rng.randrange(3)] = rng.choice((b"", b"[" * 100_000, b'"', rng.randbytes(3), b"1e999", b"NaN"))
    special = rng.randrange(30)
    if special == 0:
        os.mkfifo(path)
    elif special == 1:
        path.symlink_to(rng.choice(("/dev/zero", "../outside/tokenizer.json", "tokenizer.json")))
    else:
        path.write_bytes(text)
    if special == 2:
        os.truncate(path, rng.choice((0, 8 << 30)))
    (folder / "outside" / "tokenizer.json").write_text(json.dumps(TINY))
    with watched(folder / "outside"):
        try:
            tokenizer = prompt.load_tokenizer(folder / "inside")
        except prompt.PromptError as error:
            one_line(error, path)
            return "refused"
        try:
            ids = prompt.build_ids(tokenizer, "a red ﷺ car, e" * 50)
            assert len(ids) < 10_000
            size = tokenizer.get_vocab_size(with_added_tokens=True)
            assert len(prompt.decode(tokenizer, [rng.randrange(size) for _ in range(1000)])) < 300_000
        except prompt.PromptError as error:
            one_line(error)
            return "not used"
    return "used"


@pytest.mark.parametrize("number", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_hostile_tokenizers(number: int, tmp_path: Path) -> None:
    outcomes = run_cases("tests.harness.test_fuzz_tokenizer", number, tmp_path)
    assert outcomes["refused"] > number // 3
    assert outcomes["used"] > number // 10
