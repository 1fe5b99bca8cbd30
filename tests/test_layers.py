"""Imports run one way: the picture in docs/architecture.md, held with ast, function-level imports included."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest

import sctraj

PACKAGE = Path(sctraj.__file__).parent
MAY_IMPORT = {
    "__init__": set(),
    "__main__": {"cli"},
    "cli": {"benchmark", "pl", "tl", "pp", "get", "datasets"},
    "benchmark": {"datasets", "tl", "get", "pl", "flow", "_adata"},
    "pl": {"get", "_adata"},
    "tl": {"_adata", "flow"},
    "pp": {"_adata", "flow"},
    "get": {"_adata", "flow"},
    "datasets": set(),
    "metrics": {"flow"},
    "_adata": {"flow"},
    "_log": set(),
    "_memory": set(),
    "flow": set(),
}
BY_ALL_BUT_FLOW = {"_log", "_memory", "__version__"}
OUTSIDE_FLOW = {"anndata", "pandas", "matplotlib", "scanpy", "click"}  # flow is tensors in, small records out


def violations(package: Path) -> list[str]:
    """Every import in a package that runs against the picture, as "file:line layer -> layer"."""
    found = []
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package)
        layer = inside.parts[0].removesuffix(".py")
        assert layer in MAY_IMPORT, f"{inside} belongs to no layer; say in MAY_IMPORT what it may import"
        allowed = MAY_IMPORT[layer] | {layer} | (set() if layer == "flow" else BY_ALL_BUT_FLOW)
        for node in ast.walk(ast.parse(path.read_text())):
            for target in imported(node, inside):
                first, *rest = target.split(".")
                bad = layer == "flow" and first in OUTSIDE_FLOW
                if first == "sctraj":  # `import sctraj` alone opens every layer at once
                    bad = not rest or rest[0] not in allowed
                if bad or (first == "importlib" and target != "importlib.metadata"):  # which tells versions alone
                    found.append(f"{inside}:{node.lineno} {layer} -> {target}")  # type: ignore[attr-defined]
    return found


def imported(node: ast.AST, inside: Path) -> list[str]:
    """The full names that an import statement of a file brings in; of any other node none."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    package = ["sctraj", *inside.parts[:-1]]
    start = package[: len(package) + 1 - node.level] if node.level else []
    origin = ".".join([*start, *([node.module] if node.module else [])])
    return [f"{origin}.{alias.name}" for alias in node.names] if origin == "sctraj" else [origin]


def test_imports_run_one_way():
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "line", "culprit"),
    [
        ("flow/distance.py", "from .. import _adata", "flow -> sctraj._adata"),
        ("flow/coupling/exact.py", "from ...tl import fit_flow", "flow -> sctraj.tl"),
        ("flow/distance.py", "from .._log import logger", "flow -> sctraj._log"),
        ("flow/distance.py", "import pandas as pd", "flow -> pandas"),
        ("tl/_fit_flow.py", "import sctraj.pl as pl", "tl -> sctraj.pl"),
        ("pl/_loss.py", "from sctraj import tl", "pl -> sctraj.tl"),
        ("pl/_loss.py", "from ..flow.snapshots import Snapshots", "pl -> sctraj.flow.snapshots"),
        ("_adata/cells.py", "from .. import pp", "_adata -> sctraj.pp"),
        ("get.py", "from .benchmark import run", "get -> sctraj.benchmark"),
        ("metrics.py", "import sctraj", "metrics -> sctraj"),
        ("pp/_standardize.py", "import importlib", "pp -> importlib"),
    ],
)
@pytest.mark.parametrize("planted", ["{line}\n", "def late():\n    {line}\n", "if False:\n    {line}\n"])
def test_a_planted_violation_is_found(tmp_path, file, line, culprit, planted):
    package = tmp_path / "sctraj"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    with (package / file).open("a") as source:
        source.write("\n" + planted.format(line=line))
    (found,) = violations(package)
    assert found.startswith(f"{file}:")
    assert found.endswith(f" {culprit}")


def test_a_file_of_no_layer_is_refused(tmp_path):
    (tmp_path / "utils.py").write_text("")
    with pytest.raises(AssertionError, match="no layer"):
        violations(tmp_path)
