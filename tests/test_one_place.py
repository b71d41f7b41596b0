"""A task, a design and a hyperparameter are each added in one place: the tests add one to a copy of the code."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

TASKS = "TASKS: dict[str, TaskSpec] = {\n"
NEW_TASK = '    "translated-80": TaskSpec(canvas_size=80, num_clutter=0),\n'

DESIGNS = "DESIGNS: dict[str, Design] = {\n"
NEW_DESIGN = """\
    "mine": Design(
        summary="the base configuration, alone",
        epochs=2,
        seeds_per_trial=1,
        report="tables",
        rows=lambda inputs: [TrialSpec(config=inputs.base, origin="mine", row="the base", seeds=inputs.seeds)],
    ),
"""

FIELDS = "    # The optimisation.\n"
NEW_FIELD = "    weight_decay: Annotated[float, Between(0)] = 1e-4  # of Adam\n"
DIMENSIONS = "    dimensions = (\n"
NEW_DIMENSION = """\
        Dimension(name="weight_decay", type="float", low=1e-6, high=1e-2, log=True, unit="per step", reason="a guess"),
"""


@pytest.fixture
def code(tmp_path) -> Path:
    """A folder with a copy of the code."""
    for package in ("ramcore", "study", "analysis"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def insert(path: Path, after: str, text: str) -> None:
    """Put text behind the one place in a file where `after` stands."""
    content = path.read_text()
    assert content.count(after) == 1, f"{path.name} says {after!r} {content.count(after)} times"
    path.write_text(content.replace(after, after + text))


def run(code: Path, command: str) -> str:
    """What a command of the copied code prints."""
    done = subprocess.run(
        [sys.executable, "-m", *command.split()],
        capture_output=True,
        text=True,
        cwd=code,
        env=os.environ | {"PYTHONPATH": str(code), "COLUMNS": "200", "TERM": "dumb"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_one_line_in_tasks_makes_a_task_that_is_planned_and_trained(code):
    insert(code / "ramcore" / "config.py", TASKS, NEW_TASK)
    task = "--task translated-80 --data digits"
    assert "translated-80" in run(code, "study.run --help")
    plan = run(code, f"study.run {task} --trials 2 --seeds-per-trial 1 --dry-run")
    assert "Study translated-80-digits-search: new" in plan
    small = "--num-glimpses 2 --num-scales 2 --glimpse-size 16 --hidden-size 16 --batch-size 100 --epochs 1"
    printed = run(code, f"ramcore.train {task} {small} --threads 1")
    assert "ram on translated-80 digits" in printed
    assert "seed 0: validation" in printed


def test_one_record_in_designs_makes_a_design_that_is_planned(code):
    insert(code / "study" / "designs.py", DESIGNS, NEW_DESIGN)
    shown = run(code, "study.run --help")
    assert "mine" in shown and "the base configuration, alone" in shown
    plan = run(code, "study.run --design mine --task original --data digits --dry-run")
    assert "Study original-digits-mine: new" in plan
    assert "design     mine; 2 epochs, 1 seeds a trial" in plan


def test_a_field_and_its_range_make_a_searched_hyperparameter(code):
    insert(code / "ramcore" / "config.py", FIELDS, NEW_FIELD)
    insert(code / "study" / "search_space.py", DIMENSIONS, NEW_DIMENSION)
    plan = run(code, "study.run --task original --data digits --trials 2 --seeds-per-trial 1 --dry-run")
    assert "weight_decay" in plan and "1e-06 to 0.01, in logarithms (per step): a guess" in plan
