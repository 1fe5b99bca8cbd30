from ._courses import simulated_course as simulated_course
from ._load import load as load
from ._real import cite as cite
from ._real import embryoid_body as embryoid_body
from ._real import multiome as multiome
from ._simulated import simulated_differentiation as simulated_differentiation

__all__ = ["cite", "embryoid_body", "load", "multiome", "simulated_course", "simulated_differentiation"]
