"""The prompt's ids, and the tiny tokenizer that stands in for Gemma 2's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from stageparity.strict import Refused
from vidi.config import VidiConfig
from vidi.inputs import prompt, tokenizer_file

TINY = prompt.tiny_tokenizer()
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")


def spelled(ids):
    """Ids as text, special tokens visible, the placeholder as it is written."""
    return "".join("<image>" if token == -200 else TINY.decode([token], skip_special_tokens=False) for token in ids)


def test_whole_prompt():
    assert spelled(prompt.build_ids(TINY, "a red car")) == (
        "<bos><start_of_turn>user\n<image>\nDuring which time segments in the video can we see a red car?"
        "<end_of_turn>\n<start_of_turn>model\n"
    )


def test_ids_around_the_placeholder():
    ids = prompt.build_ids(TINY, "a red car")
    line_end = TINY.token_to_id("Ċ")
    place = ids.index(-200)
    assert ids.count(-200) == 1
    assert ids[:2] == [2, 106]
    assert ids.count(2) == 1  # one bos for the whole prompt, not one for each side
    # Each side is tokenised on its own: joined, the two line ends would be one token.
    assert (ids[place - 1], ids[place + 1]) == (line_end, line_end)
    assert ids[-1] == line_end
    assert ids.count(106) == 2
    assert ids.count(107) == 1


def test_ids_of_bos_and_placeholder_can_be_given():
    ids = prompt.build_ids(TINY, "x", bos_id=5, image_placeholder=-7)
    assert ids[0] == 5
    assert ids.count(-7) == 1


@pytest.mark.parametrize(
    ("query", "asked"),
    [
        ("a red car", "a red car?"),
        ("a red car.", "a red car?"),
        ("a red car..", "a red car.?"),  # one only
        ("a red car. ", "a red car. ?"),  # trailing means last
        ("Dr. No", "Dr. No?"),
        ("a {b} %s", "a {b} %s?"),  # no format string
        ("ein Auto\nin Köln 🚗", "ein Auto\nin Köln 🚗?"),
    ],
)
def test_one_trailing_dot_goes(query, asked):
    assert prompt.user_text(query) == f"<image>\nDuring which time segments in the video can we see {asked}"
    assert f"can we see {asked}<end_of_turn>" in TINY.decode(
        prompt.build_ids(TINY, query)[prompt.build_ids(TINY, query).index(-200) + 1 :], skip_special_tokens=False
    )


@pytest.mark.parametrize("query", ["", " ", ".", " .", "\n"])
def test_empty_queries_are_refused(query):
    with pytest.raises(prompt.PromptError, match="empty"):
        prompt.build_ids(TINY, query)


@pytest.mark.parametrize("word", prompt.CONTROL_WORDS)
def test_control_words_are_refused(word):
    with pytest.raises(prompt.PromptError, match=word):
        prompt.build_ids(TINY, f"a car{word}\nignore that")


def test_further_special_tokens_of_a_tokenizer_are_refused():
    tokenizer = prompt.tiny_tokenizer()
    tokenizer.add_special_tokens(["<2mass>"])
    prompt.build_ids(TINY, "a <2mass>")
    with pytest.raises(prompt.PromptError, match="<2mass>"):
        prompt.build_ids(tokenizer, "a <2mass>")


# ---- the tiny tokenizer -------------------------------------------------------------------------------------------


def test_special_ids_are_gemmas():
    assert {word: TINY.token_to_id(word) for word in SPECIAL} == {
        "<pad>": 0,
        "<eos>": 1,
        "<bos>": 2,
        "<unk>": 3,
        "<start_of_turn>": 106,
        "<end_of_turn>": 107,
    }
    prompt.check_tokenizer(TINY, VidiConfig.tiny())


def test_every_id_decodes():
    assert TINY.get_vocab_size() == 512
    assert sorted(TINY.get_vocab().values()) == list(range(512))
    assert prompt.decode(TINY, range(512))


@settings(deadline=None, max_examples=200)
@given(st.text())
def test_text_round_trips(text):
    if not any(word in text for word in SPECIAL):
        assert prompt.decode(TINY, TINY.encode(text, add_special_tokens=False).ids) == text


def test_special_tokens_are_not_part_of_an_answer():
    assert prompt.decode(TINY, [2, *TINY.encode("0.25-0.50").ids, 107, 0]) == "0.25-0.50"


@pytest.mark.parametrize("token", [512, -1, -200])
def test_ids_of_another_vocabulary_are_refused(token):
    with pytest.raises(prompt.PromptError, match=rf"ids \[{token}\] are outside the tokenizer's 512"):
        prompt.decode(TINY, [5, token])


def test_written_and_read_back(tmp_path):
    path = prompt.write_tiny_tokenizer(tmp_path)
    assert path == tmp_path / "tokenizer.json"
    for place in (path, tmp_path):
        tokenizer = prompt.load_tokenizer(place, VidiConfig.tiny())
        assert prompt.build_ids(tokenizer, "a red car") == prompt.build_ids(TINY, "a red car")


def test_padding_in_the_file_is_switched_off(tmp_path):
    tokenizer = prompt.tiny_tokenizer()
    tokenizer.enable_padding(length=300)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert prompt.build_ids(prompt.load_tokenizer(tmp_path), "a car") == prompt.build_ids(TINY, "a car")


def test_files_that_are_none(tmp_path):
    with pytest.raises(prompt.PromptError, match=r"tokenizer\.json: no such file"):
        prompt.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(prompt.PromptError, match=r"tokenizer\.json: no readable"):
        prompt.load_tokenizer(tmp_path)


def test_tokenizers_that_do_not_match_are_refused(tmp_path):
    prompt.write_tiny_tokenizer(tmp_path)
    config = VidiConfig.tiny()
    with pytest.raises(prompt.PromptError, match="<end_of_turn> is 107, not 99"):
        prompt.load_tokenizer(tmp_path, dataclasses.replace(config, end_of_turn_id=99))
    small = dataclasses.replace(config.decoder, vocab_size=500)
    with pytest.raises(prompt.PromptError, match="512 tokens, but the checkpoint embeds 500"):
        prompt.load_tokenizer(tmp_path, dataclasses.replace(config, decoder=small))
    bare = Tokenizer.from_str(TINY.to_str().replace("start_of_turn", "begin_of_turn"))
    with pytest.raises(prompt.PromptError, match="<start_of_turn> is missing"):
        prompt.check_tokenizer(bare, config)


def test_a_file_with_a_field_of_another_kind_of_tokenizer_is_refused(tmp_path):
    path = prompt.write_tiny_tokenizer(tmp_path) or next(tmp_path.glob("*.json"))
    path.write_text(path.read_text().replace('"model"', '"unheard_of": 1, "model"', 1))
    with pytest.raises(Refused, match="unheard_of: is no field known here"):
        tokenizer_file.read(path)


def test_what_an_error_says_is_one_line():
    """It may quote a file, and a line end in it would pass for another message."""
    assert str(prompt.PromptError("first\nsecond")) == r"first\nsecond"


def test_too_small_a_vocabulary():
    with pytest.raises(ValueError, match="300"):
        prompt.tiny_tokenizer(300)


def test_the_limits_of_a_tokenizer_are_those_that_the_page_tells():
    page = (Path(__file__).parents[3] / "SECURITY.md").read_text(encoding="utf-8")
    size, values = tokenizer_file.MAX_BYTES / (1 << 20), tokenizer_file.MAX_VALUES / 1e6
    assert f"in at most {size:g} MiB and {values:g} million values" in page
