"""The AnnData boundary: every slot name, and all that is read from or written to an AnnData."""

from __future__ import annotations

# --- slots ---------------------------------------------------------------------------------------------------------
TIME = "time"  # obs: real time, float64; uns: unit, source column, mapping
FLOW = "flow"  # default `key_added`: uns[key] and the prefix of what follows
VELOCITY = "{key}_velocity"  # obsm: n_obs x d float32, per unit time, in use_rep units
TRAJECTORIES = "{key}_trajectories"  # obsm: n_obs x n_times x d float32; the times in uns[key]["trajectory_times"]
W1 = "{key}_w1"  # obsm: DataFrame n_obs x methods; NaN at the first and last snapshot
RESTORED = "{key}_restored"  # obsm: n_obs x d float32; NaN at the first and last snapshot
LEAVE_ONE_OUT = "leave_one_out"  # uns: tidy DataFrame; prefixed with "{key}_" when key is not FLOW
PROTOCOL = "{table}_protocol"  # uns: how that table came about; {table} is the name above
