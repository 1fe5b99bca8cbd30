from . import benchmark as benchmark
from . import datasets as datasets
from . import get as get
from . import metrics as metrics
from . import pl as pl
from . import pp as pp
from . import tl as tl

__version__: str
__all__ = ["__version__", "benchmark", "datasets", "get", "metrics", "pl", "pp", "tl"]
