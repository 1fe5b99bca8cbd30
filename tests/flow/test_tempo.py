"""Laws of a network's clock: slow on growing plans, so that one sample's own age is no change of the course's speed."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from sctraj.flow import problem
from sctraj.flow.flow_matching import Training, fit
from sctraj.flow.problem import METHODS, SLOW_TEMPO, make_problems
from sctraj.flow.snapshots import Snapshots
from sctraj.flow.vector_field import MLP, NeuralField, VectorField

TIMES = (0.0, 1.0, 2.0, 3.0, 4.0)
LATE = 0.5  # days by which the third sample is older than its label
TRAINING = Training(None, 32, 2, 600, 64, 5e-3, 1e-5, 0.99, None)


def course() -> Snapshots:
    """A cloud that moves at the speed 2 along the first axis, one of whose samples is older than is said."""
    rng = torch.Generator().manual_seed(0)
    ages = np.array(TIMES) + LATE * (np.arange(len(TIMES)) == 2)
    clouds = [torch.randn(80, 2, generator=rng, dtype=torch.float64) for _ in TIMES]
    return Snapshots(TIMES, tuple(x - x.mean(0) + torch.tensor([2.0 * age, 0.0]) for x, age in zip(clouds, ages)))


def problems(method: str):
    return make_problems(course(), method=method, path=None, sigma=None, seeds=[0], validate=False)[0]


@cache
def fitted(tempo: float) -> VectorField:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(problem, "SLOW_TEMPO", tempo)
        made = problems("uot-cfm")
        return fit(made, validation=[], training=TRAINING, device=torch.device("cpu"), dtype=torch.float64,
                   progress=False).vector_field  # fmt: skip


def speeds(field: VectorField) -> np.ndarray:
    """Speed along the first axis at the middle of every interval, at the cloud's middle then."""
    return np.array([float(field(t, np.array([[2.0 * t, 0.0]]))[0, 0]) for t in (0.5, 1.5, 2.5, 3.5)])


def test_an_age_that_is_off_changes_the_speed_less_at_a_slow_tempo():
    slow, full = (np.ptp(speeds(fitted(tempo))) for tempo in (SLOW_TEMPO, 1.0))
    assert full > 1  # of the plans' 2 (1 + LATE) against 2 (1 - LATE)
    assert slow < 0.75 * full


@pytest.mark.parametrize("method", METHODS)
def test_only_growing_plans_slow_the_clock(method):
    (made,) = problems(method)
    assert made.tempo == (SLOW_TEMPO if method == "uot-cfm" else 1)


def test_a_tempo_is_a_factor_of_time_for_each_member():
    slow, plain = (MLP([3, 8, 2], [torch.Generator().manual_seed(k) for k in (1, 2)], tempos)
                   for tempos in ([0.25, 3.0], None))  # fmt: skip
    t, x = torch.linspace(-1, 4, 10).expand(2, 10)[..., None], torch.ones(2, 10, 2)
    factors = torch.tensor([0.25, 3.0])[:, None, None]
    torch.testing.assert_close(slow.double()(t.double(), x.double()), plain.double()(factors * t, x.double()))


def test_a_stored_field_keeps_its_tempo():
    field = fitted(SLOW_TEMPO)
    again = NeuralField.from_arrays(field.to_arrays())
    assert speeds(again).tolist() == speeds(field).tolist()
    assert float(again.network.tempo) == SLOW_TEMPO
