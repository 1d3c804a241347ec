"""The same mathematics, written again in float64, one token and one head after another; shares no code with the model."""

import math

import numpy as np


def run(ids, weights, heads):
    """Every stage of the model by its id."""
    return forward(ids, weights, heads) | {"said": say(ids, weights, heads)}


def forward(ids, weights, heads):
    w = {name: x.astype(np.float64) for name, x in weights.items()}
    x = np.array([[w["table"][i] for i in row] for row in ids])
    out = {"mask": np.array([[i != 0 for i in row] for row in ids]), "embed": x}
    for layer in ("layer.0", "layer.1"):
        y = np.array([[t / math.sqrt(t @ t / len(t) + 1e-6) for t in row] for row in x]) * w[f"{layer}.scale"]
        q, k, v = ((y @ w[f"{layer}.{name}"]).reshape(*ids.shape, heads, -1) for name in "qkv")
        mix = np.array([[[one(q[b], k[b], v[b], ids[b], t, n) for n in range(heads)] for t in range(ids.shape[1])]
                        for b in range(len(ids))])  # fmt: skip
        x = x + mix.reshape(x.shape)
        out |= {f"{layer}.norm": y, f"{layer}.q": q, f"{layer}.mix": mix, f"{layer}.output": x}
    out["logits"] = np.einsum("btd,ud->btu", x, w["table"])
    return out


def one(q, k, v, ids, t, n):
    """What one head of one token reads."""
    seen = [s for s in range(t + 1) if ids[s] != 0]
    weights = [math.exp(q[t, n] @ k[s, n] / math.sqrt(q.shape[-1])) for s in seen]
    return sum(e / sum(weights) * v[s, n] for e, s in zip(weights, seen, strict=True))


def say(ids, weights, heads, steps=4):
    rows = [list(row) for row in ids]
    for _ in range(steps):
        last = forward(np.array(rows), weights, heads)["logits"][:, -1]
        rows = [[*row, int(np.argmax(x))] for row, x in zip(rows, last, strict=True)]
    return np.array(rows)[:, -steps:]
