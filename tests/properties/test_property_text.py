"""Prompts and answers, for arbitrary text (spec §2)."""

from __future__ import annotations

import re
from functools import cache

import hypothesis.strategies as st
import pytest
from hypothesis import given

from vidi import retrieval, sizes_7b
from vidi.inputs import dialect, prompt


@cache
def tokenizer():
    return prompt.tiny_tokenizer()


queries = st.text(min_size=1, max_size=40).filter(
    lambda q: q.removesuffix(".").strip() and not any(word in q for word in prompt.CONTROL_WORDS)
)


@given(queries)
def test_a_prompt_reads_back_as_the_question(query):
    ids = prompt.build_ids(tokenizer(), query)
    assert ids[0] == 2
    assert ids.count(-200) == 1
    assert ids.count(2) == 1
    at = ids.index(-200)
    text = tokenizer().decode(ids[1:at], skip_special_tokens=False) + "<image>"
    text += tokenizer().decode(ids[at + 1 :], skip_special_tokens=False)
    asked = query.removesuffix(".")
    assert text == (
        "<start_of_turn>user\n<image>\nDuring which time segments in the video can we see "
        f"{asked}?<end_of_turn>\n<start_of_turn>model\n"
    )


@given(st.text(max_size=20), st.sampled_from(prompt.CONTROL_WORDS), st.text(max_size=20))
def test_a_question_cannot_steer_the_model(before, word, after):
    with pytest.raises(prompt.PromptError):
        prompt.build_ids(tokenizer(), before + word + after)


@given(st.sampled_from(["", " ", ".", " .", "\t\n", "  ."]))
def test_an_empty_question_is_refused(query):
    with pytest.raises(prompt.PromptError, match="empty"):
        prompt.user_text(query)


@given(st.text(max_size=60))
def test_text_without_special_tokens_round_trips(text):
    if not any(word in text for word in prompt.CONTROL_WORDS):
        ids = tokenizer().encode(text, add_special_tokens=False).ids
        assert prompt.decode(tokenizer(), ids) == text


fractions = st.integers(0, 100).map(lambda n: f"{n / 100:.2f}")


@given(st.lists(st.tuples(fractions, fractions), max_size=6), st.sampled_from([", ", " ", "\n", " and ", "; "]))
def test_ranges_round_trip(pairs, between):
    text = between.join(f"{a}-{b}" for a, b in pairs)
    assert retrieval.parse_ranges(text) == [(float(a), float(b)) for a, b in pairs]


@given(st.text(alphabet=st.sampled_from("0123456789.-, ab\n٣"), max_size=40))
def test_arbitrary_text_is_read_by_the_rule_and_never_fails(text):
    """Left to right, a digit, a point and digits, a hyphen, and the same again; what overlaps a match is not read anew."""
    number, found, at = r"\d\.\d+", [], 0
    while at < len(text):
        first = re.compile(number).match(text, at)
        # Digits of the first number may be given back only if a hyphen follows them, which no digit is.
        second = re.compile("-" + number).match(text, first.end()) if first else None
        if first and second:
            found.append((float(first[0]), float(second[0][1:])))
            at = second.end()
        else:
            at += 1
    assert retrieval.parse_ranges(text) == found
    assert isinstance(retrieval.format_ranges(found, 100.0), str)


@given(st.text(max_size=80))
def test_any_text_at_all_can_be_an_answer(text):
    assert all(0 <= a < 10 and 0 <= b < 10 for a, b in retrieval.parse_ranges(text))


@given(st.text(alphabet=st.sampled_from("0123456789.-, ab\n٣"), max_size=40))
def test_the_7bs_answers_are_runs_of_digits_and_points(text):
    """Looser than 1.5 9B's: what is no number is skipped, and what it says of one query it says of its parts."""
    pattern = dialect.of(sizes_7b.config("tiny")).ranges
    found = retrieval.parse_ranges(text, pattern)
    numbers = re.findall(r"([0-9.]+)-([0-9.]+)", text)
    assert found == [(float(a), float(b)) for a, b in numbers if a.count(".") < 2 > b.count(".") and a != "." != b]
    assert isinstance(retrieval.format_ranges(found, 100.0), str)


@given(st.floats(0, 1), st.floats(0, 400_000))
def test_times_round_down_and_read_back(fraction, duration_sec):
    shown = retrieval.format_time(fraction, duration_sec)
    hours, minutes, seconds = map(int, shown.split(":"))
    assert re.fullmatch(r"\d{2,}:[0-5]\d:[0-5]\d", shown)
    read = hours * 3600 + minutes * 60 + seconds
    assert read <= fraction * duration_sec < read + 1
