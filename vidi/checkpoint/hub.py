"""A checkpoint by its public name: from the local Hugging Face cache, downloaded only where that is asked for."""

from __future__ import annotations

import re
from pathlib import Path

from stageparity import strict
from vidi.checkpoint.errors import CheckpointError
from vidi.checkpoint.folder import CONFIG_NAME, INDEX_NAME
from vidi.release import RELEASE as SIZES

__all__ = ["RELEASE", "resolve"]

RELEASE = "bytedance-research/Vidi1.5-9B"
#: What of a repository is read; everything else stays where it is.
FILES = (CONFIG_NAME, INDEX_NAME, "tokenizer.json", "*.safetensors")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def resolve(given: str, *, download: bool = False) -> Path:
    """The folder of a checkpoint: ``given`` itself, or what the cache holds under that public name (ORG/NAME).

    A folder that exists always wins. The cache is where huggingface_hub has it (HF_HUB_CACHE, HF_HOME). Raises
    CheckpointError that says what to type where a public name is not in the cache, or not whole.
    """
    path = Path(given)
    if not _NAME.fullmatch(given) or path.exists() or path.parent.exists():
        if download:
            raise CheckpointError("is no public name (ORG/NAME) that could be downloaded", file=given)
        return path
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(
            f"is no folder, and without huggingface_hub no public name is looked up or fetched{_size(given)}. Nothing was "
            "downloaded: pip install -e '.[hub]', or pip install huggingface_hub",
            file=given,
        ) from None
    try:
        found = Path(
            huggingface_hub.snapshot_download(given, allow_patterns=list(FILES), local_files_only=not download)
        )
    except Exception as error:  # the library's errors share no base class
        if download:
            raise CheckpointError(f"cannot be downloaded: {strict.reason(error)}", file=given) from None
        raise CheckpointError(
            _instead(given, "is neither a folder nor in the Hugging Face cache"), file=given
        ) from None
    if strict.locate(found, CONFIG_NAME, hub_cache=True) is None:
        raise CheckpointError(_instead(given, f"is in the Hugging Face cache without its {CONFIG_NAME}"), file=given)
    return found


def _instead(name: str, problem: str) -> str:
    return f"{problem}. Nothing was downloaded: add --download{_size(name)}, or run hf download {name}"


def _size(name: str) -> str:
    """What a download takes, two bytes a parameter, where that is known without asking anyone."""
    return f" (about {SIZES['facts']['parameters'] * 2 / 1e9:.0f} GB)" if name == RELEASE else ""
