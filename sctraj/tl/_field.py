"""Check and record the options of a field, for both `fit_flow` and `leave_one_out`."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, get_args

import torch

from .._log import logger
from ..flow.fields import FieldKind
from ..flow.flow_matching import Training
from ..flow.problem import LISTED, WITH_PATH, Problem

if TYPE_CHECKING:
    from torch import nn


def check_field(field: FieldKind, module: nn.Module | None) -> None:
    """Raise if the kind of field is unknown or incompatible with a user's module, or if that is not a module."""
    check_module(module)
    if field not in get_args(FieldKind):
        raise ValueError(f"expected a field of {', '.join(get_args(FieldKind))}, found {field!r}")
    if field == "closed-form" and module is not None:
        raise ValueError("expected no module for a closed-form field, which is not trained; pass field='neural'")


def check_module(module: nn.Module | None) -> None:
    """Raise a TypeError if a user's module is not an instance of a module, such as a class."""
    if isinstance(module, type):
        raise TypeError(f"expected a module, found the class {module.__name__}; pass one of it: {module.__name__}(...)")
    if module is not None and not isinstance(module, torch.nn.Module):
        raise TypeError(f"expected a torch.nn.Module, found {type(module).__name__}; wrap it in one")


def warn_of_unused(
    verb: Callable[..., object],
    field: FieldKind,
    training: Training,
    *,
    methods: Sequence[str],
    path: str | None,
    block: int | None,
    growth_key: str | None,
    frame: str,
) -> None:
    """Log which options of a verb were changed from their defaults but have no effect on this call."""
    unused = [option.name for option in dataclasses.fields(training)]
    if field == "neural":
        unused = [] if training.module is None else ["width", "depth"]
    defaults = inspect.signature(verb).parameters
    given = [name for name in unused if getattr(training, name) != defaults[name].default]
    if given:
        other = "a closed-form field, which is not trained" if field == "closed-form" else "a module of your own"
        logger.warning(f"{', '.join(given)} given, without effect on {other}")
    if block is not None and not any(method in LISTED or finds_kin(method, path) for method in methods):
        logger.warning(f"block given, without effect on {', '.join(methods)}")
    without_kin = [method for method in methods if not finds_kin(method, path)]
    if frame != defaults["frame"].default and without_kin:
        logger.warning(f"frame given, without effect on {', '.join(without_kin)}")
    for name, value, taken_by in (("path", path, WITH_PATH), ("growth_key", growth_key, ("uot-cfm",))):
        if value is not None and (others := [method for method in methods if method not in taken_by]):
            logger.warning(f"{name} given, without effect on {', '.join(others)}")


def finds_kin(method: str, path: str | None) -> bool:
    """Say whether a method couples growing populations, for its pairs or for the kin that bend its paths."""
    return method == "uot-cfm" or (path == "hermite" and method in WITH_PATH)


def check_jitter(jitter: float, field: FieldKind) -> None:
    """Raise a ValueError if the jitter is negative or not finite, or if the field has no bandwidth to measure it in."""
    if not 0 <= jitter < math.inf:
        raise ValueError(f"expected a finite jitter of at least 0, found {jitter}; pass 1 for the kernel's own width")
    if jitter and field != "closed-form":
        raise ValueError(
            f"expected no jitter for a {field} field, which has no bandwidth to measure it in, found {jitter}; leave "
            "it out, or take field='closed-form'"
        )


def path_name(path: str | None, problem: Problem) -> str:
    """Return the name of a problem's path: the one requested, or the default that None stands for."""
    return path or type(problem.path).__name__.lower()


def fit_record(
    kind: FieldKind,
    training: Training,
    *,
    time_key: str,
    use_rep: str,
    growth_key: str | None,
    frame: str | None,
    block: int | None,
    device: torch.device,
) -> dict[str, Any]:
    """Return what defines a fit apart from method, path, sigma and seed, in a form that ``uns`` can hold.

    Options that are None, or that a closed-form field does not use, have no entry.
    """
    record: dict[str, Any] = {"field": kind, "time_key": time_key, "use_rep": use_rep, "growth_key": growth_key}
    record |= {"frame": frame, "block": block}
    if kind == "neural":
        record |= {f.name: getattr(training, f.name) for f in dataclasses.fields(training)}
        if training.module is not None:
            record |= {"module": type(training.module).__name__, "width": None, "depth": None}
    return {name: value for name, value in record.items() if value is not None} | {"device": str(device)}
