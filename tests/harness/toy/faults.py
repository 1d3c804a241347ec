"""Ten wrong steps, each known by the code that it stands in for: six of a stage, three of what feeds one, one of the chain."""

from types import SimpleNamespace

from stageparity.faults.plant import Fault
from toy.stages import layer, model, whole


def turned(end):
    """A layer that hands on one stage's result with its tokens in reverse order, after it was seen."""
    return lambda forward: lambda own, x, keep, tap, name: forward(
        own, x, keep, lambda i, y: tap(i, y)[:, ::-1] if i.endswith(end) else tap(i, y), name)  # fmt: skip


FAULTS = {fault.name: fault for fault in (
    Fault("keep.all", "padding is kept", (model.keep,), lambda f: lambda ids: f(ids) | True),
    Fault("norm.eps", "1e-3 there", (model.norm,), lambda f: lambda x, s: x / ((x**2).mean(-1, keepdims=True) + 1e-3) ** 0.5 * s),
    Fault("norm.centred", "the mean is taken off", (model.norm,), lambda f: lambda x, s: f(x - x.mean(-1, keepdims=True), s)),
    Fault("attend.raw", "scores as they are", (model.attend,), lambda f: lambda q, *rest: f(q * q.shape[-1] ** 0.5, *rest)),
    Fault("attend.padding", "padding is read", (model.attend,), lambda f: lambda q, k, v, keep: f(q, k, v, keep | True)),
    Fault("join.alone", "what came in is lost", (model.join,), lambda f: lambda x, mix: f(0 * x, mix)),
    Fault("layer.queries_turned", "the last token asks for the first", (layer["mix"],), turned(".q")),
    Fault("layer.mix_turned", "the last token gets what the first read", (layer["output"],), turned(".mix")),
    Fault("model.layers_turned", "the last layer comes first", (whole["layers"],), lambda f: lambda m, *args: f(
        SimpleNamespace(table_UD=m.table_UD, layers=m.layers[::-1]), *args)),
    Fault("say.late", "the first word is left out", (model.say,), lambda f: lambda m, ids, n=4: f(m, ids, n + 1)[:, 1:]),
)}  # fmt: skip
