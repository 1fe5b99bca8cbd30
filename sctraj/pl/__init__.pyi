from ._leave_one_out import leave_one_out as leave_one_out
from ._loss import loss as loss
from ._trajectories import trajectories as trajectories
from ._velocity import velocity as velocity

__all__ = ["leave_one_out", "loss", "trajectories", "velocity"]
