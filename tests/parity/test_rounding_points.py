"""Every numeric stage says where it rounds (`Stage.rounded`), and what it says is held against the model."""

from __future__ import annotations

import pytest

from stageparity import store
from tests.parity.runs import GOLDENS
from vidi.parity.stages import STAGES
from vidi.parity.subject import VidiSubject

# Nothing is rounded in them: values are moved, looked up or averaged in float32; or they are the work of all stages.
ROUNDS_NOTHING = {
    "vision.pad", "vision.space_to_depth{g}", "vision.packed", "audio.trim", "audio.packed", "text.embeds",
    "layer.{i}.input", "xattn.{i}.{m}.unpad.q", "xattn.{i}.{m}.unpad.k", "xattn.{i}.{m}.unpad.v", "loss.{n}",
}  # fmt: skip
ALL_STAGES = {"grad.{n}", "{n}.nocache.logits", "{n}.cached.logits"}


def test_every_numeric_stage_says_where_it_rounds() -> None:
    silent = {entry.template for entry in STAGES if not entry.exact and entry.rounded is None}
    assert silent == ROUNDS_NOTHING | ALL_STAGES


@pytest.mark.parametrize(("folder", "dtype"), [("small", "bfloat16"), ("small", "float16"), ("small-7b", "float16")])
def test_what_it_says_is_held_in_some_case(folder: str, dtype: str) -> None:
    """A twin that could never be computed would judge nothing."""
    held, missing = set(), set()
    for ref in store.list_cases(GOLDENS / folder):
        if ref.name not in ("base", "oneframe", "budget", "train"):
            continue
        case, subject = store.open_case(ref.folder, ref.name), VidiSubject(dtype)
        bench = subject.bench(case, subject.build(case), case.variant("cast"))
        for stage in bench.targets:
            found = STAGES.find(stage)
            if found is None or found[0].rounded is None:
                continue
            try:
                bench.rounded(stage)
                held.add(found[0].template)
            except LookupError:
                missing.add(found[0].template)
    assert len(held) > 20
    assert missing <= held
