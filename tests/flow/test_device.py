"""The hot loops on a pretend GPU: nothing is left behind on the CPU, and the host never waits for a number.

It is PyTorch's device "meta", whose tensors have shape and precision and no values, watched over by a mode that refuses
operations between devices and those for which a GPU's host would have to wait. (Fake tensors on "cuda" cannot be
sliced where PyTorch was built without CUDA.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from sctraj.flow import flow_matching, integrate
from sctraj.flow.closed_form import closed_form
from sctraj.flow.coupling import entropic, exact, growing, independent, kernel
from sctraj.flow.coupling.sinkhorn import Mixing
from sctraj.flow.flow_matching import Training
from sctraj.flow.problem import METHODS, Problem, make_problems
from sctraj.flow.snapshots import Snapshots, to_device
from sctraj.flow.vector_field import MLP, NeuralField, scaling

aten = torch.ops.aten
GPU = torch.device("meta")
TRAINING = Training(
    None, 8, 2, n_steps=5, batch_size=4, learning_rate=1e-2, weight_decay=0.1, ema_decay=0.9, patience=1
)
WAITS = {  # what has the host wait for the device, or the size of whose result only the device knows
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.multinomial.default,  # which looks whether all its masses are finite
    aten.bincount.default,
}


FOUND = "the host waits|left behind|meta"


class Watched(TorchDispatchMode):
    """Refuses whatever has the host wait for the pretend GPU, and whatever meets a tensor left behind on the CPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        inputs = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        away = [v.device == GPU for v in inputs]
        if any(away):
            masked = function in (aten.index.Tensor, aten.index_put_.default)
            if function in WAITS or (masked and any(v.dtype == torch.bool for v in inputs[1:])):
                raise AssertionError(f"the host waits for {function}")
            # numbers, tensors without dimensions, go along with any operation
            if any(not there and v.dim() for there, v in zip(away, inputs)):
                raise AssertionError(f"left behind on the CPU: a tensor met by {function}")
        if "generator" in kwargs and (any(away) or kwargs.get("device") == GPU):
            kwargs["generator"] = None  # there are none for it
        if function is aten._fused_adamw_.default:
            return None  # it has no such kernel
        found = function(*args, **kwargs)
        # to the device without waiting: what is on the CPU is read before the call returns
        moved = function is aten._to_copy.default and found.device != inputs[0].device
        if moved and (found.device != GPU or not kwargs.get("non_blocking")):
            raise AssertionError(f"the host waits for a copy to {found.device}")
        return found


