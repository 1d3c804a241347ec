"""Which tests can see a file: those that judge a mutant whose golden runs agree.

Aside of what the log of the study depends on: a row that changes sends back those alone who face other tests than before.
"""

from __future__ import annotations

import fnmatch

__all__ = ["TESTS", "tests_of"]

UNIT = "tests/unit"
MODEL = (
    *(f"{UNIT}/test_{name}.py" for name in ("rounding", "generate", "release", "long_inputs", "gradients")),
    "tests/harness/test_gaps.py",
)
CONFIG = tuple(f"{UNIT}/test_{name}.py" for name in ("config", "config_7b", "release"))
PROMPT = (f"{UNIT}/inputs/test_inputs_prompt.py", f"{UNIT}/inputs/test_inputs_prompt_7b.py")
TEXT = "tests/properties/test_property_text.py"
VIDEO = tuple(f"{UNIT}/inputs/test_inputs_{name}.py" for name in ("video", "parallel", "large", "untrusted"))
SOUND = (
    *(f"{UNIT}/inputs/test_inputs_{name}.py" for name in ("audio", "large", "parallel")),
    f"{UNIT}/test_retrieval.py",
)

#: the tests that can see a file, by the first pattern that fits it; the most telling first, the slowest last
TESTS: dict[str, tuple[str, ...]] = {
    "vidi/bridge/*": (f"{UNIT}/bridge", "tests/properties/test_property_grid.py", *MODEL),
    "vidi/towers/*": (f"{UNIT}/towers", *MODEL),
    "vidi/attention/rope.py": (f"{UNIT}/decoder/test_decoder_layer.py", f"{UNIT}/attention", *MODEL),
    "vidi/attention/*": (f"{UNIT}/attention", *MODEL),
    "vidi/decoder/*": (f"{UNIT}/decoder", *MODEL),
    "vidi/fast/*": (f"{UNIT}/fast", *MODEL),
    "vidi/cache.py": (f"{UNIT}/decoder", *MODEL),
    "vidi/config.py": (*CONFIG, f"{UNIT}/checkpoint/test_checkpoint_names.py"),
    "vidi/official*.py": (*CONFIG, f"{UNIT}/checkpoint/test_checkpoint_names.py"),
    "vidi/release.py": CONFIG,
    "vidi/loss.py": (f"{UNIT}/test_loss.py", *MODEL),
    "vidi/model.py": (*(f"{UNIT}/test_{name}.py" for name in ("model", "loss", "tap")), *MODEL),
    "vidi/precision.py": (f"{UNIT}/test_precision.py", *MODEL),
    "vidi/tap.py": (f"{UNIT}/test_tap.py", *MODEL),
    "vidi/retrieval.py": (f"{UNIT}/test_retrieval.py", TEXT, PROMPT[1]),
    "vidi/checkpoint/names.py": (f"{UNIT}/checkpoint/test_checkpoint_names.py",),
    "vidi/inputs/batch.py": (f"{UNIT}/inputs/test_inputs_batch.py", *MODEL),
    "vidi/inputs/pixels.py": VIDEO[:1],
    "vidi/inputs/audio.py": SOUND,
    "vidi/inputs/dialect.py": (*PROMPT, f"{UNIT}/test_retrieval.py"),
    "vidi/inputs/prompt.py": (*PROMPT, TEXT),
    "vidi/inputs/prompt_7b.py": (*PROMPT[::-1], TEXT),
    "vidi/inputs/tokenizer_file.py": (*PROMPT, TEXT, "tests/harness/test_fuzz_tokenizer.py"),
    "vidi/inputs/codecs.py": (f"{UNIT}/inputs/test_inputs_codecs.py", *VIDEO),
    "vidi/inputs/container.py": (*VIDEO, SOUND[0]),
    "vidi/inputs/reader.py": (*VIDEO, f"{UNIT}/test_retrieval.py"),
    "vidi/inputs/*": VIDEO,
    "vidi/*": MODEL,
}


def tests_of(file: str) -> tuple[str, ...]:
    return next(tests for glob, tests in TESTS.items() if fnmatch.fnmatchcase(file, glob))
