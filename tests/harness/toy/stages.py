"""Everything there is to know of each stage, and the model as a subject."""

from stageparity.bench import GoldenSubject
from stageparity.code import code
from stageparity.stage import Place, Stage, Stages
from toy.model import Model

model = code("toy.model")
layer, whole = model.Layer.forward, model.Model.forward
own = lambda site: site.model.layers[int(site.places["i"])]  # noqa: E731
STAGES = Stages((
    Stage("mask", "kept tokens", "§1", "B T", exact=True, inputs=("inputs.ids",), code=(model.keep,)),
    Stage("embed", "rows of the table", "§1", "B T D", inputs=("inputs.ids",), code=(model.embed,)),
    Stage("layer.{i}.norm", "root mean square norm", "§2", "B T D", inputs=("{before}",), code=(model.norm,),
          wiring=(whole["layers"],), run=lambda s: model.norm(*s.inputs, own(s).scale_D)),
    Stage("layer.{i}.q", "queries", "§2", "B T N H", heads=2, inputs=("layer.{i}.norm",), code=(model.split,),
          wiring=(layer["q"],), run=lambda s: model.split(s["layer.{i}.norm"] @ own(s).query_DD, 2)),
    Stage("layer.{i}.mix", "what each head reads", "§2", "B T N H", heads=2, inputs=("layer.{i}.q", "layer.{i}.norm", "mask"),
          code=(model.attend, model.Layer.read), wiring=(layer["mix"],), run=lambda s: own(s).read(*s.inputs)),
    Stage("layer.{i}.output", "what it read, added to what came in", "§2", "B T D", inputs=("{before}", "layer.{i}.mix"),
          code=(model.join,), wiring=(layer["output"],), run=lambda s: model.join(*s.inputs)),
    Stage("logits", "products with the table", "§3", "B T U", inputs=("layer.1.output",), code=(model.logits,),
          wiring=(whole["logits"],), run=lambda s: model.logits(*s.inputs, s.model.table_UD)),
    Stage("said", "greedy tokens", "§3", "B S", exact=True, own_chain=True, inputs=("logits",), code=(model.say,)),
), {"i": Place(loop=True)})  # fmt: skip


class Toy(GoldenSubject):
    stages = STAGES

    def build(self, case):
        return Model({name: x.astype(self.dtype) for name, x in case.weights().items()}, case.config["heads"])

    def run(self, built, inputs, tap):
        built.forward(inputs["inputs.ids"], tap)
        tap("said", model.say(built, inputs["inputs.ids"]))

    def places(self, places):
        i = int(places.get("i", 0))
        return {"before": f"layer.{i - 1}.output" if i else "embed"}
