"""What a leave-one-out says in the log: how near restorations are, and when not to believe them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .. import _adata
from .._log import logger
from ..flow.baselines import INTERPOLATION, NEXT, PREVIOUS
from ..flow.hold_out import NOISE_REFERENCE
from ..flow.judgement import METRICS

if TYPE_CHECKING:
    from anndata import AnnData


def mean_energies(found: Sequence[tuple[str, int, float]]) -> tuple[dict[str, float], float]:
    """Return the mean energy distance of every method, baseline and the noise reference, and how large noise may be.

    The latter is two standard deviations over seeds of the noise reference, or its size, if that is more.

    Parameters
    ----------
    found
        For each restoration: by what it was made, of which snapshot, and its energy distance.
    """
    of: dict[str, dict[int, list[float]]] = {}
    for name, k, energy in found:
        of.setdefault(name, {}).setdefault(k, []).append(energy)
    mean = {name: float(np.mean([np.mean(values) for values in by_time.values()])) for name, by_time in of.items()}
    halves = np.array(list(of[NOISE_REFERENCE].values())).mean(0)  # of each seed
    return mean, max(abs(mean[NOISE_REFERENCE]), 2 * float(halves.std(ddof=1)) if len(halves) > 1 else 0.0)


def say_if_another_fit(adata: AnnData, key: str, paths: Mapping[str, str], asked: Mapping[str, object]) -> None:
    """Log in what a flow of the same name differs from the fits that are judged, by methods with these paths."""
    try:
        params = _adata.stored(adata, key)["params"]
    except KeyError:  # no flow, or what is left of one
        return
    there = {"growth_key": None, "frame": "fixed"} | dict(params)
    other = {name: there[name] for name, value in asked.items() if name in there and there[name] != value}
    method = str(there["method"])
    if method not in paths:
        other["method"] = method
    elif there["path"] != paths[method]:
        other["path"] = there["path"]
    if other:
        told = ", ".join(f"{name}={value!r}" for name, value in other.items())
        logger.warning(f'the flow in uns["{key}"] was fitted with {told}: other fits are judged here; pass the same')


def about_estimates(errors: Sequence[Mapping[str, float]]) -> str:
    """Return a sentence about the standard errors, by metric, of distances that were estimated; empty if none was."""
    largest: dict[str, float] = {}
    for one in errors:
        for name, error in one.items():
            largest[name] = max(error, largest.get(name, 0.0))
    if not largest:
        return ""
    named = ", ".join(f"{name} {largest[name]:.2g}" for name in METRICS if name in largest)
    return f"Distances between this many cells are estimated, with standard errors of up to: {named}. "


def say_what_tells_nothing(methods: Sequence[str], energies: Mapping[str, float], noise: float) -> None:
    """Log if nothing moves, or if even the best method is no nearer to held-out snapshots than what needs no model."""
    copied = min((PREVIOUS, NEXT), key=lambda name: energies[name])
    best = min(methods, key=lambda name: energies[name])
    farther = f"{best} is farther from the held-out snapshots, in the mean over times, than"
    if energies[best] > energies[copied] + noise:
        logger.warning(
            f"{farther} a neighbour copied ({copied}; energy distance {energies[best]:.3g} for "
            f"{energies[copied]:.3g}): its flow tells nothing there. Are the times right, and the snapshots of one "
            f"course?"
        )
    elif energies[copied] <= noise:
        logger.warning(
            f"neighbouring snapshots are as near to the held-out ones as sampling noise allows ({copied} copied: "
            f"energy distance {energies[copied]:.3g}): there is nothing to restore. Are the times right?"
        )
    elif energies[best] > energies[INTERPOLATION] + noise:
        logger.info(
            f"{farther} interpolation without a model ({energies[best]:.3g} for {energies[INTERPOLATION]:.3g}): trust "
            f"its flow no more than straight lines, and make sure that the times are right"
        )
