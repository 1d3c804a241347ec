"""The toy project of this folder, copied to where a test may break it, run as its user would run it."""

from __future__ import annotations

import runpy
import shutil
import sys
from pathlib import Path

import pytest

__all__ = ["TOY", "Project"]

TOY = Path(__file__).with_name("toy")


class Project:
    """A copy of the toy beside pytester's other files. edit before anything runs: code references remember source files."""

    def __init__(self, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pytester, self.monkeypatch, self.toy = pytester, monkeypatch, pytester.path / "toy"
        shutil.copytree(TOY, self.toy, ignore=shutil.ignore_patterns("__pycache__"))
        # The plugin of the run around this one is already imported.
        pytester.makeini(
            "[pytest]\npythonpath = .\nfilterwarnings =\n    error\n"
            "    ignore:Module already imported:pytest.PytestAssertRewriteWarning\n"
        )
        monkeypatch.syspath_prepend(pytester.path)
        # No plugin of this machine takes part; what each run needs it names.
        monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")

    def edit(self, file: str, old: str, new: str) -> None:
        path = self.toy / file
        text = path.read_text("utf-8")
        assert text.count(old) == 1, f"{file} holds {old!r} {text.count(old)} times"
        path.write_text(text.replace(old, new), "utf-8")

    def python(self, module: str, *arguments: str) -> int:
        """`python -m MODULE ARGUMENTS`, in this process; its exit status."""
        self.monkeypatch.setattr(sys, "argv", [module, *arguments])
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
        finally:
            for name in [name for name in sys.modules if name.split(".")[0] == "toy"]:
                del sys.modules[name]
        return 0

    def pytest(self, *arguments: str | Path) -> pytest.RunResult:
        return self.pytester.runpytest_inprocess("-p", "stageparity.plugin", *arguments)
