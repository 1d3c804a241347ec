"""How a model is asked, and how its answer is read (spec §2): chosen once by the configuration."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidi.config import VidiConfig
from vidi.inputs import prompt, prompt_7b

__all__ = ["Dialect", "of"]


@dataclass(frozen=True)
class Dialect:
    """load: (checkpoint folder, config) -> tokenizer. ids: (tokenizer, query, length of the video in seconds, config) -> the
    prompt. ranges: two groups, start and end as fractions of the length."""

    load: Callable[[Path, VidiConfig], Any]
    ids: Callable[[Any, str, float, VidiConfig], list[int]]
    ranges: re.Pattern[str]


_DIALECTS = {
    "gemma2": Dialect(
        prompt.load_tokenizer,
        lambda tokenizer, query, duration_sec, config: prompt.build_ids(
            tokenizer, query, bos_id=config.bos_id, image_placeholder=config.image_placeholder
        ),
        re.compile(r"(\d\.\d+)-(\d\.\d+)"),
    ),
    "mistral": Dialect(prompt_7b.load, prompt_7b.Chat.ids, re.compile(r"([\d.]+)-([\d.]+)", re.ASCII)),
}


def of(config: VidiConfig) -> Dialect:
    return _DIALECTS[config.decoder.kind]
