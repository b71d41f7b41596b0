"""The rooms and the arrows between them: study -> ramcore; analysis stands alone; importing has no effect."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("ray", "optuna", "mlflow", "pandas", "seaborn", "tyro", "matplotlib", "study", "analysis")


def modules(package: str) -> list[str]:
    return sorted(f"{package}.{path.stem}" for path in (ROOT / package).glob("*.py") if path.stem != "__init__")


def imported_by(*names: str) -> set[str]:
    program = f"import sys; import {', '.join(names)}; print(*{{m.partition('.')[0] for m in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(run.stdout.split())


def test_ramcore_needs_torch_and_numpy_only():
    core = [m for m in modules("ramcore") if m != "ramcore.cli"]
    assert not imported_by(*core) & set(HEAVY)


@pytest.mark.parametrize(("package", "forbidden"), [("analysis", {"ray", "study"}), ("study", {"analysis"})])
def test_rooms_do_not_import_each_other(package, forbidden):
    for path in (ROOT / package).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert not {n.partition(".")[0] for n in names} & forbidden, path


def test_sensitivity_runs_without_ray_study_and_ramcore():
    assert not imported_by("analysis.sensitivity") & {"ray", "study", "ramcore"}


def test_importing_prints_and_writes_nothing(tmp_path):
    names = ", ".join([*modules("ramcore"), *modules("study"), *modules("analysis")])
    run = subprocess.run(
        [sys.executable, "-c", f"import {names}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    assert run.stdout == "" and run.stderr == ""
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == []  # libraries may keep hidden caches
