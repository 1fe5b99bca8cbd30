from ._evaluate import Unit as Unit
from ._evaluate import evaluate as evaluate
from ._files import written_whole as written_whole
from ._grid import Data as Data
from ._grid import Grid as Grid
from ._grid import known_settings as known_settings
from ._grid import make_grid as make_grid
from ._grid import read_grid as read_grid
from ._methods import register as register
from ._run import grid_of as grid_of
from ._run import run as run
from ._run import run_grid as run_grid
from ._run import run_published as run_published
from ._tasks import TASKS as TASKS
from ._uncertainty import paired as paired
from ._uncertainty import summary as summary

__all__ = [
    "TASKS",
    "Data",
    "Grid",
    "Unit",
    "evaluate",
    "grid_of",
    "known_settings",
    "make_grid",
    "paired",
    "read_grid",
    "register",
    "run",
    "run_grid",
    "run_published",
    "summary",
    "written_whole",
]
