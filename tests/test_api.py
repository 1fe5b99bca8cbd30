"""The contract of every public function, read from its signature and docstring, and lazy loading."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import sctraj
from sctraj import datasets, get, metrics, pl, pp, tl

PUBLIC: dict[str, Callable[..., object]] = {
    f"{module.__name__.removeprefix('sctraj.')}.{name}": getattr(module, name)
    for module in (pp, tl, pl, get, datasets, metrics)
    for name in module.__all__
}
HEAVY = {"torch", "ot", "scanpy", "matplotlib", "anndata", "pandas", "sklearn", "scipy", "numpy"}


def sections(function: Callable[..., object]) -> dict[str, str]:
    """The numpydoc sections of a docstring by their titles."""
    doc = inspect.getdoc(function) or ""
    parts = re.split(r"^(\w[\w ]*)\n-{3,}\n", doc, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


def parameters(function: Callable[..., object]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", PUBLIC)
def test_at_most_three_arguments_are_positional_and_none_is_anonymous(name):
    kinds = [one.kind for one in parameters(PUBLIC[name]).values()]
    assert kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD) <= 3
    assert set(kinds) <= {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("name", PUBLIC)
def test_everything_is_annotated(name):
    signature = inspect.signature(PUBLIC[name])
    bare = [one.name for one in signature.parameters.values() if one.annotation is one.empty]
    assert bare == []
    assert signature.return_annotation is not signature.empty


@pytest.mark.parametrize("name", PUBLIC)
def test_the_docstring_has_every_parameter_in_order_and_what_comes_back(name):
    function = PUBLIC[name]
    found = sections(function)
    entries = re.findall(r"^(\S.*)$", found.get("Parameters", ""), re.M)
    documented = [one.strip() for entry in entries for one in entry.split(":")[0].split(",")]
    assert documented == list(parameters(function))
    # of a single number the summary line says which it is
    assert "Returns" in found or inspect.signature(function).return_annotation in ("None", "float")
    first = (inspect.getdoc(function) or "").splitlines()[0]
    assert first.endswith((".", ":"))


@pytest.mark.parametrize("name", PUBLIC)
def test_defaults_are_values_that_nobody_can_change(name):
    changeable = [one.name for one in parameters(PUBLIC[name]).values() if isinstance(one.default, (list, dict, set))]
    assert changeable == []


@pytest.mark.parametrize("name", [name for name in PUBLIC if name.startswith(("pp.", "tl.")) and "interp" not in name])
def test_verbs_write_into_their_argument_unless_asked_for_a_copy(name):
    copy = parameters(PUBLIC[name])["copy"]
    assert copy.default is False
    assert inspect.signature(PUBLIC[name]).return_annotation == "AnnData | None"


@pytest.mark.parametrize("name", [name for name in PUBLIC if name.startswith("pl.")])
def test_plots_take_axes_and_return_axes(name):
    assert parameters(PUBLIC[name])["ax"].default is None
    assert inspect.signature(PUBLIC[name]).return_annotation == "Axes"


def test_what_fit_and_leave_one_out_share_has_one_default():
    fit, judge = parameters(tl.fit_flow), parameters(tl.leave_one_out)
    shared = fit.keys() & judge.keys()
    assert shared >= {"time_key", "use_rep", "sigma", "width", "depth", "n_steps", "batch_size", "learning_rate", "rng"}
    assert {name: fit[name].default for name in shared} == {name: judge[name].default for name in shared}
    assert {name: fit[name].annotation for name in shared} == {name: judge[name].annotation for name in shared}


def test_the_key_is_the_same_everywhere():
    found = {one[name].default for one in map(parameters, PUBLIC.values()) for name in ("key",) if name in one}
    assert "flow" in found
    assert found <= {"flow", inspect.Parameter.empty}  # pp.parse_time's key is a column
    assert parameters(tl.fit_flow)["key_added"].default == "flow"


def test_every_name_resolves():
    for name in sctraj.__all__:
        assert getattr(sctraj, name) is not None
    assert {*sctraj.__all__} <= {*dir(sctraj), "__version__"}


def test_every_subpackage_of_the_reference_is_there_after_import_sctraj():
    reference = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
    named = set(re.findall(r"^\.\. auto\w+:: sctraj\.([a-z]\w*)\.", reference, re.M))
    assert "benchmark" in named
    code = f"import sctraj; print(*(getattr(sctraj, name).__name__ for name in {sorted(named)!r}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == [f"sctraj.{name}" for name in sorted(named)]


def test_importing_sctraj_imports_nothing_heavy():
    code = f"import sys, json, sctraj; print(json.dumps(sorted({HEAVY!r} & set(sys.modules))))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == []


def test_a_level_of_the_logger_that_is_set_before_the_first_use_stays():
    code = """if True:
        import logging
        logging.getLogger("sctraj").setLevel(logging.WARNING)
        import sctraj
        from sctraj._log import logger
        print(logger.level == logging.WARNING)"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["True"]
