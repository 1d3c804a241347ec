"""The released sizes and constants, read from `release.toml`, and what of a configuration contradicts them (spec §1)."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vidi import official

__all__ = ["RELEASE", "ReleaseWarning", "contradictions"]

#: Table -> name -> value. The tables "vision", "audio" and "decoder" hold the fields of the configuration's parts, "bridge"
#: and "tokens" its own.
RELEASE: dict[str, dict[str, Any]] = tomllib.loads(Path(__file__).with_name("release.toml").read_text(encoding="utf-8"))

# Choices of whoever runs the model, which no weights were trained for.
_FREE = {"visual_token_budget", "budget_scope"}


class ReleaseWarning(UserWarning):
    """A configuration has the release's widths and other numbers beside them."""


def contradictions(config: Any) -> list[str]:
    """Fields of a `VidiConfig` with the released widths that differ from the release, as `config.json` names them:
    "vision_config.num_attention_heads = 18 (the release has 16)". Empty for a model of other widths, which is another one.

    Real weights fit many of these numbers and then give wrong answers, so that no shape tells.
    """
    if config.decoder.kind != "gemma2" or any(
        getattr(config, part).hidden_size != RELEASE[part]["hidden_size"] for part in ("vision", "audio", "decoder")
    ):
        return []
    return [
        f"{name} = {found!r} (the release has {wanted!r})" for name, found, wanted in _pairs(config) if found != wanted
    ]


def _pairs(config: Any) -> Iterator[tuple[str, Any, Any]]:
    """(name in config.json, what the configuration has, what the release has) of every field that is compared."""
    for part, prefix, names in (
        ("vision", "vision_config.", official.VISION_FIELDS),
        ("audio", "audio_config.", official.AUDIO_FIELDS),
        ("decoder", "", official.DECODER_FIELDS),
    ):
        for theirs, ours in names.items():
            yield prefix + theirs, getattr(getattr(config, part), ours), RELEASE[part][ours]
    own = RELEASE["bridge"] | RELEASE["tokens"]
    for theirs, ours in official.BRIDGE_FIELDS.items():
        if ours in own and ours not in _FREE:
            yield theirs, getattr(config, ours), own[ours]
