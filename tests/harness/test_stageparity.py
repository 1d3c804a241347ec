"""The harness is a package of its own: it knows nothing of our model, and needs no tensor library but NumPy."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOUSE = ROOT / "stageparity"
FILES = sorted(HOUSE.rglob("*.py"))
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES]
#: Says so itself, and is loaded by no other: a model in torch asks for it.
LOADS_TORCH = "this module loads it."

# What only our model, its parts, its data and its stages are called. As words of text and as parts of identifiers.
WORDS = """
    vidi siglip whisper gemma mistral llama dattn
    vision visual image picture pixel frame video clip camera
    audio aud sound mel spectrogram waveform speech
    onion retrieve retrieval timestamp
    xattn t2v t2a t2t rope rotary llm_norm unpad indices_q cu_seqlens softcap gate_proj projector tower whisper_encoder
    image_stream audio_stream image_input audio_input pos_h pos_w pos_t space_to_depth images_u8 official_name
""".split()  # noqa: SIM905


def words(text: str) -> Iterator[tuple[int, str]]:
    """(line, word) of each word that is ours; `frames` is `frame`, and `vision_tower` holds two."""
    pattern = re.compile(rf"(?<![a-z0-9])({'|'.join(WORDS)})(?:s|es|ed|ing)?(?![a-z0-9])", re.I)
    for number, line in enumerate(text.splitlines(), 1):
        yield from ((number, found[1].lower()) for found in pattern.finditer(line))


def test_it_contains_no_word_of_ours() -> None:
    found = []
    for path in sorted(p for p in HOUSE.rglob("*") if p.suffix in (".py", ".j2", ".css", ".html")):
        name = str(path.relative_to(ROOT))
        found += [f"{name}:{n}: {word}" for n, word in words(path.read_text("utf-8"))]
    assert found == []


@pytest.mark.parametrize(
    "text",
    ["# the Vidi model", "num_frames = 3", "def image_of(x): ...", '"layer.{i}.t2v"', "rope.cos", "a clip's frames"],
)
def test_words_of_ours_are_seen(text: str) -> None:
    assert list(words(text))


@pytest.mark.parametrize("text", ["@property", "scope framework", "forms and tokens, heads, layer, logits", "improved"])
def test_words_of_everybody_are_not(text: str) -> None:
    assert not list(words(text))


def imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}


def test_it_imports_nothing_of_ours() -> None:
    ours = {path.name for path in ROOT.iterdir() if path.is_dir() and any(path.rglob("*.py"))} - {"stageparity"}
    assert {"vidi", "goldens", "tests", "tools"} <= ours
    assert {path.name: found for path in FILES if (found := imported(path) & ours)} == {}


def test_every_module_says_what_is_public() -> None:
    for name in MODULES:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        tree = ast.parse(Path(spec.origin).read_text("utf-8"))
        listed = [n for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"]
        assert listed or not [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)], (
            f"{name} has no __all__"
        )


@pytest.mark.slow
def test_torch_is_loaded_by_those_that_say_so_alone() -> None:
    """One process imports all others one by one, and tells after which one torch was there."""
    heavy = [name for name in MODULES if LOADS_TORCH in (ast.get_docstring(ast.parse(_source(name))) or "")]
    assert heavy == ["stageparity.fingerprint"]
    script = (
        "import importlib, sys\n"
        f"for name in {[name for name in MODULES if name not in heavy]}:\n"
        "    importlib.import_module(name)\n"
        "    assert not {'torch', 'vidi', 'transformers'} & set(sys.modules), name\n"
        f"importlib.import_module({heavy[0]!r}); print('torch' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert (told.stdout, told.stderr) == ("True\n", "")


def _source(name: str) -> str:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text("utf-8")
