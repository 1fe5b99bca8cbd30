"""Which field a fit is for, and making it: what `fit_flow` and `leave_one_out` share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch

from ..flow.closed_form import closed_form
from ..flow.flow_matching import Fit, Training, fit
from ..flow.problem import Problem

if TYPE_CHECKING:
    from torch import nn

Field = Literal["closed-form", "neural"]


def pick_field(field: Field | None, method: str, module: nn.Module | None) -> Field:
    """Return the kind of field: the one asked for, or a method's default."""
    if field not in (None, "closed-form", "neural"):
        raise ValueError(f"expected a field of closed-form, neural, found {field!r}")
    if field == "closed-form" and module is not None:
        raise ValueError("expected no module for a closed-form field, which is not trained; pass field='neural'")
    if field is None:
        return "closed-form" if method in ("uot-cfm", "ot-cfm") and module is None else "neural"
    return field


def make_field(
    kind: Field,
    problems: Sequence[Problem],
    validation: Sequence[Problem],
    training: Training,
    device: torch.device,
    *,
    progress: bool,
) -> Fit:
    """Train the members' fields, or put them together."""
    if kind == "neural":
        return fit(
            problems, validation=validation, training=training, device=device, dtype=torch.float32, progress=progress
        )
    dtype = torch.float32
    field = closed_form(problems, device=device, dtype=dtype)
    empty = torch.zeros(0, len(problems), dtype=dtype)
    return Fit(field, loss=empty, validation_loss=empty)