class Single(TorchFunctionMode):
    """The pretend GPU stands in for mps, which refuses float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def pretend(value):
            return GPU if isinstance(value, torch.device) and value.type == "mps" else value

        found = function(*tree_map(pretend, args), **tree_map(pretend, kwargs or {}))
        if any(isinstance(v, Tensor) and (v.device, v.dtype) == (GPU, torch.float64) for v in tree_leaves(found)):
            raise TypeError(f"mps has no float64, asked for by {function}")
        return found


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    """AdamW as on a GPU."""
    init = flow_matching.AdamW.__init__

    def made(self, *args):
        init(self, *args)
        self.fused = True

    monkeypatch.setattr(flow_matching.AdamW, "__init__", made)


def problems(method: str, path: str | None = None, seeds=(0, 1)) -> list[Problem]:
    rng = torch.Generator().manual_seed(0)
    cells = tuple(torch.randn(n, 3, generator=rng) + n / 10 for n in (12, 15, 9))
    made, _ = make_problems(
        Snapshots((0.0, 1.0, 2.5), cells), method=method, path=path, sigma=None, seeds=seeds, validate=False
    )
    return made


def neural(made: list[Problem]) -> NeuralField:
    d, scored, grows = made[0].snapshots.dimension, made[0].std > 0, made[0].grows
    network = MLP([1 + d, 8, 8, d * (1 + scored) + grows], [torch.Generator() for _ in made], [p.tempo for p in made])
    return NeuralField(network, [scaling(p.snapshots, std=p.std) for p in made]).float()


def moved(made: list[Problem], device: torch.device = GPU) -> list[Problem]:
    return [to_device(problem, device) for problem in made]


def trained(method: str, plant: Any = None) -> set[torch.device]:
    """Run the training loop on the pretend GPU; return where the losses are."""
    made = problems(method)
    streams = [torch.Generator().manual_seed(k) for k in range(len(made))]
    field, made = neural(made).to(GPU), moved(made)
    if plant is not None:
        plant(field, made)
    with Watched():
        batches = flow_matching._batches(made, streams, field, 8, TRAINING.n_steps)
        losses, _ = flow_matching._train(field, batches, None, training=TRAINING, progress=False)
    assert len(losses) == TRAINING.n_steps
    return {loss.device for loss in losses}


@pytest.mark.parametrize("method", METHODS)
def test_training_never_leaves_the_device_nor_waits(method):
    assert trained(method) == {GPU}


def test_training_draws_rows_of_a_large_entropic_plan_without_waiting(monkeypatch):
    monkeypatch.setattr(kernel, "MOST_KEPT", 20)
    assert trained("sb-cfm") == {GPU}


@pytest.mark.parametrize("method", METHODS)
def test_training_on_mps_asks_for_no_float64(method):
    made = problems(method)
    streams, field, mps = [torch.Generator() for _ in made], neural(made), torch.device("mps")
    with Single():
        field, made = field.to(mps, torch.float32), moved(made, mps)
    with Single(), Watched():
        batches = flow_matching._batches(made, streams, field, 8, TRAINING.n_steps)
        losses, _ = flow_matching._train(field, batches, None, training=TRAINING, progress=False)
    assert {loss.device for loss in losses} == {GPU}


@pytest.mark.parametrize("ask", [Tensor.double, lambda x: x.new_ones(2, dtype=torch.float64)])
def test_float64_on_mps_is_found(ask):
    with Single(), pytest.raises(TypeError, match="no float64"):
        ask(torch.ones(3, device=torch.device("mps")))


@pytest.mark.parametrize("at", ["tempo", "shift", "x0", "pairs"])
def test_a_tensor_left_on_the_cpu_is_found(at):
    def plant(field, made):
        if at == "tempo":
            field.network.tempo = torch.ones(2, 1, 1, dtype=torch.float64)
        if at == "shift":
            field.shift = torch.zeros(2, 1, 3)
        if at == "x0":
            object.__setattr__(made[0].snapshots, "points", tuple(torch.zeros(n, 3) for n in (12, 15, 9)))
        if at == "pairs":
            object.__setattr__(made[0].couplings[0].pairs, "mass0", torch.ones(len(made[0].couplings[0].pairs.i)))

    with pytest.raises(Exception, match=FOUND):
        trained("uot-cfm", plant=plant)


@pytest.mark.parametrize(
    "wait",
    [
        lambda loss: loss.sum().item(),
        lambda loss: bool(loss.isfinite().all()),
        lambda loss: loss.tolist(),
        lambda loss: loss[loss > 0],
        lambda loss: torch.nonzero(loss),
        lambda loss: loss.cpu(),
        lambda loss: loss + torch.ones(2).to(loss.device),
        lambda loss: torch.equal(loss, loss),
        lambda loss: torch.multinomial(loss, 1),
    ],
)
def test_a_wait_in_the_training_loop_is_found(monkeypatch, wait):
    loss = flow_matching._loss

    def planted(*args):
        found = loss(*args)
        wait(found)
        return found

    monkeypatch.setattr(flow_matching, "_loss", planted)
    with pytest.raises(Exception, match=FOUND):
        trained("ot-cfm")


def test_early_stopping_waits_once_a_look_and_for_no_more(monkeypatch):
    monkeypatch.setattr(flow_matching, "EVALUATE_EVERY", 2)
    made = problems("ot-cfm")
    streams, looks = [torch.Generator() for _ in made], []
    monkeypatch.setattr(flow_matching.EarlyStopping, "done", lambda self: looks.append(self.waited.device) or False)
    field, made = neural(made).to(GPU), moved(made)
    with Watched():
        batches = flow_matching._batches(made, streams, field, 8, 5)
        held_back = next(flow_matching._batches(made, streams, field, 8, 1))
        flow_matching._train(field, batches, held_back, training=TRAINING, progress=False)
    assert looks == [GPU, GPU]


def fields() -> Iterator[tuple[str, Any]]:
    for method, path in (("uot-cfm", None), ("ot-cfm", None), ("sb-cfm", None)):
        yield f"neural {method}", lambda method=method, path=path: neural(problems(method, path))
        yield (
            f"closed-form {method}",
            lambda method=method, path=path: closed_form(
                problems(method, path), device=torch.device("cpu"), dtype=torch.float32
            ),
        )


FIELDS = dict(fields())
NEURAL = [name for name in FIELDS if name.startswith("neural")]
TIMES = {"numbers": (0.5, 2.0), "tensors": (torch.tensor([0.5, 0.75]), torch.tensor([2.0, 1.0]))}


def integrated(name: str, solver: str, times: str, *, ensemble: bool = False, plant: Any = None) -> torch.device:
    """Integrate on the pretend GPU; return where the cells end up."""
    field, span, rng = FIELDS[name]().to(GPU), TIMES[times], torch.Generator()
    if plant is not None:
        plant(field)
    x = torch.zeros(2, 7, 3, device=GPU)
    if ensemble:
        field, x, span = field.ensemble(), x[:1], TIMES["numbers"]
    with Watched():
        if solver == "sde":
            found = integrate.simulate(field, x, *span, sigma=0.3, n_steps=4, rng=rng)
        else:
            found = integrate.push(field, x, *span, integrate.Integration(solver, 4, 1e-3))
    assert found.shape == x.shape
    return found.device


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("solver", ["euler", "rk4"])
@pytest.mark.parametrize("name", FIELDS)
def test_integration_in_fixed_steps_never_leaves_the_device_nor_waits(name, solver, times):
    assert integrated(name, solver, times) == GPU
    assert integrated(name, solver, times, ensemble=True) == GPU


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("name", [name for name in FIELDS if "sb-cfm" in name])
def test_simulation_never_leaves_the_device_nor_waits(name, times):
    assert integrated(name, "sde", times) == GPU


@pytest.mark.parametrize("name", ["neural ot-cfm", "closed-form ot-cfm"])
@pytest.mark.parametrize(
    "wait",
    [lambda x: x.sum().item(), lambda x: bool((x > 0).all()), lambda x: x[x > 0], lambda x: x.cpu(),
     lambda x: x + torch.ones(3)],
)  # fmt: skip
def test_a_wait_or_a_tensor_left_behind_in_a_step_is_found(name, wait):
    def plant(field):
        evaluate = field.evaluate
        field.evaluate = lambda t, x: (evaluate(t, x), wait(x))[0]

    with pytest.raises(Exception, match=FOUND):
        integrated(name, "euler", "numbers", plant=plant)


PLANS = {
    "growing": lambda interval: growing(interval, torch.Generator()),
    "independent": independent,
    "exact": exact,
    "entropic": lambda interval: entropic(interval, epsilon=2.0),
}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", PLANS)
def test_pairs_are_drawn_without_waiting(monkeypatch, name, whole):
    plan = PLANS[name](problems("ot-cfm")[0].snapshots.intervals()[0])
    monkeypatch.setattr(kernel, "MOST_KEPT", 2**24 if whole else 20)
    plan = to_device(plan, GPU)
    with Watched():
        i, j = plan.sample(50, torch.Generator())
    assert i.device == j.device == GPU
    assert i.shape == j.shape == (50,)


@pytest.mark.parametrize("whole", [True, False])
def test_what_sinkhorn_multiplies_by_stays_on_the_device(monkeypatch, whole):
    """Its loop itself waits, by design: it ends where the error is small."""
    monkeypatch.setattr(kernel, "MOST_KEPT", 2**24 if whole else 20)
    ends = [torch.zeros(n, 3, dtype=torch.float64, device=GPU) for n in (12, 15)]
    log_masses = [torch.zeros(len(x), dtype=torch.float64, device=GPU) for x in ends]
    with Watched():
        made = kernel.Kernel(*ends, *log_masses, keep=False)
        found = [made.soft_minimum(log_masses[int(side)], 1.0, rows=side) for side in (False, True)]
        plan = made.plan(*log_masses, 1.0)
        found += [plan.columns(log_masses[0]), plan.there_and_back(log_masses[1], log_masses[0])]
        mix = Mixing(log_masses[1], 1.0)
        found += [mix(log_masses[1], log_masses[1]) for _ in range(3)]
        if whole:
            made = kernel.Kernel(*ends, *log_masses)
            made._absorb(*log_masses, 1.0)
    assert {part.device for part in found} == {GPU}
    assert [len(part) for part in found] == [15, 12, 15, 15, 15, 15, 15]
