"""The command line: fit, benchmark, plot. Options, types and defaults are those of the functions that are called."""

from __future__ import annotations

import inspect
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import click

from . import __version__, benchmark, datasets, pl, pp, tl

if TYPE_CHECKING:
    from anndata import AnnData

EXPECTED = (ValueError, KeyError, TypeError, OSError, RuntimeError)
PLOTS: dict[str, tuple[str, dict[str, str]]] = {
    "velocity": ("velocity", {}),
    "stream": ("velocity", {"kind": "stream"}),
    "trajectories": ("trajectories", {}),
    "loss": ("loss", {}),
    "leave-one-out": ("leave_one_out", {"kind": "distances"}),
    "map": ("leave_one_out", {"kind": "map"}),
}
# the commands that write what a plot lacks, by the function that the plot's error recommends
WRITERS = {
    "tl.fit_flow": "sctraj fit IN -o OUT",
    "tl.trajectories": "sctraj fit IN -o OUT --trajectories",
    "tl.leave_one_out": "sctraj benchmark IN -o FOLDER, and plot FOLDER/benchmark.h5ad",
}
NEEDS_PYTHON = {"module", "copy"}  # arguments that cannot be given on a command line


# --- options from signatures ---------------------------------------------------------------------------------------
class Several(click.ParamType):
    """Values separated by commas."""

    name = "A,B,..."

    def __init__(self, item: click.ParamType) -> None:
        self.item = item

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        """Split text; leave a default as it is."""
        items = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
        return tuple(self.item.convert(item, param, ctx) for item in items)


def click_type(hint: Any) -> click.ParamType:
    """Return the click type of the first member of a type hint that can be given on a command line."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for member in members:
        if get_origin(member) is Literal:
            return click.Choice([str(value) for value in get_args(member)])
        if get_origin(member) is Sequence:
            return Several(click_type(get_args(member)[0]))
        if member in (bool, int, float, str):
            return click.types.convert_type(member)
    raise TypeError(f"{hint} cannot be given on a command line; leave the parameter out of the options.")


def described(function: Callable[..., Any]) -> dict[str, str]:
    """Return what a numpydoc docstring says about each parameter."""
    section = re.search(r"^Parameters\n-+\n(.*?)(?:\n\n^\S+\n-+$|\Z)", inspect.getdoc(function) or "", re.M | re.S)
    entries = re.findall(r"^(\S.*)\n((?:[ ]+.*\n?|\n)+)", section[1] + "\n" if section else "", re.M)
    texts = {name.strip(): " ".join(text.split()) for names, text in entries for name in names.split(",")}
    return {name: text.replace("``", "").replace("`", "") for name, text in texts.items()}


def options(*functions: Callable[..., Any], skip: Iterable[str] = (), only: Iterable[str] | None = None) -> list:
    """Turn the parameters of functions, except the AnnData, into options; of two with the same name, the later counts.

    Parameters
    ----------
    functions
        Functions with annotated parameters, all of which have defaults.
    skip, only
        Names to leave out, and names to which to restrict the options.
    """
    left_out = {*NEEDS_PYTHON, *skip}
    made: dict[str, click.Option] = {}
    helps: dict[str, str] = {}
    for function in functions:
        # "As in ..." refers to a function that was read earlier
        helps |= {name: text for name, text in described(function).items() if not text.startswith("As in")}
        for name, parameter in list(inspect.signature(function).parameters.items())[1:]:
            if name in left_out or (only is not None and name not in only) or parameter.kind is parameter.VAR_KEYWORD:
                continue
            hint = parameter.annotation
            if isinstance(hint, str):
                hint = eval(hint, function.__globals__)
            flag = f"--{name.replace('_', '-')}"
            made[name] = click.Option(
                [f"{flag}/--no-{flag[2:]}" if hint is bool else flag, name],
                type=click_type(hint),
                default=parameter.default,
                show_default=True,
                help=helps.get(name),
            )
    return list(made.values())


def as_options(message: str, flags: Mapping[str, str]) -> str:
    """Rewrite an error about arguments in terms of a command's options; ``flags`` maps arguments to options."""
    names = r'"([^"]+)"(?:, key_added="([^"]+)")?'
    parse = rf"[Cc]all sctraj\.pp\.parse_time\(adata, {names}\) first and pass the column it writes"

    def read(found: re.Match[str]) -> str:
        into = f' {flags["time_key"]} "{found[2]}"' if found[2] else ""
        return f'Read them with {flags["column"]} "{found[1]}"{into}'

    if "column" in flags:
        message = re.sub(parse, read, message)
    for name, flag in flags.items():
        # key="value", and names that are not ordinary words
        message = re.sub(rf"(?<![\w-]){name}=(True|False)", _switch(flag), message)
        message = re.sub(rf"""(?<![\w-]){name}=(['"]?)([\w.-]+)\1""", rf"{flag} \2", message)
        if "_" in name:  # except in the name of a file
            message = re.sub(rf"(?<![\w/-]){name}\b(?!['\"=/]|\.\w)", flag, message)
    return message


