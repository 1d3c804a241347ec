"""The fast path: the plain model's weights, other loops. Same protocol as `vidi.model.VidiModel` in inference.

What makes it fast is one fact of the architecture: a visual or audio token never looks at another token. So streams pass
through all layers in chunks that leave only keys and values behind (`streams.py`), and the text then runs against finished
caches, all at once in a prefill (`text.py`) and row by row in decoding (`step.py`).

Every kernel of `kernels/` has its naive twin in `twins.py`; a CPU runs the twins, in any dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from vidi.config import VidiConfig
    from vidi.fast.model import FastModel
    from vidi.model import VidiModel

__all__ = ["accelerate", "refusal"]

#: decoders whose norms, activation and caps the kernels have; a CPU's twins have all
KERNELS = ("gemma2",)


def refusal(config: VidiConfig, device: torch.device) -> str | None:
    """Why ``device`` cannot run the fast path of this model, and what to do instead; None where it can."""
    if device.type != "cuda" or config.decoder.kind in KERNELS:
        return None
    return (
        f"on a GPU its kernels have the norms, activation and softcaps of {' and '.join(KERNELS)} alone, not those of "
        f"{config.decoder.kind}; use the plain path, or a CPU"
    )


def accelerate(model: VidiModel, **options: Any) -> FastModel:
    """A fast path over ``model``'s own parameters (no copy but fused layouts); options as of `FastModel`.

    Raises ValueError with the `refusal`, where there is one.
    """
    if refused := refusal(model.config, model.device):
        raise ValueError(f"the fast path: {refused}")
    from vidi.fast.model import FastModel

    return FastModel(model, **options)
