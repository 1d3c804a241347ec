"""A public name: from the cache, downloaded only on demand, and what is said otherwise. No network is touched."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest

from vidi.checkpoint import hub
from vidi.checkpoint.errors import CheckpointError
from vidi.cli import main


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def filled(cache: Path, tiny_folder: Path) -> Path:
    """The tiny checkpoint as the cache lays out the release: snapshots of links into blobs. Returns the snapshot."""
    repository = cache / "models--bytedance-research--Vidi1.5-9B"
    snapshot = repository / "snapshots" / "0123abc"
    for place in (repository / "blobs", repository / "refs", snapshot):
        place.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abc")
    for number, path in enumerate(sorted(tiny_folder.iterdir())):
        blob = repository / "blobs" / f"{number:064x}"
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def test_the_cache_is_read(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hub.resolve(hub.RELEASE) == filled
    assert main(["inspect", hub.RELEASE]) == 0
    assert "fits" in capsys.readouterr().out


def test_what_is_not_there_is_not_downloaded(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = (
        "bytedance-research/Vidi1.5-9B: is neither a folder nor in the Hugging Face cache. Nothing was downloaded: "
        "add --download (about 21 GB), or run hf download bytedance-research/Vidi1.5-9B"
    )
    with pytest.raises(CheckpointError) as refused:
        hub.resolve(hub.RELEASE)
    assert str(refused.value) == said
    assert main(["inspect", hub.RELEASE]) == 2
    assert said in capsys.readouterr().err
    assert not cache.exists()


def test_half_a_download_is_named(filled: Path) -> None:
    (filled / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"without its config\.json\. Nothing was downloaded: add --download"):
        hub.resolve(hub.RELEASE)


def _stub(monkeypatch: pytest.MonkeyPatch, answer: Callable[..., str]) -> list[dict[str, Any]]:
    asked: list[dict[str, Any]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        return answer()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_download(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _stub(monkeypatch, lambda: str(filled))
    assert hub.resolve(hub.RELEASE, download=True) == filled
    assert asked[0]["local_files_only"] is False
    assert "*.safetensors" in asked[0]["allow_patterns"]
    assert not any(pattern in ("*", "*.py", "*.bin") for pattern in asked[0]["allow_patterns"])


def test_a_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise RuntimeError("401 Client Error\x1b[2J\nand much more")

    _stub(monkeypatch, fail)
    with pytest.raises(CheckpointError, match=r"cannot be downloaded: 401 Client Error\\x1b\[2J$"):
        hub.resolve(hub.RELEASE, download=True)


def test_folders_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _stub(monkeypatch, lambda: "nowhere")
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("org/name") == Path("org/name")
    assert hub.resolve("org/typo") == Path("org/typo")
    for path in ("folder", "/a/b", "./a/b", "a/b/c", "../a/b", "a\x1b/b"):
        assert hub.resolve(path) == Path(path)
    assert asked == []
    with pytest.raises(CheckpointError, match="is no public name"):
        hub.resolve("folder", download=True)


@pytest.mark.parametrize("download", [[], ["--download"]])
@pytest.mark.parametrize("command", [["inspect"], ["retrieve", "film.mp4", "a car", "--checkpoint"]])
def test_without_the_library(
    command: list[str], download: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    Path("film.mp4").touch()
    for name, size in ((hub.RELEASE, " (about 21 GB)"), ("someone/else", "")):
        assert main([*command, name, *download]) == 2
        said = f"{name}: is no folder, and without huggingface_hub no public name is looked up or fetched{size}. "
        said += "Nothing was downloaded: pip install -e '.[hub]', or pip install huggingface_hub\n"
        assert capsys.readouterr().err.endswith(f": {said}")
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]