def _switch(flag: str) -> Callable[[re.Match[str]], str]:
    return lambda found: flag if found[1] == "True" else f"--no-{flag[2:]}"


class Verb(click.Command):
    """A command whose options are read from signatures when they are needed, and not when sctraj starts.

    An expected error ends it with one line on stderr and exit code 1; with --debug, the traceback is shown instead.
    """

    def __init__(self, *args: Any, reads: Callable[[], list[click.Option]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reads: Callable[[], list[click.Option]] | None = reads

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the command's own parameters and those read from signatures."""
        if self._reads is not None:
            self.params += self._reads()
            self.params.append(
                click.Option(["--debug"], is_flag=True, help="Show where an error comes from.", expose_value=False,
                             callback=lambda ctx, _, value: ctx.meta.update({"sctraj.debug": value}))
            )  # fmt: skip
            self._reads = None
        return super().get_params(ctx)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except EXPECTED as error:
            if ctx.meta.get("sctraj.debug"):
                raise
            # str() of a KeyError puts its message in quotes
            message = error.args[0] if isinstance(error, KeyError) and error.args else error
            flags = {one.name: one.opts[-1] for one in self.params if isinstance(one, click.Option) and one.name}
            told = as_options(" ".join(str(message).split()), flags)
            raise click.ClickException(told or type(error).__name__) from error


ZARR = (".zgroup", "zarr.json")  # of which a zarr store has one


# --- files ---------------------------------------------------------------------------------------------------------
def read(path: Path) -> AnnData:
    """Read an h5ad file or a zarr store."""
    import anndata
    import h5py

    stored = path.is_dir() and any((path / name).exists() for name in ZARR)
    if not stored and not path.is_file():
        found = "another folder" if path.is_dir() else "nothing"
        raise FileNotFoundError(f"Expected an h5ad file or a zarr store, found {found}: {path}")
    if not stored and not h5py.is_hdf5(path):
        raise OSError(f"Expected an h5ad file, found something else: {path}. Write one with adata.write_h5ad().")
    what = "a zarr store" if stored else "an h5ad file"
    try:
        adata = anndata.read_zarr(path) if stored else anndata.read_h5ad(path)
    except Exception as error:
        raise OSError(f"Expected {what}, found one that anndata cannot read: {path} ({error}).") from error
    if adata.n_obs == 0:
        raise ValueError(f"Expected cells, found none in {path}.")
    return adata


def check_output(path: Path, *suffixes: str) -> None:
    """Raise if a file cannot be written; called before anything is computed."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"Expected an output file that ends in {' or '.join(suffixes)}, found {path}.")
    if path.is_dir() or not path.parent.is_dir():
        found = "a folder of that name" if path.is_dir() else f"no folder {path.parent}"
        raise FileNotFoundError(f"Expected to write {path}, found {found}.")


def check_folder(path: Path) -> None:
    """Raise if no folder can be made under that name."""
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"Expected a folder to write to, new or there already, found a file: {path}.")


def prepare(adata: AnnData, *, time_key: str, column: str | None, pca: int | None, **reading: Any) -> None:
    """Read times from text and compute principal components, if requested."""
    if column is not None:
        try:
            pp.parse_time(adata, column, key_added=time_key, **reading)
        except ValueError as error:  # on a command line, --key-added is the name of the flow
            raise ValueError(str(error).replace("key_added", "--time-key")) from error
        except KeyError as error:
            raise KeyError(str(error.args[0]).replace("as key.", "as --parse-time.")) from error
    if pca is None:
        return
    if adata.X is None or adata.n_vars == 0:
        raise ValueError("Expected expression values in X for --pca, found none. Use a representation with --use-rep.")
    if "X_pca" in adata.obsm:
        raise ValueError('Expected no principal components for --pca, found obsm["X_pca"]. Leave --pca out.')
    import scanpy as sc

    # in float64, because in float32 the last components depend on the machine
    sc.pp.pca(adata, n_comps=pca, svd_solver="full", dtype="float32")
    params = adata.uns["pca"]["params"]
    adata.uns["pca"]["params"] = {k: v for k, v in params.items() if v is not None}  # older anndata cannot write None


def preparing(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of `prepare`."""
    help_pca = "First compute so many principal components of X, over all cells."
    command = click.option("--pca", type=click.IntRange(min=1), metavar="N", help=help_pca)(command)
    help_time = "First read the times from this column of labels, into the time key."
    return click.option("--parse-time", "column", metavar="COLUMN", help=help_time)(command)


READING = {"unit", "window"}  # options for reading times from labels
A_FILE = click.Path(path_type=Path)


# --- commands ------------------------------------------------------------------------------------------------------
@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="sctraj")
def main() -> None:
    """Continuous trajectories between single-cell snapshots by conditional flow matching."""


@main.command(
    "fit",
    cls=Verb,
    reads=lambda: options(tl.fit_flow) + options(pp.parse_time, only=("unit", "window")),
)
@click.argument("source", metavar="IN", type=A_FILE)
@click.option("-o", "--output", metavar="OUT", type=A_FILE, required=True, help="The h5ad file to write.")
@click.option("--trajectories", is_flag=True, help="Also follow every cell along the flow.")
@preparing
@click.pass_context
def fit_command(
    ctx: click.Context, /, source: Path, output: Path, trajectories: bool, column: str | None, pca: int | None,
    unit: str | None, window: str, **arguments: Any,
) -> None:  # fmt: skip
    """Fit a flow to the cells of IN (h5ad or zarr), and write the cells together with the flow."""
    if column is None:
        _refuse(_given(ctx) & READING, "without --parse-time")
    check_output(output, ".h5ad")
    adata = read(source)
    prepare(adata, time_key=arguments["time_key"], column=column, pca=pca, unit=unit, window=window)
    tl.fit_flow(adata, **arguments)
    if trajectories:
        tl.trajectories(adata, device=arguments["device"], rng=arguments["rng"], key=arguments["key_added"])
    with benchmark.written_whole(output) as path:
        adata.write_h5ad(path)
    click.echo(f"wrote {output}")


def _benchmark_options() -> list[click.Option]:
    judged = options(tl.fit_flow, tl.leave_one_out, benchmark.run, skip={"folder", "key_added", "start"})
    asked = {*inspect.signature(tl.leave_one_out).parameters, *inspect.signature(benchmark.run).parameters}
    dims = options(pp.standardize, only=("n_dims",))
    dims[0].help = "Judge in the first N dimensions, standardised over all cells; 0: in the representation as it is."
    labels = click.Option(["--labels"], metavar="COLUMN", help="Of cell types, whose shares are then judged as well.")
    return [
        *(option for option in judged if option.name in asked),
        *dims,
        *options(pp.parse_time, only=("unit", "window")),
        *options(benchmark.grid_of, skip={"others"}),
        labels,
        *options(benchmark.run_grid, only=("jobs", "dask", "plan")),
    ]


PUBLISHED = (
    "Run the published protocol on embryoid bodies, Cite and Multiome, as far as they can be had, and put the "
    "published values beside ours."
)
# options of a single run that units of a grid take too, in addition to a method's settings
OF_UNITS = ("time_key", "use_rep", "methods", "start", "n_seeds", "rng", "device")
GRID_ALONE = ("tasks", "strict", "bootstraps", "threads", "labels")  # options of a grid only


@main.command("benchmark", cls=Verb, reads=_benchmark_options)
@click.argument("source", metavar="[IN]", type=A_FILE, required=False)
@click.option("-o", "--output", metavar="FOLDER", type=A_FILE, help="Where the table, the plot and the cells go.")
@click.option("--grid", metavar="TOML", type=A_FILE, help="Compute the grid of this file, instead of IN.")
@click.option("--published", is_flag=True, help=PUBLISHED)
@preparing
@click.pass_context
def benchmark_command(
    ctx: click.Context, /, source: Path | None, output: Path | None, grid: Path | None, published: bool,
    column: str | None, pca: int | None, unit: str | None, window: str, n_dims: int, **arguments: Any,
) -> None:  # fmt: skip
    """Leave out every interior snapshot of IN (h5ad or zarr; by default the simulated example) in turn, and restore it.

    With --grid, --published, --tasks, --strict, --bootstraps, --labels, --threads, --jobs, --dask or --plan, with
    --start first, or with a method of your own (--methods module:function, which is also searched for in the current
    folder), the work is divided into units, which worker processes compute and which can be resumed. FOLDER then gets
    benchmark.csv, wide.csv, summary.csv, paired.csv and report.html.
    """
    sys.path.append(str(Path.cwd()))  # as with "python -m sctraj"; workers are told
    if output is not None:
        check_folder(output)
    where: dict[str, Any] = {} if output is None else {"folder": output}
    given = _given(ctx)
    how = {name: arguments.pop(name) for name in ("jobs", "dask", "plan")}
    described = {name: arguments.pop(name) for name in GRID_ALONE}
    units = sorted(given & {"grid", "published", *how, *described})
    units += ["start"] * (arguments["start"] == "first") + ["methods"] * any(
        ":" in name for name in arguments["methods"]
    )
    if grid is not None:
        _refuse(given - {"grid", "output", *how}, "with --grid, whose file says everything")
        benchmark.run_grid(benchmark.read_grid(grid), **where, **how)
        return
    settings = {name: arguments[name] for name in given & {*benchmark.known_settings()}} if units else {}
    if units:
        one_run = {*inspect.signature(tl.leave_one_out).parameters} - {*OF_UNITS, *benchmark.known_settings()}
        _refuse(given & one_run, f"with --{' and --'.join(units)}")
        described |= {"device": arguments["device"], "settings": settings}
    if published:
        taken = {"n_seeds", "device", "threads", "bootstraps", *settings}
        _refuse(given - taken - {"published", "output", *how}, "with --published, whose protocol is fixed")
        chosen = {name: (arguments | described)[name] for name in given & taken - {*settings}}
        benchmark.run_published(**where, **how, **{"device": described["device"], "settings": settings} | chosen)
        return
    if column is None:
        _refuse(given & READING, "without --parse-time")
    adata = datasets.simulated_differentiation() if source is None else read(source)
    prepare(adata, time_key=arguments["time_key"], column=column, pca=pca, unit=unit, window=window)
    if not units:
        if n_dims != 0:
            key = inspect.signature(pp.standardize).parameters["key_added"].default
            key += "_benchmark" * (key in adata.obsm and key not in adata.uns)  # not ours, so it is kept
            pp.standardize(adata, arguments["use_rep"], n_dims=n_dims, key_added=key)
            arguments["use_rep"] = key
        benchmark.run(adata, **where, **arguments)
        return
    name = "simulated" if source is None else source.stem
    data = benchmark.Data(
        name, "simulated" if source is None else str(source), time_key=arguments["time_key"],
        use_rep=arguments["use_rep"], labels=described.pop("labels"), n_dims=n_dims,
    )  # fmt: skip
    seeds = tuple(range(arguments["rng"], arguments["rng"] + arguments["n_seeds"]))
    described |= {name: arguments[name] for name in ("methods", "start")}
    made = benchmark.grid_of(data, seeds=seeds, **described)
    benchmark.run_grid(made, cells={name: adata}, **where, **how)


def _given(ctx: click.Context) -> set[str]:
    """Return the names of the options that the user gave."""
    default = (click.core.ParameterSource.DEFAULT, None)
    return {name for name in ctx.params if ctx.get_parameter_source(name) not in default}


def _refuse(names: Iterable[str], where: str) -> None:
    """Raise a usage error for options that would have no effect."""
    for name in sorted(names):
        shown = "IN" if name == "source" else f"--{name.replace('_', '-')}"
        raise click.UsageError(f"{shown} has no meaning {where}.")


def _plot_options() -> list[click.Option]:
    drawn = (pl.leave_one_out, pl.loss, pl.trajectories, pl.velocity)  # shared options are described by the last one
    return options(*drawn, only=("basis", "color", "metric", "method", "key"))


KINDS = "velocity: arrows; stream: streamlines; leave-one-out: distances over time; map: each held-out cell's distance."


@main.command("plot", cls=Verb, reads=_plot_options)
@click.argument("source", metavar="IN", type=A_FILE)
@click.option("-o", "--output", metavar="PNG", type=A_FILE, required=True, help="The picture to write.")
@click.option("--kind", type=click.Choice(list(PLOTS)), default=next(iter(PLOTS)), show_default=True, help=KINDS)
@click.pass_context
def plot_command(ctx: click.Context, /, source: Path, output: Path, kind: str, **arguments: Any) -> None:
    """Plot the cells of IN (h5ad or zarr), as written by fit or benchmark."""
    check_output(output, ".png", ".pdf", ".svg")
    verb, fixed = PLOTS[kind]
    draw = getattr(pl, verb)
    unused = arguments.keys() - inspect.signature(draw).parameters.keys()
    if kind == "leave-one-out":
        unused |= {"basis"}  # pl.leave_one_out takes it for kind="map" alone
    for name in sorted(unused):
        if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise click.UsageError(f"--{name} has no meaning for --kind {kind}.")
        del arguments[name]
    from matplotlib.figure import Figure

    adata = read(source)
    figure = Figure(figsize=(7, 5), layout="constrained")  # needs no display
    try:
        draw(adata, ax=figure.subplots(), **fixed, **arguments)
    except KeyError as error:
        writer = next((command for verb, command in WRITERS.items() if f"sctraj.{verb}(" in str(error)), None)
        raise error if writer is None else KeyError(f"{error.args[0]} Here: {writer}.") from error
    with benchmark.written_whole(output) as path:
        figure.savefig(path, dpi=150)
    click.echo(f"wrote {output}")
