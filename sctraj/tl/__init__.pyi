from ._fates import fates as fates
from ._fit_flow import fit_flow as fit_flow
from ._interpolate import interpolate as interpolate
from ._leave_one_out import leave_one_out as leave_one_out
from ._trajectories import trajectories as trajectories

__all__ = ["fates", "fit_flow", "interpolate", "leave_one_out", "trajectories"]
