"""stand-in until the real one"""
from dataclasses import dataclass
import torch
from torch import Tensor
@dataclass(frozen=True)
class Batch:
    input_ids_BT: Tensor
    keep_BT: Tensor | None = None
    images: tuple | None = None
    audios: tuple | None = None
    audio_sizes: tuple | None = None
    labels_BT: Tensor | None = None
def pad_rows(rows):
    n=max(len(r) for r in rows); out=rows[0].new_zeros(len(rows), n, *rows[0].shape[1:])
    return torch.stack([torch.cat([r, r.new_zeros(n-len(r), *r.shape[1:])]) for r in rows])
def pack_text(ids, keep, labels=None, placeholder=-200):
    keep = torch.ones_like(ids, dtype=torch.bool) if keep is None else keep.bool()
    keep = keep & (ids != placeholder)
    n = int(keep.sum(1).max()); order = torch.argsort(~keep, dim=1, stable=True)[:, :n]
    k = keep.gather(1, order)
    i = ids.gather(1, order).masked_fill(~k, 0)
    l = None if labels is None else labels.gather(1, order).masked_fill(~k, -100)
    return i, k, l
