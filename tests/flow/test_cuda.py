"""What a real CUDA device gives, beside a CPU; skipped where there is none (test_device.py pretends one)."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from sctraj.flow import flow_matching, plans
from sctraj.flow.closed_form import closed_form
from sctraj.flow.coupling import entropic, kernel, unbalanced
from sctraj.flow.flow_matching import Fit, Training, fit
from sctraj.flow.integrate import Integration, simulate, transport
from sctraj.flow.plans import Plans
from sctraj.flow.problem import METHODS, Problem, make_problems
from sctraj.flow.snapshots import Snapshots

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
CPU, GPU = torch.device("cpu"), torch.device("cuda")
TRAINING = Training(
    None, 32, 2, n_steps=60, batch_size=32, learning_rate=1e-2, weight_decay=1e-4, ema_decay=0.9, patience=None
)


def snapshots() -> Snapshots:
    rng = torch.Generator().manual_seed(0)
    cells = tuple(torch.randn(n, 3, generator=rng) + k for k, n in enumerate((120, 150, 90)))
    return Snapshots((0.0, 1.0, 2.5), cells)


def problems(method: str, *, validate: bool = False, **how) -> tuple[list[Problem], list[Problem]]:
    return make_problems(
        snapshots(), method=method, path=None, sigma=None, seeds=(0, 1), validate=validate, plans=Plans(**how)
    )


def fitted(method: str, *, training: Training = TRAINING, dtype: torch.dtype = torch.float32) -> Fit:
    made, held_back = problems(method, validate=training.patience is not None)
    return fit(made, validation=held_back, training=training, device=GPU, dtype=dtype, progress=False)


def weights(found: Fit) -> list[np.ndarray]:
    return list(found.vector_field.to_arrays().values())


@pytest.mark.parametrize("patience", [None, 1])
@pytest.mark.parametrize("method", METHODS)
def test_steps_replayed_are_the_steps(monkeypatch, method, patience):
    training = replace(TRAINING, patience=patience)
    replayed = fitted(method, training=training)
    again = fitted(method, training=training)
    monkeypatch.setattr(flow_matching, "Replayed", lambda act, device: act)
    plain = fitted(method, training=training)
    assert replayed.loss.shape == plain.loss.shape
    for one, same, other in zip(weights(replayed), weights(again), weights(plain), strict=True):
        np.testing.assert_allclose(one, same, rtol=1e-4, atol=1e-4)  # sums by atomics, if any, in any order
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(replayed.loss, plain.loss, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(replayed.validation_loss, plain.validation_loss, rtol=1e-2, atol=1e-3)


def test_the_loss_falls_as_on_a_cpu():
    made, _ = problems("ot-cfm")
    on_cpu = fit(made, validation=[], training=TRAINING, device=CPU, dtype=torch.float32, progress=False)
    last = [found.loss[-10:].mean(0) for found in (on_cpu, fitted("ot-cfm"))]
    torch.testing.assert_close(last[1], last[0], rtol=0.2, atol=0)  # other random numbers
    assert float((last[1] / on_cpu.loss[0]).max()) < 0.7


@pytest.fixture
def watched(monkeypatch):
    """Training loops in which a wait of the host is an error."""
    train = flow_matching._train

    def run(*args, **kwargs):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it need not notice all
                torch.cuda.set_sync_debug_mode("error")
            return train(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(flow_matching, "_train", run)
    monkeypatch.setattr(flow_matching, "Replayed", lambda act, device: act)  # a recording ends with a wait


@pytest.mark.parametrize("method", METHODS)
def test_the_host_waits_for_nothing_in_the_training_loop(watched, method):
    found = fitted(method)
    assert found.loss.shape == (TRAINING.n_steps, 2)
    assert bool(found.loss.isfinite().all())


def test_a_wait_in_the_training_loop_is_found(monkeypatch, watched):
    loss = flow_matching._loss
    monkeypatch.setattr(flow_matching, "_loss", lambda *args: (found := loss(*args), float(found.sum()))[0])
    with pytest.raises(RuntimeError, match="synchroniz"):
        fitted("ot-cfm")


class Ours(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.1), nn.SiLU(), nn.Linear(16, 3))

    def forward(self, t, x):
        return self.layers(torch.cat([t, x], -1))


def test_a_users_module_is_trained():
    found = fitted("ot-cfm", training=replace(TRAINING, module=Ours()))
    assert float((found.loss[-10:].mean(0) / found.loss[0]).max()) < 0.9


@pytest.mark.parametrize("kind", ["neural", "closed-form"])
@pytest.mark.parametrize("method", METHODS)
def test_fields_and_flows_are_those_of_a_cpu(method, kind):
    if kind == "neural":
        field = fitted(method, dtype=torch.float64).vector_field
    else:
        field = closed_form(problems(method)[0], device=GPU, dtype=torch.float64)
    x = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(1)).double()
    moved, at = {}, {}
    for device in (GPU, CPU):
        field = field.to(device)
        there = x.to(device)
        at[device] = field.evaluate(0.4, there)
        found = transport(field, there, 0.4, 2.0, Integration("rk4", 10, 1e-4))
        moved[device] = found.points.cpu(), found.log_mass.cpu()
    for name in ("velocity", "score", "growth"):
        one, other = (getattr(at[device], name) for device in (GPU, CPU))
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one.cpu(), other, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(moved[GPU], moved[CPU], rtol=1e-6, atol=1e-6)


def test_simulation_stays_on_the_device():
    field = fitted("sb-cfm").vector_field
    rng = torch.Generator().manual_seed(0)
    end = simulate(field, torch.zeros(2, 500, 3, device=GPU), 0.0, 1.0, sigma=0.3, n_steps=20, rng=rng)
    assert end.device.type == "cuda"
    assert bool(end.isfinite().all())


@pytest.mark.parametrize("whole", [True, False])
def test_plans_are_those_of_a_cpu(monkeypatch, whole):
    monkeypatch.setattr(kernel, "MOST_KEPT", 2**24 if whole else 1000)
    interval = snapshots().intervals()[0]
    pairs = []
    for device in (GPU, CPU):
        one = entropic(interval, epsilon=0.5, tolerance=1e-6, device=device)
        soft = unbalanced(interval, epsilon=0.5, penalty=2.0, tolerance=1e-6, device=device)
        assert one.f.device.type == device.type
        kin = soft.descendants(soft.x1), soft.ancestors(soft.x0)
        pairs.append([v.cpu() for v in (one.matrix(), soft.matrix(), *kin)])
    for found, expected in zip(*pairs):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("whole", [True, False])
def test_entropic_pairs_are_drawn_on_the_device(monkeypatch, whole):
    plan = entropic(snapshots().intervals()[0], epsilon=0.5, device=GPU)
    monkeypatch.setattr(kernel, "MOST_KEPT", 2**24 if whole else 1000)
    i, j = plan.sample(200_000, torch.Generator(GPU).manual_seed(0))
    drawn = torch.zeros(120, 150, dtype=torch.float64, device=GPU)
    drawn.index_put_((i, j), torch.full_like(i, 1 / len(i), dtype=torch.float64), accumulate=True)
    assert float((drawn - plan.matrix()).abs().sum()) < 0.25  # 18,000 cells of the table


def test_entropic_plans_are_solved_on_the_device_and_come_back(monkeypatch):
    asked = []
    monkeypatch.setattr(plans, "entropic", lambda *args, **how: asked.append(how["device"]) or entropic(*args, **how))
    there, here = problems("sb-cfm", device=GPU)[0][0], problems("sb-cfm")[0][0]
    assert asked == [GPU, GPU, None, None]
    for one, other in zip(there.couplings, here.couplings):
        assert one.f.device == CPU
        i, j = one.sample(50, torch.Generator().manual_seed(0))
        same_i, same_j = other.sample(50, torch.Generator().manual_seed(0))
        assert int((i != same_i).sum() + (j != same_j).sum()) <= 2  # rounding at a boundary


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second CUDA device")
def test_the_second_device_serves_as_the_first(monkeypatch):
    monkeypatch.setattr(kernel, "MOST_KEPT", 1000)
    second = torch.device("cuda:1")
    made, _ = problems("sb-cfm", device=second)
    found = fit(made, validation=[], training=TRAINING, device=second, dtype=torch.float32, progress=False)
    for one, other in zip(weights(found), weights(fitted("sb-cfm")), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-2, atol=1e-2)
