"""Modules import only downward, heavy libraries have one door each, and no file can run code."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "labutils"
MODULES = sorted(PACKAGE.glob("*.py"))

# The lowest floor first. A module may import what stands below it, or before it on its own floor.
FLOORS = """
__init__ claims codebooks kernels readahead scratch moe decoding meter languages anatomy targets
speeds formats flips offload speculative
outliers calibrated recipes budget ledger planner allocation
experts checkpoints standin evaluate damage shaker engines export sweeps
style
memory_chart
figures layer_figures format_figures cost_figures rounding_figures flip_figures shaker_figures
recipe_figures plan_figures speed_figures
apps
cli
__main__
"""
ORDER = FLOORS.split()
FIGURES = {name for name in ORDER if name.endswith("figures")}

DOORS = {
    "plotly": {"style", "memory_chart"} | FIGURES,
    "ipywidgets": {"apps"},
    "psutil": {"meter"},
    "pynvml": {"meter"},
    "bitsandbytes": {"experts"},
    "compressed_tensors": {"export"},
    "joblib": {"sweeps"},
    "transformers": {"decoding", "experts", "checkpoints", "standin", "budget"},
}


def imports(tree: ast.AST) -> Iterator[str]:
    """Every dotted name that a module imports, inside functions too: `labutils.moe`, `torch.nn`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = ".".join(filter(None, ["labutils" if node.level else "", node.module]))
            yield from (f"{source}.{alias.name}" for alias in node.names)


def test_every_module_has_a_floor() -> None:
    """A floor may be planned before its module is built; a module never stands outside."""
    assert {module.stem for module in MODULES} <= set(ORDER)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.stem)
def test_imports_go_downward(module: Path) -> None:
    names = {name for name in imports(ast.parse(module.read_text())) if name.startswith("labutils")}
    others = {name.split(".")[1] for name in names if "." in name} & set(ORDER)
    wrong = others - set(ORDER[: ORDER.index(module.stem)])
    assert not wrong, f"{module.stem} imports {wrong}, which does not stand before it"


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.stem)
def test_heavy_libraries_come_in_by_their_door(module: Path) -> None:
    used = {name.split(".")[0] for name in imports(ast.parse(module.read_text()))} & set(DOORS)
    wrong = {library for library in used if module.stem not in DOORS[library]}
    assert not wrong, f"{module.stem} imports {wrong}, the business of {[DOORS[x] for x in wrong]}"


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.stem)
def test_no_file_can_run_code(module: Path) -> None:
    """A checkpoint is data: never a pickle, never code that its author sends along."""
    tree = ast.parse(module.read_text())
    assert not {"pickle", "dill"} & {name.split(".")[0] for name in imports(tree)}
    unpickling = {"torch.load", "joblib.load"}
    assert not unpickling & set(imports(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in unpickling
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert ast.unparse(node.value) == "False"
