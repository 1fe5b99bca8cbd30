"""Methods x folds x seeds on one data set, with table, files and plot."""

from ._run import run, written_whole

__all__ = ["run", "written_whole"]
