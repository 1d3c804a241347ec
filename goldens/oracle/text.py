"""Ids to packed embeddings (spec §6). Dims: B batch, T kept text tokens (the longest row's), D width."""

import numpy as np

from .case import IMAGE_PLACEHOLDER, Trace, Weights
from .casts import Arithmetic

__all__ = ["IGNORED_LABEL", "embed", "pack"]

IGNORED_LABEL = -100


def pack(
    ids_BS: np.ndarray,
    keep_BS: np.ndarray | None,
    labels_BS: np.ndarray | None = None,
    extra_BN: np.ndarray | None = None,
    placeholder: int = IMAGE_PLACEHOLDER,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Kept ids moved to the left: (ids_BT, keep_BT, labels_BT or None).

    Kept = the given mask (None: all) and not the placeholder, wherever the padding or the holes are. `extra_BN`
    are ids that follow each row's own last kept token (decoding). Padding: id 0, label -100.
    """
    keep_BS = np.ones(ids_BS.shape, bool) if keep_BS is None else np.asarray(keep_BS).astype(bool)
    if keep_BS.shape != ids_BS.shape:
        raise ValueError(f"attention_mask has shape {keep_BS.shape}, input_ids {ids_BS.shape}; both are (B, S)")
    keep_BS = keep_BS & (ids_BS != placeholder)
    rows = [ids[keep] for ids, keep in zip(ids_BS, keep_BS, strict=True)]
    if extra_BN is not None:
        rows = [np.concatenate([row, extra]) for row, extra in zip(rows, extra_BN, strict=True)]
    ids_BT = _right_padded(rows, 0)
    keep_BT = _right_padded([np.ones(len(row), bool) for row in rows], False)
    if labels_BS is None:
        return ids_BT, keep_BT, None
    labels = [row[keep] for row, keep in zip(labels_BS, keep_BS, strict=True)]
    return ids_BT, keep_BT, _right_padded(labels, IGNORED_LABEL)


def embed(ar: Arithmetic, w: Weights, ids_BT: np.ndarray, keep_BT: np.ndarray, trace: Trace) -> np.ndarray:
    """Rows of the embedding, exact zeros in the padding, before the sqrt(D) factor."""
    x_BTD = w("model.embed_tokens.weight")[ids_BT] * keep_BT[:, :, None].astype(ar.work)
    trace.put("text.mask", keep_BT)
    return trace.put("text.embeds", x_BTD)


def _right_padded(rows: list[np.ndarray], fill: int | bool) -> np.ndarray:
    longest = max(len(row) for row in rows)
    return np.stack([np.pad(row, (0, longest - len(row)), constant_values=fill) for row in rows])
