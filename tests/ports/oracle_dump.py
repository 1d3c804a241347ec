"""The forward pass in NumPy alone as a candidate: `python oracle_dump.py SET/CASE OUT`, then `vidi parity --candidate OUT`.

No adapter and no tracer: the program writes what it computed under the stages' ids, and says in candidate.toml what that is.
It runs twice, as it is and with each tensor exchanged for its golden, so that an error is told from what only inherits it.
"""

import sys
from pathlib import Path

from safetensors.numpy import load_file, save_file

from goldens.oracle import forward
from stageparity import store
from stageparity.golden import Whole
from stageparity.subject import reference_of

GOLDENS = Path(store.__file__).parents[1] / "goldens"
DTYPE = "float32"


def main(name: str, out: Path) -> None:
    """name: SET/CASE of the goldens; out: the folder to write."""
    folder, _, case_name = name.partition("/")
    case = store.open_case(GOLDENS / folder, case_name)
    targets = case.variant(reference_of(case, DTYPE)[0])
    whole = {stage: golden.array for stage in targets if isinstance(golden := targets[stage], Whole)}
    out.mkdir(parents=True, exist_ok=True)
    for kind, goldens in (("chained", None), ("forced", whole)):
        found = forward(
            case.config,
            case.weights(),
            case.inputs,
            casts="cast",
            round_to="fp32",
            pos_freq=load_file(GOLDENS / "pos_freq.safetensors")[str(case.config["hidden_size"])],
            anchor=goldens,
        )
        save_file({stage: x.copy() for stage, x in found.items()}, out / f"{kind}.safetensors")
    said = {"case": name, "golden": case.identity, "dtype": DTYPE}
    (out / "candidate.toml").write_text("".join(f'{key} = "{value}"\n' for key, value in said.items()))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
