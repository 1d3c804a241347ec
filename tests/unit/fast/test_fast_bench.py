"""`vidi bench` on a CPU: the tiny model runs, the file holds what the table shows, the fit is a fit."""

from __future__ import annotations

import argparse
import json

import pytest

from tests.media import Sound, make_video
from vidi.commands import bench
from vidi.fast import measure


@pytest.mark.slow
@pytest.mark.parametrize("model", ["9b", "7b"])
def test_bench_on_a_cpu(model, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    target = tmp_path / "bench.json"
    chosen = ["--device", "cpu", "--model", model, "--frames", "2,3,4", "--plain", "2", "--max-new-tokens", "2"]
    assert bench.run(parser.parse_args([*chosen, "--json", str(target)])) == 0
    printed = capsys.readouterr().out
    assert "device: CPU" in printed
    assert f"model: {model}, tiny" in printed
    assert "linear fit over 3 lengths" in printed
    report = json.loads(target.read_text())
    assert [row["frames"] for row in report["fast"]] == [2, 3, 4]
    # 13 patches a side: 7×7 tokens of the 9B, 3×3 of the 7B.
    assert [row["visual_tokens"] for row in report["fast"]] == [n * {"9b": 49, "7b": 9}[model] for n in (2, 3, 4)]
    assert [row["frames"] for row in report["plain"]] == [2]
    for row in report["fast"] + report["plain"]:
        for name, floor in row["floors"].items():
            assert row["ratios"][name] == pytest.approx(row[name] / floor)
            assert row[name] > 0


def test_bench_where_the_fast_path_is_refused(tmp_path, capsys, monkeypatch):
    # As a GPU refuses the 7B: the plain path is what there is to measure.
    monkeypatch.setattr("vidi.fast.refusal", lambda config, device: "no kernel")
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    target = tmp_path / "bench.json"
    chosen = ["--device", "cpu", "--model", "7b", "--frames", "2", "--max-new-tokens", "9", "--json", str(target)]
    assert bench.run(parser.parse_args(chosen)) == 0
    assert "no fast path: no kernel; the plain one is measured" in capsys.readouterr().out
    report = json.loads(target.read_text())
    assert report["fast"] == []
    assert [row["frames"] for row in report["plain"]] == [2]


@pytest.mark.parametrize("model", ["9b", "7b"])
def test_bench_of_a_file(model, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    film, target = make_video(tmp_path / "film.mp4", num_frames=30, sound=Sound(3.0)), tmp_path / "bench.json"
    arguments = ["--device", "cpu", "--model", model, "--max-new-tokens", "3", "--json", str(target), "--video"]
    assert bench.run(parser.parse_args([*arguments, str(film)])) == 0
    assert "second question: prefill" in capsys.readouterr().out
    report = json.loads(target.read_text())
    assert (report["video_sec"], report["reading"]) == (3.0, "parallel")
    assert all(seconds > 0 for seconds in report["seconds"].values())
    assert report["second"]["reading"] == report["second"]["encoding"] == 0
    with pytest.raises(ValueError, match=r"absent\.mp4: no such file"):
        bench.run(parser.parse_args([*arguments, str(tmp_path / "absent.mp4")]))


def test_the_fit_finds_a_line():
    fit = measure.linear_fit([1.0, 2.0, 5.0], [5.0, 8.0, 17.0])
    assert fit["base"] == pytest.approx(2)
    assert fit["slope"] == pytest.approx(3)
    assert fit["worst_relative_deviation"] < 1e-9
