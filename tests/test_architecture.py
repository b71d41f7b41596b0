"""The three packages and the arrows between them: ramcore <- study, ramcore <- analysis; importing has no effect."""

from __future__ import annotations

import ast
import graphlib
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("ramcore", "study", "analysis")
HEAVY = ("ray", "optuna", "mlflow", "pandas", "jinja2", "tyro", "matplotlib", "study", "analysis")

# Plain data that more than one package reads.
SHARED_BY_STUDY = ("study.designs", "study.moved", "study.schema", "study.search_space")
SHARED_BY_RAMCORE = (
    "ramcore.config",
    "ramcore.cost",
    "ramcore.errors",
    "ramcore.private",
    "ramcore.published",
    "ramcore.recipes",
    "ramcore.space",
)
NOT_IN_PLAIN_DATA = {"ray", "optuna", "torch", "mlflow", "pandas", "scipy"}

PUT_OFF = {"ray", "mlflow", "torch"}  # the only packages that an import inside a function may put off
PUT_OFF_WITH_A_MODULE = {*PUT_OFF, "optuna", "pyarrow"}  # an import of the project's own modules may also put off these


class Import(NamedTuple):
    """One imported name, and where its statement stands."""

    name: str  # module, or module.attribute
    line: int
    in_function: bool
    for_types: bool  # under `if TYPE_CHECKING:`
    explained: bool  # a comment stands on the line, or on the line above the block of imports


def module_names(package: str) -> list[str]:
    return sorted(f"{package}.{path.stem}" for path in (ROOT / package).glob("*.py") if path.stem != "__init__")


PROJECT = {*PACKAGES, *itertools.chain.from_iterable(module_names(package) for package in PACKAGES)}


def path_of(module: str) -> Path:
    folder = ROOT.joinpath(*module.split("."))
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")


