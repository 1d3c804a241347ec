"""The oracle: the forward passes of Vidi 1.5 9B and Vidi 7B in NumPy float64, sharing no code with the models. Imports
numpy only.

Read in the order the data flows:

    case.py       sizes, weights and inputs as named by the release; the trace of stages
    casts.py      which number format each step uses        pointwise.py  activations, LayerNorm, softmax
    towers.py     frames and log-mel to features            positions.py  where a token stands, rms()
    bridge.py     features to visual and audio tokens       text.py       ids to packed embeddings
    decoder.py    decomposed attention                      unpad.py      its varlen form, for the record
    head.py       what both losses share                    run.py        all of it, and greedy decoding

What only one model has: nine.py and seven.py, chosen by its config.json in models.py.
"""

from .casts import Arithmetic, round_bf16, round_fp16
from .nine import loss
from .run import Greedy, forward, greedy, teacher_forced

__all__ = ["Arithmetic", "Greedy", "forward", "greedy", "loss", "round_bf16", "round_fp16", "teacher_forced"]
