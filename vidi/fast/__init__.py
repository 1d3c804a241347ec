"""The fast path: the plain model's weights, other loops. Same protocol as `vidi.model.VidiModel` in inference.

What makes it fast is one fact of the architecture: a visual or audio token never looks at another token. So streams pass
through all layers in chunks that leave only keys and values behind (`streams.py`), and the text then runs against finished
caches, all at once in a prefill (`text.py`) and row by row in decoding (`step.py`).

Every kernel of `kernels/` has its naive twin in `twins.py`; a CPU runs the twins, in any dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vidi.fast.model import FastModel
    from vidi.model import VidiModel

__all__ = ["accelerate"]


def accelerate(model: VidiModel, **options: Any) -> FastModel:
    """A fast path over ``model``'s own parameters (no copy but fused layouts); options as of `FastModel`.

    Raises ValueError for a decoder that is not Gemma 2's.
    """
    if model.config.decoder.kind != "gemma2":
        raise ValueError(
            f"the fast path computes Gemma 2 layers, not {model.config.decoder.kind}'s; use the plain model"
        )
    from vidi.fast.model import FastModel

    return FastModel(model, **options)