def imports_of(module: str) -> list[Import]:
    """Every import statement of a module, also those inside functions and for type checkers."""
    text = path_of(module).read_text()
    lines = text.splitlines()
    tree = ast.parse(text)
    statements = {node.lineno for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)}

    def explained(node: ast.Import | ast.ImportFrom) -> bool:
        if "#" in lines[node.lineno - 1] or "#" in lines[(node.end_lineno or node.lineno) - 1]:
            return True
        first = node.lineno
        while first - 1 in statements or not lines[first - 2].strip():  # up to the first line of the block
            first -= 1
        above = lines[first - 2].strip()
        return above.startswith("#") or (above.startswith("try:") and "#" in above)

    def found_in(node: ast.AST, in_function: bool, for_types: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            names: list[str] = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{module}:{child.lineno}: a relative import"
                names = [f"{child.module}.{alias.name}" for alias in child.names]
            if names:
                assert isinstance(child, ast.Import | ast.ImportFrom)
                for name in names:
                    yield Import(name, child.lineno, in_function, for_types, explained(child))
                continue
            inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            types = for_types or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
            yield from found_in(child, inside, types)

    return list(found_in(tree, False, False))


def project_module(name: str) -> str | None:
    """The project's module that an imported name is or belongs to."""
    parts = name.split(".")
    return next((m for n in range(len(parts), 0, -1) if (m := ".".join(parts[:n])) in PROJECT), None)


IMPORTS = {module: imports_of(module) for module in sorted(PROJECT)}


def brings(module: str, seen: frozenset[str] = frozenset()) -> set[str]:
    """Packages that importing a module imports at once: those at module level, also through the project's modules."""
    found: set[str] = set()
    for item in IMPORTS[module]:
        if item.in_function or item.for_types:
            continue
        inner = project_module(item.name)
        if inner is None:
            found.add(item.name.partition(".")[0])
        elif inner not in seen:
            found |= brings(inner, seen | {module})
    return found


def loaded_by(*names: str) -> set[str]:
    """All modules that are loaded once these are imported, in a fresh Python."""
    program = f"import sys; import {', '.join(names)}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_ramcore_needs_torch_and_numpy_only_but_for_its_command_and_its_pictures():
    core = [m for m in module_names("ramcore") if m not in ("ramcore.train", "ramcore.pictures")]
    assert not {m.partition(".")[0] for m in loaded_by(*core)} & set(HEAVY)
    assert "matplotlib" in brings("ramcore.pictures")


def test_object_stores_are_loaded_only_for_a_study_in_one():
    assert not loaded_by("study.prepare", "study.cancel") & {"boto3", "pyarrow.fs"}


@pytest.mark.parametrize(
    ("package", "may_import"),
    [("ramcore", {"ramcore"}), ("study", {"study", "ramcore"}), ("analysis", {"analysis", "ramcore"})],
)
def test_packages_import_only_what_lies_below_them(package, may_import):
    allowed = may_import | (set(SHARED_BY_STUDY) if package == "analysis" else set())
    wrong = [
        f"{module}:{item.line} imports {inner}"
        for module in [package, *module_names(package)]
        for item in IMPORTS[module]
        if (inner := project_module(item.name)) and not {inner, inner.partition(".")[0]} & allowed
    ]
    assert not wrong


def test_analysis_knows_no_ray():
    assert not [m for m in module_names("analysis") if any(i.name.split(".")[0] == "ray" for i in IMPORTS[m])]


@pytest.mark.parametrize("module", [*SHARED_BY_STUDY, *SHARED_BY_RAMCORE])
def test_shared_plain_data_brings_no_heavy_package(module):
    assert not loaded_by(module) & NOT_IN_PLAIN_DATA


def test_sensitivity_loads_plain_data_alone_of_ramcore_and_study():
    loaded = loaded_by("analysis.sensitivity")
    below = {m for m in loaded & PROJECT if m.startswith(("ramcore.", "study."))}
    assert "ray" not in loaded
    assert below <= {*SHARED_BY_STUDY, *SHARED_BY_RAMCORE}


def test_first_line_of_a_study_comes_before_what_takes_long_to_import():
    program = """
import sys
from study import run
from study.flags import parse
def first(text):
    print(text, *sys.modules)
    sys.exit()
run.status = first
run.main(parse(["--data", "digits", "--range", "num_scales=1:3"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    said, *loaded = done.stdout.split()
    assert said == "starting", done.stderr
    assert not set(loaded) & {*PUT_OFF_WITH_A_MODULE, "boto3", "scipy", "pandas", "sklearn", "matplotlib", "requests"}


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: {project_module(item.name) for item in IMPORTS[module]} - {None, module} for module in PROJECT}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_imports_inside_functions_put_off_ray_mlflow_or_torch():
    wrong = []
    for module, items in IMPORTS.items():
        if module == "study.probe":  # runs on nodes that may lack any package
            continue
        for item in (i for i in items if i.in_function):
            inner = project_module(item.name)
            fine = brings(inner) & PUT_OFF_WITH_A_MODULE if inner else item.name.partition(".")[0] in PUT_OFF
            if not fine:
                wrong.append(f"{module}:{item.line} {item.name}")
    assert not wrong


def test_imports_inside_functions_carry_a_comment():
    assert not [
        f"{m}:{i.line} {i.name}" for m, items in IMPORTS.items() for i in items if i.in_function and not i.explained
    ]


def test_importing_prints_and_writes_nothing(tmp_path):
    names = ", ".join(module for package in PACKAGES for module in module_names(package))
    run = subprocess.run(
        [sys.executable, "-c", f"import {names}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == []  # libraries may keep hidden caches


def test_files_in_the_readme_tree_exist():
    tree = (ROOT / "README.md").read_text().split("```")[1]
    package = ""
    for line in tree.strip().splitlines():
        if not line.startswith(" "):
            package = line.split()[0].rstrip("/") if line.split()[0].rstrip("/") in (*PACKAGES, "tests") else ""
        for name in re.findall(r"[a-z_0-9]+\.py", line):
            assert (ROOT / package / name).is_file(), f"{package}/{name}"


@pytest.mark.parametrize("page", ["README.md", "CLUSTER.md", "results/README.md", "results/LOG.md"])
def test_links_and_pictures_of_a_page_exist(page):
    text = (ROOT / page).read_text()
    targets = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    assert not [t for t in targets if not t.startswith("http") and not (ROOT / page).parent.joinpath(t).exists()]


def test_readme_lists_every_exit_code():
    found = re.findall(r"^[A-Z_]+ = (\d{1,3})(?:  #|$)", path_of("study.flags").read_text(), re.MULTILINE)
    codes = {*found, "129", "130", "143"}
    rows = re.findall(r"^\| ([\d, ]+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    listed = {code for row in rows for code in row.split(", ")}
    assert {"0", "1", "2", "3", "4", "75"} <= codes <= listed
