"""Who may import whom: the rules of the house, asserted over the source of every module."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "tokprune_exp"
MODULES = {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in sorted(PACKAGE.rglob("*.py"))}

FLOORS = [
    [
        "errors",
        "precision",
        "targets",
        "data.task",
        "data.batch",
        "data.assets",
        "data.hub",
        "encoder",
        "kernels",
    ],
    ["config", "sweep", "pruning", "head", "attribution", "losses"],
    ["model", "planning"],
    ["data", "measure"],
    ["methods"],
    ["tracking", "stages", "measure.report"],
    ["build"],
    ["run", "curves", "analysis", "serving", "examples", "dashboard", "bench"],
    ["predict", "analyze"],
    ["__main__"],
]
"""From below to above; a module belongs to the longest of the names that it begins with."""

MAY_IMPORT = {
    "hydra": ["__main__", "config", "sweep", "bench.training"],
    "omegaconf": ["__main__", "config", "sweep", "build", "run"],
    "lightning": ["run", "stages", "methods", "data", "tracking", "bench.training"],
    "transformers": ["encoder.pretrained", "data"],
    "fvcore": ["measure.flops"],
}
PURE = ["pruning", "losses", "attribution", "measure.flops", "measure.sttabt_flops"]
PURE_IMPORTS = {"torch", "jaxtyping", "fvcore", *sys.stdlib_module_names}
PURE_NEIGHBOURS = [*PURE, "encoder.trace", "encoder.layout", "encoder.cost", "encoder.encoder", "errors"]


def belongs(module, rooms):
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


def floor(module):
    rooms = [(len(room), height) for height, rooms in enumerate(FLOORS) for room in rooms if belongs(module, [room])]
    assert rooms, f"{module} stands on no floor: add it to FLOORS"
    return max(rooms)[1]


def imports(module):
    """Every dotted name that a module imports; names of this package without their first part."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def outside(module):
    return {name.split(".")[0] for name in imports(module)} - {"tokprune_exp"}


def inside(module):
    """The modules of this package that a module imports from."""
    names = {name.removeprefix("tokprune_exp.") for name in imports(module) if name.startswith("tokprune_exp.")}
    known = {name.removesuffix(".__init__") for name in MODULES}
    return {name if name in known else name.rpartition(".")[0] for name in names} - {""}


@pytest.mark.parametrize("library", MAY_IMPORT)
def test_a_library_is_imported_only_where_it_belongs(library):
    strangers = [
        module for module in MODULES if library in outside(module) and not belongs(module, MAY_IMPORT[library])
    ]
    assert not strangers


@pytest.mark.parametrize("module", [module for module in MODULES if belongs(module, PURE)])
def test_the_mathematics_needs_torch_and_nothing_else(module):
    assert outside(module) <= PURE_IMPORTS
    assert [name for name in inside(module) if not belongs(name, PURE_NEIGHBOURS)] == []


@pytest.mark.parametrize("module", [module for module in MODULES if module != "__init__"])
def test_nothing_below_imports_from_above(module):
    here = floor(module.removesuffix(".__init__"))
    assert [name for name in inside(module) if floor(name) > here] == []


def test_the_command_line_starts_without_torch():
    heavy = ("torch", "lightning", "transformers", "datasets", "numpy", "pandas", "wandb")
    program = f"import sys, tokprune_exp.__main__; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert done.stdout.strip() == "[]"
