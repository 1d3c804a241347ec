"""Who may import whom, what loads torch, who writes goldens, and where official names stand."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Harness modules that read and judge files: usable on a machine without torch.
LIGHT = ["vidi", "vidi.cli", "vidi.parity", "vidi.attention", "vidi.bridge", "vidi.checkpoint", "vidi.commands"]
LIGHT += ["vidi.decoder", "vidi.inputs", "vidi.towers"]
LIGHT += [f"vidi.commands.{name}" for name in ("bench", "parity", "retrieve")]
LIGHT += ["vidi.parity.stages", "vidi.parity.goldens"]
LIGHT += ["goldens.oracle", "goldens.recipes"]


def files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports(path: Path) -> tuple[tuple[str, bool], ...]:
    """(module, whether it is imported at load time rather than in a function or for types only) of a file."""
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])

    def walk(node: ast.AST, top: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            here = top and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                here = False
            if isinstance(child, ast.Import):
                yield from ((alias.name, here) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parents = package.split(".")[: len(package.split(".")) - child.level + 1]
                    base = ".".join([*parents, base] if base else parents)
                yield base, here
                yield from ((f"{base}.{alias.name}", here) for alias in child.names)
            else:
                yield from walk(child, here)

    return tuple(walk(parsed(path), True))


def test_the_model_never_imports_the_harness():
    """`vidi.commands` starts runs of both, `vidi.parity` may import the model, nothing else the harness but what opens and
    writes files of anyone."""
    free = ("vidi/parity/", "vidi/commands/")
    files_of_anyone = {("stageparity", name) for name in ("atomic", "strict")}
    assert [
        (str(path.relative_to(ROOT)), name)
        for path in files("vidi")
        if not str(path.relative_to(ROOT)).startswith(free)
        for name, _ in imports(path)
        if name.split(".")[:2] in (["vidi", "parity"], ["vidi", "commands"])
        or (name.startswith("stageparity.") and tuple(name.split(".")[:2]) not in files_of_anyone)
    ] == []


def test_the_oracle_imports_numpy_and_itself_only():
    allowed = {"numpy", "goldens", *sys.stdlib_module_names}
    found = {(path.name, name) for path in files("goldens") for name, _ in imports(path)}
    assert found
    assert {(file, name) for file, name in found if name.split(".")[0] not in allowed} == set()


def test_the_package_imports_neither_tests_nor_tools_nor_goldens():
    found = {(path.name, name) for path in files("vidi", "stageparity") for name, _ in imports(path)}
    assert {f for f in found if f[1].split(".")[0] in ("tests", "tools", "goldens")} == set()


def test_nothing_but_the_oracle_and_its_tests_reads_the_oracle():
    """The oracle is a second opinion only as long as nobody else computes with it."""
    found = {str(path.relative_to(ROOT)) for path in files("vidi") for name, _ in imports(path) if "oracle" in name}
    assert found == set()


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_neither_torch_nor_the_model(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'vidi.model', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


WRITES = re.compile(
    r"\b(write_text|write_bytes|open\([^)]*[\"'][wax]b?\+?[\"']|to_file|save_file|h5py\.File\([^)]*[\"'][wa])"
)


def test_only_the_writer_and_the_ledger_write_goldens_and_only_tools_call_them():
    """Writing is in `stageparity.writer` and `ledger`; the packages themselves never call what is in there."""
    callers = {
        str(path.relative_to(ROOT))
        for path in files("vidi", "goldens")
        for name, _ in imports(path)
        if name in ("stageparity.writer",) or name.startswith("stageparity.writer.")
    }
    # A golden of the full size is written where the caller says, by the command that makes it.
    assert callers <= {"vidi/parity/full.py"}
    assert not [p for p in files("goldens") if WRITES.search(p.read_text(encoding="utf-8"))]
    appends = [p for p in files("vidi") if re.search(r"ledger\.append\(", p.read_text(encoding="utf-8"))]
    assert appends == []


# ---- one way to write ----------------------------------------------------------------------------------------------------

# A file that must not be lost half-way goes through `stageparity.atomic`. What writes otherwise, and why:
WRITERS = {
    "stageparity/atomic.py": "the helper itself",
    "vidi/checkpoint/save.py": "shards inside a draft folder of the helper's",
    "stageparity/port/stagetrace.py": "runs where nothing of ours can be imported",
    "tools/studies/log.py": "a line is appended for each finished piece, and half a line is passed over",
}
OWN_WAYS = {"os": {"replace", "rename", "renames", "link"}, "shutil": {"move", "copy", "copy2", "copyfile"}}


def own_writes(path: Path) -> list[str]:
    """What a file calls that creates, renames or replaces a file, past `atomic`."""
    found = []
    for node in ast.walk(parsed(path)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        modes = [x.value for x in (*node.args, *(k.value for k in node.keywords)) if isinstance(x, ast.Constant)]
        writes = any(isinstance(mode, str) and re.fullmatch(r"[wax]b?\+?|r\+b?", mode) for mode in modes)
        if (
            (
                name in ("write_text", "write_bytes", "rename", "replace", "symlink_to")
                and owner != "atomic"
                and path_like(node, name)
            )
            or name in OWN_WAYS.get(owner, ())
            or (name == "open" and owner != "av" and (writes or "O_CREAT" in ast.unparse(node)))
            or name in ("save_file", "renameat2", "renamex_np", "savez")
        ):
            found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {owner}.{name}")
    return found


def path_like(node: ast.Call, name: str) -> bool:
    """`replace` and `rename` of a path take one argument; of a text two."""
    return name not in ("rename", "replace") or (len(node.args) == 1 and not node.keywords)


def test_everything_that_is_written_goes_through_the_one_helper() -> None:
    places = [path for path in files("vidi", "stageparity", "tools", "bench")]
    found = {path.relative_to(ROOT).as_posix(): own_writes(path) for path in places}
    wrong = {name: calls for name, calls in found.items() if calls and name not in WRITERS}
    assert wrong == {}
    assert [name for name in WRITERS if not found[name]] == [], "these write no more: take them out of the list"


def test_the_check_of_writing_sees_each_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    for number, text in enumerate(
        ["p.write_text('x')", "os.replace(a, b)", "open(p, 'w')", "p.open('ab')", "p.rename(q)", "libc.renameat2(1)"]
    ):
        planted = tmp_path / f"planted_{number}.py"
        planted.write_text(text, "utf-8")
        assert own_writes(planted), text
    honest = tmp_path / "honest.py"
    honest.write_text("atomic.write_text(p, t); t.replace('a', 'b'); open(p); dataclasses.replace(a, b=1)", "utf-8")
    assert own_writes(honest) == []


# ---- rooms and floors ------------------------------------------------------------------------------------------------------

# A room may import its own floor's rooms and those above it in this list, never one below.
FLOORS = (
    ("stageparity",),
    (
        *(
            "vidi.precision",
            "vidi.tap",
            "vidi.stream",
            "vidi.device",
            "vidi.official",
            "vidi.official_7b",
            "vidi.release",
        ),
        "vidi.costs",
        "vidi.parser",
    ),
    ("vidi.config", "vidi.loss", "vidi.attention"),
    ("vidi.sizes_7b", "vidi.inputs", "vidi.towers", "vidi.cache"),
    ("vidi.bridge", "vidi.decoder"),
    ("vidi.model",),
    ("vidi.generate", "vidi.checkpoint", "vidi.fast"),
    ("vidi.retrieval", "vidi.parity"),
    ("vidi.commands",),
    ("vidi.cli", "vidi.__main__"),
    ("tools",),
)


def graph(*folders: str) -> dict[str, set[str]]:
    """Module -> the modules of these folders that it imports, also in functions and for types."""
    names = {
        path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in files(*folders)
    }
    known = set(names.values())
    found: dict[str, set[str]] = {}
    for path, name in names.items():
        asked = {imported for imported, _ in imports(path)}
        # `from package import module` names both; the package itself is meant where no module is.
        asked -= {n.rpartition(".")[0] for n in asked if n in known and path.name != "__init__.py"} - exports(
            path, known
        )
        found[name] = asked & known - {name}
    return found


def exports(path: Path, known: set[str]) -> set[str]:
    """Packages from which a file imports a name that is no module."""
    tree = parsed(path)
    return {
        n.module
        for n in ast.walk(tree)
        if isinstance(n, ast.ImportFrom) and n.module and any(f"{n.module}.{a.name}" not in known for a in n.names)
    }


def circles(imported: dict[str, set[str]]) -> list[str]:
    """Modules that reach themselves."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = list(imported[start])
        while ahead:
            name = ahead.pop()
            if name not in seen:
                seen.add(name)
                ahead += imported[name]
        return seen

    return sorted(name for name in imported if name in reached(name))


