"""A tiny checkpoint that says what it is told to, whatever it sees.

Attention and MLP are switched off (their post-norms weigh 0), so a layer passes its input on, and the tied embedding is
laid out so that every token's best successor is the next one of a chain: token k lies on axis k and, twice as far, on
axis k-1, and the last norm weighs axis k by 8^k. After token k, logit k+1 is then 2·8^k and logit k itself 1.5·8^k, in
any dtype.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from vidi.checkpoint import save, synthetic
from vidi.config import VidiConfig
from vidi.decoder.layer import DecoderLayer
from vidi.inputs import prompt

__all__ = ["write"]

SIZE = 2.0**-8  #: of an embedding; keeps logits well below the softcap of 30


def write(folder: Path, pieces: Sequence[str]) -> list[int]:
    """A checkpoint that answers with ``pieces``, one token each, then ends its turn. Returns their ids.

    The pieces take the place of unused tokens in the tiny tokenizer: a chain cannot hold a token twice.
    """
    config = VidiConfig.tiny()
    model = synthetic.create(config, seed=1, dtype=torch.float32)
    tokenizer = json.loads(prompt.tiny_tokenizer().to_str())
    vocab = tokenizer["model"]["vocab"]
    ids = list(range(500, 500 + len(pieces)))
    for token, piece in zip(ids, pieces, strict=True):
        del vocab[f"<unused{token}>"]
        vocab[piece] = token
    last_of_prompt = prompt.build_ids(prompt.tiny_tokenizer(), "a")[-1]
    chain = [last_of_prompt, *ids, config.end_of_turn_id]
    with torch.no_grad():
        for layer in model.decoder.layers:
            assert isinstance(layer, DecoderLayer)
            layer.post_attn_norm.weight.fill_(-1)
            layer.post_ffn_norm.weight.fill_(-1)
        model.decoder.embed.weight.zero_()
        model.decoder.norm.weight.zero_()
        for k, token in enumerate(chain):
            model.decoder.embed.weight[token, k] = SIZE
            model.decoder.norm.weight[k] = 8.0**k - 1
            if k:
                model.decoder.embed.weight[token, k - 1] = 2 * SIZE
    save.save(model, folder)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return ids
