"""Which field a fit is for, and making it: what `fit_flow` and `leave_one_out` share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from .._log import logger
from ..flow.closed_form import closed_form
from ..flow.flow_matching import Fit, Training, fit
from ..flow.problem import Problem

if TYPE_CHECKING:
    from torch import nn

Field = Literal["neural", "closed-form"]


def check_field(field: Field, module: nn.Module | None) -> None:
    """Raise for a kind of field that is unknown, or cannot be had with a user's module, and for what is no module."""
    check_module(module)
    if field not in get_args(Field):
        raise ValueError(f"expected a field of {', '.join(get_args(Field))}, found {field!r}")
    if field == "closed-form" and module is not None:
        raise ValueError("expected no module for a closed-form field, which is not trained; pass field='neural'")


def check_module(module: nn.Module | None) -> None:
    """Raise a TypeError for a user's module that is none, such as the class of one."""
    if isinstance(module, type):
        raise TypeError(f"expected a module, found the class {module.__name__}; pass one of it: {module.__name__}(...)")
    if module is not None and not isinstance(module, torch.nn.Module):
        raise TypeError(f"expected a torch.nn.Module, found {type(module).__name__}; wrap it in one")


def check_jitter(jitter: float, field: Field) -> None:
    """Raise a ValueError for a jitter below zero, or of a field without a bandwidth."""
    if not 0 <= jitter < math.inf:
        raise ValueError(f"expected a finite jitter of at least 0, found {jitter}; pass 1 for the kernel's own width")
    if jitter and field != "closed-form":
        raise ValueError(
            f"expected no jitter for a {field} field, which has no bandwidth to measure it in, found {jitter}; leave "
            "it out, or take field='closed-form'"
        )


def farther_shares(kind: Field, problems: Sequence[Problem]) -> list[float]:
    """Return how much farther snapshots count in each member's populations, see `flow.starts.farther_share`.

    Nothing in those of a closed-form field: on their way farther cells come through the nearer snapshots and take over
    what these are off by, so that nothing is gained.
    """
    return [problem.farther if kind == "neural" else 0.0 for problem in problems]


def path_name(path: str | None, problem: Problem) -> str:
    """Return the name of a problem's path: that asked for, or what stands for None."""
    return path or type(problem.path).__name__.lower()


def fit_record(
    kind: Field,
    training: Training,
    *,
    time_key: str,
    use_rep: str,
    growth_key: str | None,
    block: int | None,
    device: torch.device,
) -> dict[str, Any]:
    """Return what fits are defined by beside method, path, sigma and seed, as ``uns`` can hold it.

    What is None has no entry, and what a closed-form field has no use for neither.
    """
    record = {"field": kind, "time_key": time_key, "use_rep": use_rep, "growth_key": growth_key, "block": block}
    if kind == "neural":
        record |= {f.name: getattr(training, f.name) for f in dataclasses.fields(training)}
        if training.module is not None:
            record |= {"module": type(training.module).__name__, "width": None, "depth": None}
    return {name: value for name, value in record.items() if value is not None} | {"device": str(device)}


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
        d = problems[0].snapshots.dimension if problems else 0
        if problems and problems[0].std > 0 and training.module is None and d > training.width:
            # benchmarks/schroedinger_bridge.py, 100 dimensions: KL 3.0 through 64, 1.2 through 128
            logger.warning(
                f"a score in {d} dimensions loses much in layers as narrow as {training.width}; pass width={2 * d}"
            )
        fitted = fit(
            problems, validation=validation, training=training, device=device, dtype=torch.float32, progress=progress
        )
        if problems[0].grows and not fitted.vector_field.grows:
            logger.warning(
                f"the pairs grow, but the module has no output for growth, so that the flow does not; have it map to "
                f"{d + 1} columns, velocity and growth, or pass method='ot-cfm'"
            )
        return fitted
    dtype = torch.float32
    field = closed_form(problems, device=device, dtype=dtype)
    empty = torch.zeros(0, len(problems), dtype=dtype)
    return Fit(field, loss=empty, validation_loss=empty)