def room(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "vidi" else parts[0]


def test_no_circle_between_modules_not_even_a_lazy_one() -> None:
    assert circles(graph("vidi", "stageparity", "tools")) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]


def test_no_import_runs_from_a_lower_floor_up() -> None:
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    imported = graph("vidi", "stageparity", "tools")
    rooms = {room(module) for module in imported} - {"vidi"}
    assert rooms == set(floor), "a new room needs a floor, and one that is gone has none"
    pairs = {(room(a), room(b)) for a, found in imported.items() for b in found} - {("vidi", "vidi")}
    assert sorted((a, b) for a, b in pairs if "vidi" not in (a, b) and floor[a] < floor[b]) == []


def test_no_room_holds_a_quarter_of_the_lines() -> None:
    lines: dict[str, int] = {}
    for path in files("vidi", "stageparity", "tools"):
        inside = path.relative_to(ROOT).with_suffix("").parts
        name = (
            ".".join(inside[:2]) if len(inside) > 2 else room(".".join(inside))
        )  # a folder of a package is a room of its own
        lines[name] = lines.get(name, 0) + path.read_text("utf-8").count("\n")
    largest = max(lines, key=lambda name: lines[name])
    assert lines[largest] < 0.25 * sum(lines.values()), (
        f"{largest} holds {lines[largest]} of {sum(lines.values())} lines"
    )


