"""What a foreign port of Vidi needs to be traced and judged: a golden case as files, the paths a case goes through. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from stageparity import atomic, table
from stageparity.golden import Whole
from stageparity.port import sketched, stagetrace
from stageparity.run import CaseRun, ids
from stageparity.stage import Stages, fill
from stageparity.store import Case
from stageparity.subject import unfit
from vidi.parity.goldens import goldens_dir, inputs_of, position_table, synthetic_tower
from vidi.parity.places import derived

__all__ = ["PATHS", "export", "feeds", "load_table", "paths", "raw_inputs", "write_adapter"]

TABLE = "stages.json"  # of the golden folder: the table of stages as data
#: ways through the model that one green case leaves unseen
PATHS = (
    "padding",
    "varlen",
    "resize",
    "silent modality",
    "window",
    "several videos",
    "cached decoding",
    "uncached decoding",
    "loss",
)


def load_table() -> table.Table:
    """The table of stages as data, from the embedded goldens."""
    return table.load(goldens_dir() / TABLE)


def feeds(case: Case, stages: Stages, stage_id: str) -> list[str]:
    """Ids of what feeds a stage of a case."""
    found = stages.find(stage_id)
    if found is None:
        return []
    places = derived(found[1], int(case.config["num_hidden_layers"]))
    return [fill(template, places) for template in found[0].inputs]


def paths(case: Case, run: CaseRun) -> set[str]:
    """Which of PATHS the compared stages of a case go through."""
    seen, inputs = {row.stage for row in run.rows}, case.inputs
    keep = inputs.get("inputs.attention_mask")
    longest = inputs["inputs.input_ids"].shape[1] if "inputs.input_ids" in inputs else 0
    frames = [x for name, x in inputs.items() if name.startswith(("inputs.images.", "inputs.images_u8."))]
    audios = [x for name, x in inputs.items() if name.startswith("inputs.audios.")]
    layers = any(stage.endswith(".t2t") for stage in seen)
    reached = {
        "padding": layers and keep is not None and not keep.all(),
        "varlen": any(".unpad." in stage for stage in seen),
        "resize": any(stage.startswith("vision.resize") for stage in seen),
        "silent modality": any(not x.any() for x in (*frames, *audios)) and any(s.endswith(".gate") for s in seen),
        "window": layers and 0 < int(case.config.get("sliding_window") or 0) < longest,
        "several videos": len(frames) > 1 and any(stage.startswith("vision.") for stage in seen),
        "cached decoding": any(".cached." in stage for stage in seen),
        "uncached decoding": any(".nocache." in stage for stage in seen),
        "loss": any(stage.startswith("loss.") for stage in seen),
    }
    return {path for path, is_so in reached.items() if is_so}


def export(
    case: Case,
    folder: Path,
    dtype: str,
    stages: Stages,
    judged_in: str | None = None,
    checkpoint: Path | None = None,
) -> None:
    """A golden case as files that NumPy alone can read: `case.json`, inputs, goldens and weights as safetensors; of the full-size
    case `case.json` and inputs alone.

    judged_in: the dtype whose goldens it is for, where that is another. checkpoint: the full-size case's weights. Raises
    ValueError where the case has none for it, or no use for that checkpoint.
    """
    variant, _ = sketched.reference(case, judged_in or dtype)
    if reason := unfit(case, variant, judged_in or dtype):
        raise ValueError(f"{case.set}/{case.name}: {reason}")
    targets = case.variant(variant)
    about = {
        "case": f"{case.set}/{case.name}",
        "golden": case.identity,
        "dtype": dtype,
        "config": case.config,
        "info": case.info,
        "stages": ids(targets, stages),
        "shapes": {name: list(golden.shape) for name, golden in targets.items()},  # also of those held in part
        "places": {name: asdict(place) for name, place in stages.places.items()},
    }
    if sketched.is_sketched(case):
        from vidi.parity import port_full

        port_full.check_checkpoint(case, checkpoint)
        port_full.write_inputs(case, folder, about, sketched.rule_of(targets, stages), checkpoint)
        return
    if checkpoint is not None:
        raise ValueError(
            f"--checkpoint means nothing for {case.set}/{case.name}, which has weights of its own; leave it out"
        )
    goldens = {name: golden.array for name, golden in targets.items() if isinstance(golden, Whole)}
    inputs = {name.removeprefix("inputs."): x for name, x in inputs_of(case).items()}
    if "inputs.feat_index" in case.inputs:
        inputs["features"] = synthetic_tower(case.inputs)
    freq = goldens.get("pos.freq")
    freq = position_table(int(case.config["hidden_size"])) if freq is None else freq
    if freq is not None:
        inputs["pos_freq"] = freq  # torch's exp differs between processors
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in (("inputs", inputs), ("goldens", goldens), ("weights", case.weights())):
        data = save({key: np.ascontiguousarray(x) for key, x in tensors.items()})
        atomic.write_bytes(folder / f"{name}.safetensors", data)
    atomic.write_text(folder / "case.json", json.dumps(about, indent=1) + "\n")


def raw_inputs(case: Case) -> dict[str, np.ndarray]:
    """What `forward` is given of a case, by name, but for what stands beside any case's (`features`, `pos_freq`)."""
    if sketched.is_sketched(case):
        from vidi.parity import port_full

        return port_full.inputs_of(case)
    return {name.removeprefix("inputs."): x for name, x in inputs_of(case).items()}


