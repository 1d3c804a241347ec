"""Hostile chat templates, in a child process with limits: each ends in one line that says why, in 10 s and bounded memory.

A template is a program of the checkpoint. At first it ran inside the process that asked: these took it down, or never ended.
"""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

import pytest

from tests.limited import one_line, run_cases
from vidi import sizes_7b
from vidi.inputs import prompt_7b, template_child
from vidi.inputs.prompt import PromptError

CONFIG = sizes_7b.config("tiny")
_LOOP = "{% for a in range(99999) %}"
HOSTILE = {
    "loops without end": _LOOP * 4 + "{% endfor %}" * 4,
    "a constant without end": "{{ 9 ** (9 ** 9) }}",
    "a constant without room": "{{ 'a' * 10 ** 12 }}",
    "a text without room": "{% set n = messages|length * 10 ** 12 %}{{ 'a' * n }}",
    "a text that doubles": "{% set x = namespace(t='ab') %}" + _LOOP + "{% set x.t = x.t ~ x.t %}{% endfor %}",
    "a long text": "{{ messages[0].content * 20000 }}",
    "a wide field": "{{ '%1000000000s' % 1 }}",
    "calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "nested deep": "{{ " + "(" * 40000 + "1" + ")" * 40000 + " }}",
    "a list in a list": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "says no in many lines": "{{ raise_exception('no\n\x1b[31m' * 1000) }}",
    "leaves the sandbox": "{{ messages.__class__.__base__.__subclasses__() }}",
}


def case(seed: int, folder: Path) -> str:
    """The tiny checkpoint with the template of this number; RUSAGE_CHILDREN are the processes of templates alone."""
    name = list(HOSTILE)[seed % len(HOSTILE)]
    inside = folder / "inside"
    for file, text in prompt_7b.tiny_files().items():
        (inside / file).write_text(text)
    config = inside / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": HOSTILE[name]}))
    started = time.perf_counter()
    with pytest.raises(PromptError) as refused:
        prompt_7b.load(inside, CONFIG).ids("a red car", 1.0, CONFIG)
    assert time.perf_counter() - started < 10
    one_line(refused.value, "chat template")
    unit = 1024  # Linux tells kilobytes
    if seed % len(HOSTILE) == 0:
        assert "SIGXCPU" in str(refused.value) or "took more than" in str(refused.value)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit <= template_child.MEMORY_BYTES
    return name


@pytest.mark.slow
def test_hostile_templates_end_in_one_line(tmp_path: Path) -> None:
    assert run_cases("tests.harness.test_fuzz_template", len(HOSTILE), tmp_path) == dict.fromkeys(HOSTILE, 1)


def test_a_template_that_waits_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that does not compute, so that no limit of its own ends it."""
    script = tmp_path / "asleep.py"
    script.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(template_child, "__file__", str(script))
    monkeypatch.setattr(prompt_7b, "WAIT_SEC", 0.5)
    with pytest.raises(PromptError, match=r"took more than 0\.5 s; it may compute"):
        prompt_7b._run_template("x", None)


def test_a_process_that_fails_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "broken.py"
    script.write_text("import absent_library")
    monkeypatch.setattr(template_child, "__file__", str(script))
    with pytest.raises(PromptError, match="status 1: ModuleNotFoundError: No module named 'absent_library'"):
        prompt_7b._run_template("x", None)
