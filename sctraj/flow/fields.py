"""A field of either kind for the same problems: a network that is trained, or a kernel average that is assembled."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import torch

from .closed_form import closed_form
from .flow_matching import Fit, Training, fit
from .problem import LISTED, Problem

FieldKind = Literal["neural", "closed-form"]
logger = logging.getLogger(__name__)


def make_field(
    kind: FieldKind,
    problems: Sequence[Problem],
    validation: Sequence[Problem],
    training: Training,
    device: torch.device,
    *,
    progress: bool,
) -> Fit:
    """Train the members' fields, or assemble closed-form ones, in single precision.

    Parameters
    ----------
    problems, validation
        One per member; for validation those of held-back cells, or none.
    training
        How to train a neural field.
    device
        Where to compute, and where the field stays.
    progress
        Whether to show a progress bar of the training.
    """
    if kind == "closed-form":
        field = closed_form(problems, device=device, dtype=torch.float32)
        empty = torch.zeros(0, len(problems))
        return Fit(field, loss=empty, validation_loss=empty)
    first = problems[0]
    d = first.snapshots.dimension
    if first.std > 0 and training.module is None and d > training.width:
        # benchmarks/schroedinger_bridge.py, 100 dimensions: KL 3.0 through 64, 1.2 through 128
        logger.warning(
            f"a score in {d} dimensions loses much in layers as narrow as {training.width}; pass width={2 * d}"
        )
    fitted = fit(
        problems, validation=validation, training=training, device=device, dtype=torch.float32, progress=progress
    )
    if first.grows and not fitted.vector_field.grows:
        logger.warning(
            f"the pairs grow, but the module has no output for growth, so that the flow does not; have it map to "
            f"{d + 1} columns, velocity and growth, or pass method='ot-cfm'"
        )
    return fitted


def distinct_seeds(kind: FieldKind, method: str, seeds: Sequence[int]) -> Sequence[int]:
    """Return the seeds that give different fields: only the first if nothing is trained and no pairs are drawn."""
    return seeds if kind == "neural" or method not in LISTED else seeds[:1]


def farther_shares(kind: FieldKind, problems: Sequence[Problem]) -> list[float]:
    """Return how much farther snapshots count when each member moves a population, see `starts.farther_share`.

    For a closed-form field they count nothing: on their way, cells of farther snapshots pass through the nearer ones
    and take over what these are off by, so nothing is gained.
    """
    return [problem.farther if kind == "neural" else 0.0 for problem in problems]
