from ._parse_time import parse_time as parse_time
from ._standardize import standardize as standardize

__all__ = ["parse_time", "standardize"]
