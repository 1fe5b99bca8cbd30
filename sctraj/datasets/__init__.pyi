from ._courses import simulated_course as simulated_course
from ._simulated import simulated_differentiation as simulated_differentiation

__all__ = ["simulated_course", "simulated_differentiation"]