def write_adapter(folder: Path, case: Case, stages: Stages, dtype: str) -> None:
    """The tracer, an adapter to fill in, and a page on both. What is there already stays: an adapter is its user's."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(folder / "stagetrace.py", Path(stagetrace.__file__).read_bytes())
    targets = case.variant(sketched.reference(case, dtype)[0])
    families: dict[str, str] = {}
    for stage in ids(targets, stages):
        found = stages.find(stage)
        if found and not found[0].derived and not found[0].own_chain:
            families.setdefault(
                found[0].name, f"{found[0].shape}  {found[0].what}" if found[0].shape else found[0].what
            )
    listed = "\n".join(f'    # {name!r}: call("…"),  # {what}' for name, what in families.items())
    shapes = "\n".join(f"        {name:24} {x.dtype} {list(x.shape)}" for name, x in raw_inputs(case).items())
    texts = {
        "adapter.py": ADAPTER.format(case=f"{case.set}/{case.name}", inputs=shapes, stages=listed),
        "README.md": README.format(case=f"{case.set}/{case.name}") + FULL_SIZE * sketched.is_sketched(case),
        "candidate.toml": CANDIDATE.format(case=f"{case.set}/{case.name}", golden=case.identity, dtype=dtype),
    }
    for name, text in texts.items():
        if not (folder / name).exists():
            atomic.write_text(folder / name, text)


ADAPTER = '''"""How your port is built, run and looked into. `vidi port run adapter.py` holds it against the goldens."""

from stagetrace import call, tap  # noqa: F401  x = tap("vision.pos_h", x) stands in code where no module gives a stage


def build(config, weights):
    """Your model. config: the release's config.json as a dict; weights: NumPy arrays under their official names."""
    raise NotImplementedError("build: return your model with these weights")


def forward(model, inputs):
    """One golden case through it. inputs of {case} (NumPy arrays):
{inputs}
    """
    raise NotImplementedError("forward: run your model on these inputs")


# Where each stage's tensor is met: a path from what build() returned. stagetrace.py says all that call() can.
STAGES = {{
{stages}
}}
'''

README = """# A port on the bench

`{case}` of the goldens is what your port is held against. `case/` holds it as files: official weights, inputs, goldens.

1. Fill in `build`, `forward` and a few of `STAGES` in `adapter.py`; more can come later.
2. `vidi port run adapter.py --python YOUR/python`: your interpreter needs NumPy and what your port needs, nothing of ours.
3. The first line says what is wrong. Mend that first: what comes after it may only inherit.

No Python? Write your tensors as safetensors, HDF5 or .npy files under their stage ids beside `candidate.toml`, and run
`vidi parity --candidate FOLDER`.
"""

FULL_SIZE = """
This case is of the full size: 60 frames, 42 layers. Its goldens are sketches, and so is what is kept of your tensors: a few MB.
Weights are synthetic and not written here: `vidi synth CHECKPOINT --size full` makes them (21 GB), then
`vidi port run adapter.py --checkpoint CHECKPOINT` hands them to `build`, each read when it is asked for (`weights.folder` is
their folder). A port whose weights are in a form of its own converts that checkpoint once, and needs no --checkpoint.
Stages are judged from raw inputs on alone, in bfloat16.
"""

CANDIDATE = """# What the tensors beside this file are. Layouts are needed where your axes are not the golden's.
case = "{case}"
golden = "{golden}"
dtype = "{dtype}"

[layout]
# "xattn.{{i}}.{{m}}.k" = "B L G H -> B (G r) L H"
"""


def failure(said: dict[str, Any]) -> str:
    """What an unfinished trace says of its end, in a line."""
    failed = said.get("failed") or {}
    where = f", after stage {failed['last']}" if failed.get("last") else ""
    return f"the port's own: its {failed.get('step', 'run')} ended{where}: {failed.get('error', 'without a word')}"
