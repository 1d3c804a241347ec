"""The gate over two benchmark files, which needs no GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.site import Kernel
from tests.benchmarks.test_bench_kernels import figures
from tools import compare_benchmarks
from vidi.fast.floors import Ceilings

FLASH = {"variant": "flash", "device": "H100", "to_floor": 1.5, "to_plain": 0.02, "device_ms": 0.3}
PLAIN = {"variant": "plain", "device": "H100", "to_floor": 60.0, "to_plain": 1.0, "device_ms": 12.0}


def write(folder: Path, name: str, **benchmarks: dict[str, Any]) -> str:
    path = folder / name
    path.write_text(json.dumps({"benchmarks": [{"name": n, "extra_info": i} for n, i in benchmarks.items()]}))
    return str(path)


@pytest.mark.parametrize(
    ("after", "status", "said"),
    [
        ({"a": FLASH, "b": PLAIN}, 0, "3 ratios, 0 worse, 0 gone"),
        ({"a": FLASH | {"device_ms": 30.0}, "b": PLAIN}, 0, "0 worse"),  # a slower card, the same ratios
        ({"a": FLASH | {"to_floor": 1.57}, "b": PLAIN}, 0, "+4.7%"),
        ({"a": FLASH | {"to_floor": 1.6}, "b": PLAIN}, 1, "+6.7% WORSE"),
        ({"a": FLASH | {"to_plain": 0.03}, "b": PLAIN}, 1, "3 ratios, 1 worse, 0 gone"),
        ({"a": FLASH}, 1, "0 worse, 1 gone"),
        ({"a": FLASH, "b": PLAIN, "c": FLASH}, 0, "5 ratios, 0 worse"),
    ],
)
def test_gate(after: dict, status: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write(tmp_path, "a.json", a=FLASH, b=PLAIN), write(tmp_path, "b.json", **after)
    assert compare_benchmarks.main(files) == status
    assert said in capsys.readouterr().out


def test_slack(tmp_path: Path) -> None:
    files = write(tmp_path, "a.json", a=FLASH), write(tmp_path, "b.json", a=FLASH | {"to_floor": 1.6})
    assert compare_benchmarks.main([*files, "--slack", "0.1"]) == 0


def test_other_devices_and_other_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here, there = write(tmp_path, "a.json", a=FLASH), write(tmp_path, "b.json", a=FLASH | {"device": "H200"})
    assert compare_benchmarks.main([here, there]) == 2
    assert "measured on H100 and on H200" in capsys.readouterr().err
    assert compare_benchmarks.main([here, there, "--across-devices"]) == 0
    for bad in (
        write(tmp_path, "c.json"),
        write(tmp_path, "d.json", a={"device": "H100"}),
        write(tmp_path, "e.json", a=FLASH | {"to_floor": float("nan")}, b=PLAIN),
        str(tmp_path / "none.json"),
    ):
        assert compare_benchmarks.main([here, bad]) == 2


def test_figures_of_a_kernel() -> None:
    """1 TFLOP in 2 ms at a ceiling of 800 TFLOP/s: floor 1.25 ms. 3 GB at 3 TB/s: 1 ms, so arithmetic binds."""
    ceilings = Ceilings(*(800e12, 3e12, 700e12)[: len(Ceilings.__dataclass_fields__)])
    found = figures(Kernel({}, flops=10**12, nbytes=3 * 10**9), 2.0, 8.0, ceilings)
    assert found["bound"] == "arithmetic"
    assert found["floor_ms"] == pytest.approx(1.25)
    assert found["to_floor"] == pytest.approx(1.6)
    assert found["to_plain"] == pytest.approx(0.25)
    assert found["tflops"] == pytest.approx(500)
    assert found["tbytes_per_s"] == pytest.approx(1.5)
    assert found["share_of_ceiling"] == pytest.approx(0.625)
