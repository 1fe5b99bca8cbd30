"""Define a benchmark: data sets x tasks x methods x settings x seeds, from a TOML file or from arguments."""

from __future__ import annotations

import difflib
import inspect
import itertools
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
import pandas as pd

from .. import datasets
from ..flow.flow_matching import pick_device
from ..flow.problem import METHODS as OWN
from ..tl._field import finds_kin
from ._evaluate import Unit
from ._methods import REFERENCES, find_method, known, own_settings
from ._representation import fit_recipe, read_expression
from ._tasks import STARTS, TASKS

if TYPE_CHECKING:
    from anndata import AnnData

Setting = str | int | float | bool
FAMILIES = ("branching", "cycle", "fast-phase", "crossing", "high-dimensional", "switch")
SIMULATED = "simulated"
RECIPE = "recipe"
PUBLISHED = {"embryoid-body": "embryoid_body", "cite": "cite", "multiome": "multiome"}
NAMES = (*FAMILIES, SIMULATED, *PUBLISHED)
# types of a TOML file's keys, and of those that describe a data set
KINDS: dict[str, tuple[type, ...]] = {
    "data": (list,), "tasks": (list,), "methods": (list,), "settings": (dict,), "seeds": (int, list),
    "strict": (bool, list), "starts": (list,), "references": (bool,), "bootstraps": (int,), "device": (str,),
    "threads": (int,),
}  # fmt: skip
DATA_KINDS: dict[str, tuple[type, ...]] = {
    "name": (str,), "time_key": (str,), "use_rep": (str,), "labels": (str,), "n_dims": (int,), "times": (dict,),
    "index_clock": (bool,),
}  # fmt: skip
WORDS = {list: "a list", dict: "a table", int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class Data:
    """A data set: where its cells come from, and how they are read.

    Attributes
    ----------
    name
        Name of the data set in tables.
    source
        Name of a built-in data set, or a path.
    arguments
        Arguments of the simulation, such as the number of cells.
    time_key, use_rep, labels
        Column of real times; representation; column of cell types, if there is one. If `use_rep` is "recipe", the
        strict form's own recipe is fitted on all cells: the published form then differs from the strict one only in
        which cells the representation has seen.
    n_dims
        Number of dimensions to judge in, standardised; 0: the representation as it is.
    times
        From the labels at `time_key` to real times, if the labels are text.
    index_clock
        Replace the times by 0, 1, 2, ..., as the published protocol does.
    """

    name: str
    source: str
    arguments: tuple[tuple[str, Any], ...] = ()
    time_key: str = "time"
    use_rep: str = "X_pca"
    labels: str | None = None
    n_dims: int = 5
    times: tuple[tuple[str, float], ...] = ()
    index_clock: bool = False

    def load(self) -> AnnData:
        """Read or simulate the cells.

        Raises
        ------
        ConnectionError, FileNotFoundError, KeyError, ValueError
            If they cannot be obtained, or are not as described.
        """
        adata = self._read()
        labelled = Path(self.source).suffix == ".h5ad" and (bool(self.times) or _is_text(adata.obs[self.time_key]))
        return self._on_clock(adata, labelled=labelled)

    def given(self, adata: AnnData) -> AnnData:
        """Return cells that were read already with the requested times: themselves, or a copy with other times."""
        return self._on_clock(adata.copy(), labelled=bool(self.times)) if self.times or self.index_clock else adata

    def _on_clock(self, adata: AnnData, *, labelled: bool) -> AnnData:
        if labelled:
            labels = adata.obs[self.time_key].astype(str)
            mapping = dict(self.times)
            if missing := sorted(set(labels) - set(mapping)):
                raise ValueError(
                    f'expected a time for every label in obs["{self.time_key}"] of {self.name}, found none for '
                    f'{", ".join(missing)}; give them in the grid file: times = {{ "{missing[0]}" = 0.0, ... }}'
                )
            adata.obs[self.time_key] = labels.map(mapping).to_numpy(dtype=np.float64)
        if self.index_clock:
            times = adata.obs[self.time_key].to_numpy(dtype=np.float64)
            adata.obs[self.time_key] = np.unique(times, return_inverse=True)[1].astype(np.float64)
        return adata

    def ready(self, adata: AnnData) -> AnnData:
        """Return cells with the representation: the cells themselves or, if it is the recipe, a copy that has it."""
        if self.use_rep not in ("X", RECIPE, *adata.obsm) and adata.X is not None and adata.n_vars:
            there = ", ".join(adata.obsm) or "none"
            raise KeyError(
                f'No representation "{self.use_rep}" in obsm of {self.name}; there are: {there}. '
                f'Pass one of them as use_rep, or "{RECIPE}": components of the expression in X.'
            )
        if self.use_rep != RECIPE or RECIPE in adata.obsm:
            return adata
        if self.n_dims < 1:
            raise ValueError(f'expected n_dims of at least 1 for use_rep="{RECIPE}", found {self.n_dims}')
        raw = read_expression(adata)
        adata = adata.copy()
        adata.obsm[RECIPE] = fit_recipe(raw, self.n_dims).project(raw)
        return adata

    def _read(self) -> AnnData:
        if self.source in FAMILIES:
            return datasets.simulated_course(cast(Any, self.source), **dict(self.arguments))
        if self.source == SIMULATED:
            return datasets.simulated_differentiation(**dict(self.arguments))
        if self.source in PUBLISHED:
            return getattr(datasets, PUBLISHED[self.source])()
        path = Path(self.source)
        if path.suffix != ".h5ad":
            named = None if self.use_rep == "X_pca" else self.use_rep
            adata = datasets.load(path, time_key=self.time_key, use_rep=named, mapping=dict(self.times) or None)
            adata.obs[self.time_key], adata.obsm[self.use_rep] = adata.obs["time"], adata.obsm["X_pca"]
            return adata
        import anndata

        if not path.is_file():
            raise FileNotFoundError(
                f"Expected an h5ad file, found {'a folder' if path.is_dir() else 'nothing'}: {path}"
            )
        try:
            adata = anndata.read_h5ad(path)
        except Exception as error:
            raise OSError(f"Expected an h5ad file, found one that anndata cannot read: {path} ({error}).") from error
        if self.time_key not in adata.obs:
            raise KeyError(
                f'No column "{self.time_key}" in obs of {path}; there are: {", ".join(map(str, adata.obs)) or "none"}.'
            )
        return adata


@dataclass(frozen=True)
class Grid:
    """Units to compute, in order, and how to compute them.

    Attributes
    ----------
    data
        The data sets that the units refer to.
    units
        The units, all different.
    bootstraps
        Number of half-samples of the cells for each interval; 0 for none.
    device
        Where to compute: "cpu", "cuda", ...
    threads
        Threads per unit. The last bits of sums depend on this number, so it is part of the key of a stored unit.
    """

    data: tuple[Data, ...]
    units: tuple[Unit, ...]
    bootstraps: int = 0
    device: str = "cpu"
    threads: int = 1
    names: Mapping[str, Data] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = {one.name: one for one in self.data}
        if len(names) < len(self.data):
            twice = next(one.name for one in self.data if [other.name for other in self.data].count(one.name) > 1)
            raise ValueError(f'expected distinct names of data sets, found "{twice}" twice; give one a name of its own')
        for name, least in (("bootstraps", 0), ("threads", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"expected {name} of at least {least}, found {getattr(self, name)}")
        object.__setattr__(self, "names", names)


def known_settings() -> tuple[str, ...]:
    """Return the names of the settings of sctraj's own methods, which are those of a fit."""
    return tuple(own_settings(OWN[0], {}))


def make_grid(
    data: Sequence[Data],
    *,
    tasks: Sequence[str],
    methods: Sequence[str],
    settings: Mapping[str, Any] | None = None,
    seeds: int | Sequence[int] = 5,
    strict: bool | Sequence[bool] = False,
    starts: Sequence[str] = ("both",),
    references: bool = True,
    bootstraps: int = 20,
    device: str = "cpu",
    threads: int = 1,
) -> Grid:
    """Make a grid of all combinations, with data in the outermost and settings in the innermost loop.

    Parameters
    ----------
    data, tasks, methods
        What to combine.
    settings
        Settings for all methods (a frame for those that take one) or, under a method's name, for that method only; of
        several values, each is tried.
    seeds
        Number of seeds, or the seeds themselves. All seeds of a unit are trained together.
    strict
        Whether the representation is refitted without the held-out snapshot; both in turn if both are given.
    starts
        Which snapshots are moved to the held-out time: those on "both" sides, the one "before", or the "first". A task
        for which none of these is possible uses its first possible start.
    references
        Add the baselines and the noise reference, relative to which skill is measured.
    bootstraps, device, threads
        As in `Grid`.

    Raises
    ------
    ValueError
        If a task, method, setting or start does not exist, or there is nothing to compute.
    """
    _check("task", tasks, tuple(TASKS))
    _check("method", [name for name in methods if ":" not in name], known(), least=0)
    _distinct("methods", methods)
    for name in methods:
        find_method(name)  # "package.module:function" must be found before anything is computed
    _check("start", starts, STARTS)
    own, shared = {}, {}
    for name, value in (settings or {}).items():
        if isinstance(value, Mapping):
            _check("method", [name], tuple(methods))
            own[name] = value
        else:
            shared[name] = value
    for told in (shared, *(chosen for name, chosen in own.items() if name in OWN)):
        _check("setting", list(told), known_settings(), least=0)
    which = _distinct("strict", [strict] if isinstance(strict, bool) else list(strict))
    numbers = tuple(range(seeds)) if isinstance(seeds, int) else tuple(_distinct("seeds", seeds))
    if not numbers or not all(type(one) is int and one >= 0 for one in numbers):
        raise ValueError(f"expected seeds, at least one whole number of at least 0, found {seeds}")
    if not data:
        raise ValueError("expected at least one data set, found none")
    # a cluster may have GPUs that this machine lacks
    where = device if device.startswith("cuda") else str(pick_device(device))
    units = []
    for one, task, leak_free in itertools.product(data, tasks, which):
        for start, method in itertools.product(_possible(task, starts), _with_references(task, methods, references)):
            chosen = {**(shared if method in OWN else {}), **own.get(method, {})}
            told = dict.fromkeys(_taken(method, made, own.get(method, {})) for made in _combinations(chosen))
            units += [Unit(one.name, task, method, settings, leak_free, start, numbers) for settings in told]
    if "frame" in shared and not any("frame" in dict(unit.settings) for unit in units):
        raise ValueError(
            f"expected a method that takes a frame (uot-cfm, or one with path='hermite') for "
            f"frame={shared['frame']!r}, found none; leave it out"
        )
    return Grid(tuple(data), tuple(units), bootstraps, where, threads)


def read_grid(path: str | Path) -> Grid:
    """Read a grid from a TOML file.

    ``data`` and ``methods`` are lists; ``tasks``, ``seeds``, ``strict``, ``starts``, ``references``, ``bootstraps``,
    ``device`` and ``threads`` are as in `make_grid` and may be left out. A data set is a name, a path relative to the
    file's folder, or a table (``[[data]]``) with one of these as ``source`` and any of ``name``, ``time_key``,
    ``use_rep``, ``labels``, ``n_dims``, ``times`` and, for a simulated one, the simulation's arguments. ``[settings]``
    holds settings for sctraj's own methods, ``[settings.METHOD]`` those for one method; of a list of values, each is
    used in turn.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not TOML, or has content that is not understood; the message names the possibilities.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a TOML file, found {'a folder' if path.is_dir() else 'nothing'}: {path}")
    try:
        with path.open("rb") as file:
            said = tomllib.load(file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"expected TOML in {path}, found something else: {error}") from error
    _check("key", list(said), tuple(KINDS), where=f" in {path}")
    for name, value in said.items():
        _check_kind(name, value, KINDS[name], f" in {path}")
    if missing := [name for name in ("data", "methods") if not said.get(name)]:
        raise ValueError(f"expected {' and '.join(missing)} in {path}, found none")
    data = [data_of(one, path.parent) for one in said.pop("data")]
    said.setdefault("tasks", ["leave-one-out"])
    return make_grid(data, **said)


def data_of(said: str | Mapping[str, Any], folder: Path = Path()) -> Data:
    """Return a data set from its name, its path, or a table that describes it.

    Raises
    ------
    ValueError
        If the description has an unknown key, or there is no such data set.
    """
    told: dict[str, Any] = dict(said) if isinstance(said, Mapping) else {"source": said}
    if not isinstance(told.get("source"), str):
        raise ValueError(f"expected a data set with a source, a name or a path, found {said!r}")
    source = told["source"]
    simulate: Any = {SIMULATED: datasets.simulated_differentiation}.get(source)
    if source in FAMILIES:
        simulate = datasets.simulated_course
    takes = [] if simulate is None else [name for name in inspect.signature(simulate).parameters if name != "family"]
    described = ("source", "name", "time_key", "use_rep", "labels", "n_dims", "times", "index_clock")
    _check("key of a data set", list(told), (*described, *takes), where=f" for {source}")
    for name in [name for name in told if name in DATA_KINDS and name not in takes]:
        _check_kind(name, told[name], DATA_KINDS[name], f" of {source}")
    given = {name: told.pop(name) for name in sorted(takes) if name in told}
    arguments = tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in given.items())
    if source not in NAMES:
        if not Path(source).suffix:
            _check("data set", [source], NAMES, where=" (a path ends in .h5ad, .npz, .csv or .tsv)")
        told["source"] = str(folder / source)
    times = told.get("times", {})
    for label, time in times.items():
        _check_kind(f'the time "{label}"', time, (float,), f" of {source}")
    told["times"] = tuple(sorted((str(label), float(time)) for label, time in times.items()))
    told.setdefault("name", source if source in NAMES else Path(source).stem)
    return Data(arguments=arguments, **told)


def _possible(task: str, starts: Sequence[str]) -> Sequence[str]:
    return [start for start in starts if start in TASKS[task].starts] or TASKS[task].starts[:1]


def _with_references(task: str, methods: Sequence[str], references: bool) -> Sequence[str]:
    # for extrapolation there is no next snapshot to copy
    added = [name for name in REFERENCES if not (name == "next" and task == "extrapolation")]
    return list(dict.fromkeys([*methods, *(added if references else [])]))


def _combinations(settings: Mapping[str, Any]) -> Iterable[tuple[tuple[str, Setting], ...]]:
    names = sorted(settings)
    values = [list(v) if isinstance(v, Sequence) and not isinstance(v, str) else [v] for v in map(settings.get, names)]
    for name, options in zip(names, values):
        if not options or not all(isinstance(v, get_args(Setting)) for v in options):
            raise ValueError(f"expected a number, text or truth value, or a list of these, for {name}, found {options}")
        _distinct(f"values of {name}", options)
    return (tuple(zip(names, chosen)) for chosen in itertools.product(*values))


def _taken(
    method: str, settings: tuple[tuple[str, Setting], ...], own: Mapping[str, Any]
) -> tuple[tuple[str, Setting], ...]:
    """Return a method's settings without a frame that was given for all methods, if this one takes none."""
    if "frame" in own or finds_kin(method, cast(Any, dict(settings).get("path"))):
        return settings
    return tuple(pair for pair in settings if pair[0] != "frame")


def _is_text(values: pd.Series) -> bool:
    kind = values.cat.categories.dtype if isinstance(values.dtype, pd.CategoricalDtype) else values.dtype
    return not pd.api.types.is_numeric_dtype(kind)


def _check_kind(name: str, value: Any, kinds: tuple[type, ...], where: str) -> None:
    """Raise a ValueError if a value from a TOML file has none of these types; a boolean does not count as a number."""
    whole = float in kinds and type(value) is int
    if not (whole or isinstance(value, kinds)) or (isinstance(value, bool) and bool not in kinds):
        raise ValueError(f"expected {' or '.join(WORDS[kind] for kind in kinds)} for {name}{where}, found {value!r}")


def _distinct(what: str, values: Sequence[Any]) -> Sequence[Any]:
    if len(set(values)) < len(values):
        raise ValueError(f"expected distinct {what}, found {list(values)}")
    return values


def _check(what: str, found: Sequence[str], known: Sequence[str], *, least: int = 1, where: str = "") -> None:
    """Raise a ValueError for unknown names that lists the known ones."""
    for name in found:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            guess = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f'no {what} "{name}"{where}; there are: {", ".join(known)}{guess}')
    if len(found) < least:
        raise ValueError(f"expected at least one {what}{where}, found none; there are: {', '.join(known)}")
    _distinct(f"{what}s", found)
