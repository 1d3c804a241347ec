"""A two-layer model in NumPy. Letters: B samples, T tokens, D width, N heads, H head width, U vocabulary."""

import numpy as np


class Layer:
    """Causal attention of kept tokens, added to what came in."""

    def __init__(self, weights, prefix, heads):
        self.scale_D, self.query_DD, self.key_DD, self.value_DD = (weights[f"{prefix}.{n}"] for n in ("scale", "q", "k", "v"))
        self.heads = heads

    def forward(self, x_BTD, keep_BT, tap, name):
        y_BTD = tap(f"{name}.norm", norm(x_BTD, self.scale_D))
        q_BTNH = tap(f"{name}.q", split(y_BTD @ self.query_DD, self.heads))
        mix_BTNH = tap(f"{name}.mix", self.read(q_BTNH, y_BTD, keep_BT))
        return tap(f"{name}.output", join(x_BTD, mix_BTNH))

    def read(self, q_BTNH, y_BTD, keep_BT):
        return attend(q_BTNH, split(y_BTD @ self.key_DD, self.heads), split(y_BTD @ self.value_DD, self.heads), keep_BT)


class Model:
    def __init__(self, weights, heads):
        self.table_UD = weights["table"]
        self.layers = [Layer(weights, f"layer.{i}", heads) for i in range(2)]

    def forward(self, ids_BT, tap=lambda name, x: x):
        keep_BT = tap("mask", keep(ids_BT))
        x_BTD = tap("embed", embed(ids_BT, self.table_UD))
        for i, layer in enumerate(self.layers):
            x_BTD = layer.forward(x_BTD, keep_BT, tap, f"layer.{i}")
        return tap("logits", logits(x_BTD, self.table_UD))


def keep(ids_BT):
    return ids_BT > 0


def embed(ids_BT, table_UD):
    return table_UD[ids_BT]


def norm(x_BTD, scale_D):
    return x_BTD / np.sqrt(np.square(x_BTD).mean(-1, keepdims=True) + 1e-6) * scale_D


def split(x_BTD, heads):
    return x_BTD.reshape(*x_BTD.shape[:2], heads, -1)


def attend(q_BTNH, k_BTNH, v_BTNH, keep_BT):
    score_BNTS = np.einsum("btnh,bsnh->bnts", q_BTNH, k_BTNH) / q_BTNH.shape[-1] ** 0.5
    sees_BTS = np.tri(q_BTNH.shape[1], dtype=bool) & keep_BT[:, None]
    e_BNTS = np.where(sees_BTS[:, None], np.exp(score_BNTS - score_BNTS.max(-1, keepdims=True)), 0)
    return np.einsum("bnts,bsnh->btnh", e_BNTS / e_BNTS.sum(-1, keepdims=True), v_BTNH)


def join(x_BTD, mix_BTNH):
    return x_BTD + mix_BTNH.reshape(x_BTD.shape)


def logits(x_BTD, table_UD):
    return x_BTD @ table_UD.T


def say(model, ids_BT, steps=4):
    """What greedy decoding says after each sample's last token."""
    for _ in range(steps):
        ids_BT = np.concatenate([ids_BT, model.forward(ids_BT)[:, -1:].argmax(-1)], 1)
    return ids_BT[:, -steps:]
