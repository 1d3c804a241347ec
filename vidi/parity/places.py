"""Places of a stage's inputs that its own id does not show. No torch.

``{path}`` vision or audio, ``{name}`` image or audio, ``{stream}`` the stream that enters the layer, ``{before}`` the text that
does, ``{last}`` the text after the last layer.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["derived"]

NAMES = {"v": {"path": "vision", "name": "image"}, "a": {"path": "audio", "name": "audio"}}


def derived(places: Mapping[str, str], num_layers: int) -> dict[str, str]:
    """All places that an input's template may have, of a stage with these places of its own."""
    i, m = int(places.get("i") or 0), places.get("m") or "v"
    names = NAMES[m]
    stream = f"layer.0.{names['name']}_input" if i == 0 else f"layer.{i - 1}.{names['name']}_stream"
    last = f"layer.{num_layers - 1}.output"
    before = f"layer.{i - 1}.output"
    return {"b": "0", "g": "", "m": m, **places, **names, "stream": stream, "before": before, "last": last}