# Names as in a released checkpoint. Model code speaks of its own.
OFFICIAL = re.compile(r"model\.(layers|embed_tokens|mm_)|_layernorm\b|\b[qkvo]_proj\b|self_attn\b|mm_rand_|lm_head\.")
MAY_NAME = ("vidi/checkpoint/names.py", "vidi/checkpoint/explain.py")


def test_official_names_stand_in_one_place():
    """In code, that is: docstrings and comments may say what a name means."""
    found = []
    for path in files("vidi"):
        place = str(path.relative_to(ROOT))
        if place.startswith(MAY_NAME):
            continue
        tree = parsed(path)
        docs = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) and id(node) not in docs else None
            if isinstance(text, str) and OFFICIAL.search(text):
                found.append(f"{place}:{node.lineno}: {text[:60]}")
    assert found == []


def test_every_module_says_what_it_exports():
    """`__all__` in every module with code, and every name in it exists."""
    missing, wrong = [], []
    for path in files("vidi", "stageparity", "goldens"):
        tree = parsed(path)
        defines = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        names = [
            n
            for n in tree.body
            if isinstance(n, ast.Assign | ast.AugAssign)
            and "__all__" in ast.dump(n.targets[0] if isinstance(n, ast.Assign) else n.target)
        ]
        # Modules of faults export nothing: what they define registers itself.
        if defines and not names and "parity/faults/" not in str(path):
            missing.append(str(path.relative_to(ROOT)))
        exported = {c.value for n in names for c in ast.walk(n.value) if isinstance(c, ast.Constant)}
        known = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        known |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        bound = {
            a.asname or a.name for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names
        }
        if lost := exported - known - bound:
            wrong.append((str(path.relative_to(ROOT)), lost))
    assert missing == []
    assert wrong == []


def test_no_drawer_for_everything():
    assert [
        p.name
        for p in files("vidi", "stageparity", "goldens", "tests", "tools")
        if p.stem in ("utils", "common", "helpers")
    ] == []


@pytest.mark.parametrize("folder", ["vidi", "stageparity", "goldens", "tests", "tools"])
def test_skips_go_through_not_run(folder):
    """A test that cannot run says so through `tests.not_run`; the run itself checks this too (`test_tiers.py`)."""
    direct = re.compile(r"pytest\.(skip\(|xfail|importorskip)|mark\.(skip|xfail)")
    allowed = {"test_tiers.py", "test_plugin.py", "test_architecture.py"}  # tests of the runs that skip
    found = [p.name for p in files(folder) if p.name not in allowed and direct.search(p.read_text(encoding="utf-8"))]
    assert found == []
