"""Laws of the fits: they learn the known maps, no member sees another's data, and units do not matter."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from itertools import pairwise, product
from types import SimpleNamespace

import numpy as np
import ot
import pytest
import torch
from torch import Tensor, nn

from sctraj.flow import flow_matching, problem
from sctraj.flow.clouds import share_astray, spacing
from sctraj.flow.coupling import GrowingPlan, WeightedPairs
from sctraj.flow.flow_matching import EVALUATE_EVERY, Fit, Training, fit, pairs_a_step, pick_device
from sctraj.flow.hold_out import hold_out_problems
from sctraj.flow.integrate import Integration, push, simulate, transport
from sctraj.flow.probability_path import Straight
from sctraj.flow.problem import METHODS, Problem, make_problems
from sctraj.flow.snapshots import Snapshots
from sctraj.flow.vector_field import MLP, NeuralField, VectorField

CPU = torch.device("cpu")
QUICK = Training(
    module=None,
    width=16,
    depth=2,
    n_steps=60,
    batch_size=32,
    learning_rate=1e-2,
    weight_decay=1e-5,
    ema_decay=0.9,
    patience=None,
)
TIMES = (0.0, 1.0, 4.0, 6.0)


def make(times=TIMES, sizes=(40, 30, 50, 35), *, seed=0, shift=0.0, unit=1.0, hours=1.0, delay=0.0) -> Snapshots:
    rng = torch.Generator().manual_seed(seed)
    clouds = [torch.randn(n, 2, generator=rng, dtype=torch.float64) + t for n, t in zip(sizes, times)]
    return Snapshots(tuple(hours * t + delay for t in times), tuple(unit * x + shift for x in clouds))


def train(problems, validation=(), training=QUICK, dtype=torch.float64) -> Fit:
    return fit(problems, validation=validation, training=training, device=CPU, dtype=dtype, progress=False)


def quick(snapshots: Snapshots, *, method="ot-cfm", sigma=None, seeds=(0,), training=QUICK, dtype=torch.float64) -> Fit:
    validate = training.patience is not None
    problems, validation = make_problems(
        snapshots, method=method, path=None, sigma=sigma, seeds=seeds, validate=validate
    )
    return train(problems, validation, training, dtype)


def weights(field: VectorField) -> dict[str, Tensor]:
    return dict(field.state_dict())


def gaussian(n: int, mean, covariance, seed: int) -> Tensor:
    """Normal cells whose sample mean and covariance are exactly the ones given: no noise but in higher moments."""
    z = np.random.default_rng(seed).standard_normal((n, len(mean)))
    z -= z.mean(0)
    z = z @ np.linalg.inv(np.linalg.cholesky(np.cov(z.T, ddof=0))).T
    return torch.tensor(z @ np.linalg.cholesky(np.asarray(covariance)).T + np.asarray(mean))


# ---- what is learnt


def test_ot_cfm_learns_the_optimal_map_between_gaussians_over_uneven_gaps():
    times, n = (1.0, 2.0, 6.0), 1000
    means = np.array([[0.0, 0.0], [1.0, 0.5], [5.0, 2.5]])  # one speed: over ranks of times it would jump
    covariances = np.array([[[1.0, 0.6], [0.6, 1.5]], [[2.0, -0.8], [-0.8, 0.8]], [[0.5, 0.2], [0.2, 2.0]]])
    points = tuple(gaussian(n, *law, seed).float() for seed, law in enumerate(zip(means, covariances)))
    training = replace(QUICK, width=64, n_steps=2000, batch_size=128, ema_decay=0.99)
    learnt = quick(Snapshots(times, points), sigma=0.05, training=training, dtype=torch.float32).vector_field
    for k in (0, 1):
        law = means[k], means[k + 1], covariances[k], covariances[k + 1]
        a, b = ot.gaussian.bures_wasserstein_mapping(*law)
        x0 = torch.tensor(np.random.default_rng(9).multivariate_normal(means[k], covariances[k], 1000)).float()
        truth = x0 @ torch.tensor(a).float() + torch.tensor(b).float()
        x1 = push(learnt, x0[None], times[k], times[k + 1], Integration("rk4", 20, 1e-5))[0]
        # against the displacement beyond the mean's own, so that a mere shift would score one; the plan of a thousand
        # cells scatters by 0.19 about the map, and the network rounds off the kink in time between the intervals
        deformation = (truth - x0) - (truth - x0).mean(0)
        assert float((x1 - truth).norm() / deformation.norm()) < 0.25


BRIDGE = {"a": 1.0, "b": 2.0, "sigma": 0.6, "t0": 1.3, "t1": 4.1}


def bridge_variance(s: float) -> float:
    """Of the Schroedinger bridge between N(0, a^2) and N(0, b^2) at the fraction s of the interval."""
    a, b, spread = BRIDGE["a"], BRIDGE["b"], BRIDGE["sigma"] ** 2 * (BRIDGE["t1"] - BRIDGE["t0"])
    c = (-spread + math.sqrt(spread**2 + 4 * a**2 * b**2)) / 2
    return (1 - s) ** 2 * a**2 + s**2 * b**2 + 2 * s * (1 - s) * c + spread * s * (1 - s)


@cache
def bridge() -> VectorField:
    cells = (gaussian(600, (0, 0), BRIDGE[name] ** 2 * np.eye(2), seed).float() for seed, name in enumerate("ab"))
    snapshots = Snapshots((BRIDGE["t0"], BRIDGE["t1"]), tuple(cells))
    training = replace(QUICK, width=48, n_steps=1000, batch_size=512, ema_decay=0.99)
    learnt = quick(snapshots, method="sb-cfm", sigma=BRIDGE["sigma"], training=training, dtype=torch.float32)
    return learnt.vector_field


@pytest.mark.parametrize("law", ["ode", "sde"])
@pytest.mark.parametrize("forwards", [True, False])
def test_sb_cfm_has_the_marginals_of_the_bridge(law, forwards):
    field, length = bridge(), BRIDGE["t1"] - BRIDGE["t0"]
    start = 0.0 if forwards else 1.0
    cells = gaussian(4000, (0, 0), bridge_variance(start) * np.eye(2), 7).float()[None]
    for s in (0.25, 0.5, 0.75, 1 - start):
        t0, t1 = (BRIDGE["t0"] + u * length for u in (start, s))
        if law == "ode":
            y = push(field, cells, t0, t1, Integration("rk4", 20, 1e-5))
        else:
            rng = torch.Generator().manual_seed(0)
            y = simulate(field, cells, t0, t1, sigma=BRIDGE["sigma"], n_steps=100, rng=rng)
        # training noise, and four standard errors of 8000 squares: 6%
        assert float(y.var(1).mean()) == pytest.approx(bridge_variance(s), rel=0.12)


def test_the_score_is_that_of_the_bridge():
    field, s = bridge(), 0.5
    x = gaussian(1000, (0, 0), bridge_variance(s) * np.eye(2), 3).float()[None]
    t = BRIDGE["t0"] + s * (BRIDGE["t1"] - BRIDGE["t0"])
    truth = -x / bridge_variance(s)
    # relative rms error: 600 cells a side are 4% off in scale, and training leaves as much again and more in the tails
    assert float((field.score(t, x) - truth).norm() / truth.norm()) < 0.25


GROUPS = {"t0": 1.5, "t1": 4.0, "weights": ((1 / 3, 2 / 3), (1 / 2, 1 / 2))}


def growing_groups(n=60) -> Snapshots:
    """Two groups twenty deviations apart, moved by three, whose shares change."""
    rng = np.random.default_rng(1)
    ends = (rng.normal(size=(2 * n, 2)) + np.repeat([[0, 0], [20, 0]], n, 0) + [0, rise] for rise in (0, 3))
    masses = (torch.tensor(np.repeat(weights, n)) for weights in GROUPS["weights"])
    return Snapshots((GROUPS["t0"], GROUPS["t1"]), tuple(map(torch.tensor, ends)), tuple(masses))


@cache
def growing_field() -> VectorField:
    training = replace(QUICK, width=32, n_steps=800, batch_size=256, ema_decay=0.99)
    return quick(growing_groups(), method="uot-cfm", training=training).vector_field


def test_uot_cfm_learns_the_growth_rates_of_two_groups():
    field, length = growing_field(), GROUPS["t1"] - GROUPS["t0"]
    assert field.grows
    for s in (0.1, 0.5, 0.9):
        for centre, m0, m1 in zip((0.0, 20.0), *GROUPS["weights"]):
            here = torch.tensor([[[centre, 3 * s]]], dtype=torch.float64)
            rate = (m1 - m0) / ((1 - s) * m0 + s * m1) / length
            found = float(field.growth(GROUPS["t0"] + s * length, here))
            # rates of 0.16 and -0.1; what the pairs of a group differ by at their ends and the head's own error
            assert found == pytest.approx(rate, abs=0.04)


def test_uot_cfm_carries_two_groups_to_their_weights():
    n, snapshots = 60, growing_groups()
    ends = GROUPS["t0"], GROUPS["t1"]
    moved = transport(growing_field(), snapshots.points[0][None], *ends, Integration("rk4", 20, 1e-5))
    carried = (snapshots.mass[0] * moved.log_mass[0].exp()).reshape(2, n).sum(1)
    # an error of the rate of 0.02 over 2.5 units of time is one of 5%
    torch.testing.assert_close(carried, torch.tensor([0.5, 0.5]).double(), rtol=0, atol=0.025)


def test_the_growth_head_does_not_take_from_the_velocity():
    snapshots, x = growing_groups(), torch.tensor([[[0.0, 1.5], [20.0, 1.5]]], dtype=torch.float64)
    velocity = growing_field().velocity(2.75, x)
    # three in 2.5 units of time, in either group; what growth of first order, 4 x / shift, leaves undone
    pairs, _ = make_problems(snapshots, method="uot-cfm", path=None, sigma=None, seeds=(0,), validate=False)
    listed = pairs[0].listed(0)
    step = (snapshots.points[1][listed.j] - snapshots.points[0][listed.i]) / 2.5
    for k in (0, 1):
        own = (listed.i // 60 == k) & (listed.j // 60 == k)  # a hundredth crosses over, twenty away
        mean = (listed.middle[own] @ step[own]) / listed.middle[own].sum()
        torch.testing.assert_close(velocity[0, k], mean, rtol=0, atol=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_is_finite_and_falls(method):
    loss = quick(make(), method=method, training=replace(QUICK, n_steps=150)).loss
    assert loss.shape == (150, 1)
    assert bool(loss.isfinite().all())
    assert float(loss[-30:].mean()) < 0.8 * float(loss[:5].mean())  # noise of a mean of 30: a few percent


def test_a_diverging_fit_is_an_error():
    with pytest.raises(RuntimeError, match="learning_rate"):
        quick(make(), training=replace(QUICK, learning_rate=1e30))


def test_a_loss_that_only_rises_is_an_error():
    # finite to the end, as the schedule lets the rate fall in time
    with pytest.raises(RuntimeError, match=r"expected a loss that falls, found .* learning_rate"):
        quick(make(), training=replace(QUICK, learning_rate=1e3, n_steps=100))


def test_whole_numbers_may_be_floats():
    training = replace(QUICK, width=8.0, depth=2.0, n_steps=3.0, batch_size=16.0)
    assert quick(make(), training=training).loss.shape == (3, 1)
    for wrong in (2.5, float("inf"), float("nan"), 0):
        with pytest.raises(ValueError, match="expected n_steps to be a whole number of at least 1"):
            replace(QUICK, n_steps=wrong)


@pytest.mark.parametrize("batch_size", [1, 3, 128])
@pytest.mark.parametrize("n_intervals", [1, 5, 6, 7, 18, 700])
def test_a_step_has_as_many_pairs_of_every_interval(batch_size, n_intervals):
    n = pairs_a_step(batch_size, n_intervals)
    each, rest = divmod(n, n_intervals)
    assert rest == 0
    if n_intervals <= 5:
        assert each == batch_size
    else:  # of a longer course as many in all as of five intervals, rounded up to an even share
        assert 5 * batch_size <= n < 5 * batch_size + n_intervals


def test_batches_are_shared_by_a_long_course_and_validation_is_not(monkeypatch):
    sizes, batches = [], flow_matching._batches

    def watched(*args):
        for batch in batches(*args):
            sizes.append(batch.t.shape[1])
            yield batch

    monkeypatch.setattr(flow_matching, "_batches", watched)
    rng = torch.Generator().manual_seed(0)
    snapshots = Snapshots(tuple(float(k) for k in range(9)), tuple(torch.randn(30, 2, generator=rng) for _ in range(9)))
    quick(snapshots, method="ot-cfm", training=replace(QUICK, n_steps=2, batch_size=32, patience=1))
    assert sizes == [8 * 512, 160, 160]  # eight intervals, the pairs of five


def test_all_of_a_long_course_is_learnt():
    # from place to place along a line, each gap at its own speed: what a step has of each gap is enough
    times = tuple(float(k) for k in range(13))
    speeds = 1 + 0.5 * torch.sin(torch.arange(12.0))
    places = torch.cat([torch.zeros(1), speeds.cumsum(0)])
    rng = torch.Generator().manual_seed(0)
    points = tuple(place + 0.1 * torch.randn(60, 2, generator=rng) for place in places)
    training = replace(QUICK, width=48, n_steps=600, batch_size=64, ema_decay=0.99)
    field = quick(Snapshots(times, points), method="ot-cfm", training=training).vector_field
    found = [field.velocity(k + 0.5, points[k][None] + speeds[k] / 2)[0].mean() for k in range(12)]
    torch.testing.assert_close(torch.stack(found).double(), speeds.double(), rtol=0, atol=0.1)


class Constant(nn.Module):
    """The same velocity, and growth, everywhere: what is least wrong on the whole."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(columns))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.value.expand(len(x), -1) + 0 * x[:, :1]


AT_REST = replace(QUICK, n_steps=400, batch_size=512, learning_rate=0.03, weight_decay=0.0, ema_decay=0.99)


def test_an_interval_counts_by_the_square_of_its_length():
    # a cloud that moves at one speed for one unit of time, and back at the same for three
    start = make(sizes=(40, 1, 1, 1)).points[0]
    places = torch.tensor([[0.0, 0.0], [1.0, 2.0], [-2.0, -4.0]]).double()
    snapshots = Snapshots((0.0, 1.0, 4.0), tuple(start + place for place in places))
    field = quick(snapshots, training=replace(AT_REST, module=Constant(2))).vector_field
    expected = (1 - 9) / (1 + 9) * places[1]
    torch.testing.assert_close(field.velocity(0.5, start[None, :1])[0, 0], expected, rtol=1e-2, atol=0)


def test_growth_counts_by_the_mass_that_grows():
    # half the population becomes nearly all of it, the rest goes: relative to the whole, the whole does not grow
    index, mass0, mass1 = torch.arange(2), torch.tensor([0.5, 0.5]).double(), torch.tensor([0.98, 0.02]).double()
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0]]).double()
    plan = GrowingPlan(WeightedPairs(index, index, mass0, mass1), x, x)
    problem = Problem(Snapshots((1.5, 4.0), (x, x), (mass0, mass1)), (plan,), Straight(0.1), 0)
    field = train([problem], training=replace(AT_REST, module=Constant(3))).vector_field
    # if all pairs drawn counted the same: sum of (m0 + m1) / 2 log(m1 / m0) / 2.5, -0.14
    assert float(field.growth(2.0, x[None, :1])) == pytest.approx(0, abs=0.02)  # batches of 512, some hundred of them


def test_the_loss_is_the_velocitys_error_the_scores_times_the_std_and_a_tenth_of_the_growths():
    t, x, velocity, noise, growth, weight, std = (
        torch.randn(1, 50, n, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        for k, n in enumerate((1, 2, 2, 2, 1, 1, 1))
    )
    weight, std = weight.exp(), std.exp()
    # by 1, 2 and 3 off what is looked for; the score is -noise / std
    found = torch.cat([velocity + 1, -noise / std + 2, growth + 3], -1)
    batch = flow_matching._Batch(t, x, velocity, noise, growth, weight, std)
    loss = flow_matching._loss(SimpleNamespace(network=lambda t, x: found), batch)
    expected = (weight + (2 * std).square() + 0.1 * 9 * weight).mean()
    torch.testing.assert_close(loss, expected[None])


def test_the_mean_of_a_short_fits_weights_is_near_the_last():
    short = [
        replace(QUICK, ema_decay=decay, learning_rate=rate) for decay, rate in ((0.999, 1e-2), (0, 1e-2), (0, 1e-12))
    ]
    mean, last, first = (
        nn.utils.parameters_to_vector(quick(make(), training=t).vector_field.parameters()) for t in short
    )
    # a memory of 1000 steps would have 0.94 of the first weights after 60
    assert float((mean - last).norm() / (first - last).norm()) < 0.05


# ---- members


@pytest.mark.parametrize("method", METHODS)
def test_members_in_one_batch_are_single_fits(method):
    snapshots, seeds = make(), (3, 1, 8)
    together = weights(quick(snapshots, method=method, seeds=seeds).vector_field)
    for m, seed in enumerate(seeds):
        for name, alone in weights(quick(snapshots, method=method, seeds=(seed,)).vector_field).items():
            # the same numbers in another shape of matmul: rounding, over 60 steps
            torch.testing.assert_close(together[name][m], alone[0], rtol=0, atol=1e-10)


def test_same_seed_same_bits():
    first, second, other = (weights(quick(make(), method="sb-cfm", seeds=(s,)).vector_field) for s in (4, 4, 5))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["network.weights.0"], other["network.weights.0"])


@pytest.mark.parametrize("method", METHODS)
def test_global_random_state_is_untouched(method):
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    quick(make(), method=method, training=replace(QUICK, n_steps=3, patience=1))
    assert torch.equal(torch.get_rng_state(), torch_before)
    after = np.random.get_state()  # noqa: NPY002
    assert np.array_equal(after[1], numpy_before[1])
    assert after[2:] == numpy_before[2:]


NOISES = {"noise": 30, "far-away": 30, "fewer": 11, "more": 90}


def tampered(snapshots: Snapshots, k: int, kind: str) -> Snapshots:
    rng = torch.Generator().manual_seed(99)
    cells = torch.randn(NOISES[kind], 2, generator=rng, dtype=torch.float64) * (1e4 if kind == "far-away" else 1)
    points = (*snapshots.points[:k], cells, *snapshots.points[k + 1 :])
    return Snapshots(snapshots.times, points)


def all_folds(snapshots: Snapshots, method: str, patience: int | None, dtype: torch.dtype) -> tuple[list[int], Fit]:
    held_out, problems, validation = hold_out_problems(
        snapshots, method=method, path=None, sigma=None, seeds=(0, 1), validate=patience is not None
    )
    return held_out, train(problems, validation, replace(QUICK, n_steps=50, patience=patience), dtype)


@pytest.mark.parametrize("patience", [None, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_a_held_out_snapshot_leaves_no_trace(method, dtype, patience):
    snapshots = make(times=(0.0, 1.0, 4.0, 6.0, 6.5), sizes=(40, 30, 50, 35, 20))
    held_out, clean = all_folds(snapshots, method, patience, dtype)
    assert set(held_out) == {1, 2, 3}
    before = weights(clean.vector_field)
    for k, kind in zip((1, 2, 3, 2), NOISES):
        _, fitted = all_folds(tampered(snapshots, k, kind), method, patience, dtype)
        after = weights(fitted.vector_field)
        for m, left_out in enumerate(held_out):
            same = [torch.equal(before[name][m], after[name][m]) for name in before]  # shift and scale among them
            if left_out == k:
                assert all(same)
                assert torch.equal(clean.loss[:, m], fitted.loss[:, m])
            else:  # these have seen it, and it shows
                assert not torch.equal(before["network.weights.0"][m], after["network.weights.0"][m])


# ---- units


@pytest.mark.parametrize("method", METHODS)
def test_units_of_length_and_time_and_their_origins_do_not_matter(method):
    unit, hours, shift, delay = 1000.0, 24.0, -3.0e4, 500.0
    plain = quick(make(), method=method).vector_field
    other = quick(make(unit=unit, hours=hours, shift=shift, delay=delay), method=method).vector_field
    x = torch.randn(1, 50, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 3
    for t in (0.0, 2.5, 6.0):
        a, b = plain.evaluate(t, x), other.evaluate(hours * t + delay, unit * x + shift)
        # rounding of 1e-15, made larger by Adam's division by small gradients and by Sinkhorn's potentials
        torch.testing.assert_close(b.velocity * hours / unit, a.velocity, rtol=1e-6, atol=1e-6)
        if method == "sb-cfm":
            torch.testing.assert_close(b.score * unit, a.score, rtol=1e-6, atol=1e-6)
        if method == "uot-cfm":
            torch.testing.assert_close(b.growth * hours, a.growth, rtol=1e-6, atol=1e-6)


# ---- early stopping


def test_patience_stops_and_keeps_the_best():
    training = replace(QUICK, n_steps=2000, patience=2, learning_rate=3e-2)
    stopped = quick(make(sizes=(20, 20, 20, 20)), training=training)
    looks = len(stopped.validation_loss)
    assert len(stopped.loss) == looks * EVALUATE_EVERY < 2000
    best = int(stopped.validation_loss[:, 0].argmin())
    assert looks - 1 - best == 2  # it waited for as long as it was told to, and no longer
    assert bool((stopped.validation_loss[best:] >= stopped.validation_loss[best]).all())
    # more patience runs the same steps and further: up to its own best it is the same fit
    patient = quick(make(sizes=(20, 20, 20, 20)), training=replace(training, patience=4))
    assert torch.equal(patient.validation_loss[:looks], stopped.validation_loss)
    if int(patient.validation_loss[:, 0].argmin()) == best:
        assert all(torch.equal(a, weights(patient.vector_field)[n]) for n, a in weights(stopped.vector_field).items())


def test_the_weights_kept_are_those_of_the_best_look():
    # a look that is never followed by a better one must give what a fit that looks once and stops there gives
    training = replace(QUICK, n_steps=4 * EVALUATE_EVERY, patience=1, learning_rate=1e-9, weight_decay=0.0)
    start = quick(make(), training=replace(training, n_steps=1, patience=None, learning_rate=1e-30)).vector_field
    kept = quick(make(), training=training).vector_field
    for name, value in weights(start).items():
        if name.startswith("network"):  # a hundred steps of at most 1e-9 away from the first weights
            torch.testing.assert_close(weights(kept)[name], value, rtol=0, atol=2e-7)


def test_a_look_is_at_the_mean_of_the_weights_and_by_pairs_of_a_stream_of_its_own():
    (one,), unseen = make_problems(
        make((0.0, 1.0), (40, 30)), method="ot-cfm", path=None, sigma=0.1, seeds=[7], validate=True
    )  # fmt: skip
    # one look, after which the mean is kept: far from the last weights, at this rate
    training = replace(QUICK, n_steps=EVALUATE_EVERY, patience=1, learning_rate=0.05, ema_decay=0.999)
    fitted = train([one], unseen, training)
    streams = [torch.Generator().manual_seed(one.seed + 1)]  # the seed's own has trained
    seen = next(flow_matching._batches(unseen, streams, fitted.vector_field, flow_matching.VALIDATION_PAIRS, 1))
    torch.testing.assert_close(flow_matching._loss(fitted.vector_field, seen), fitted.validation_loss[0])


def test_a_stopped_member_does_not_depend_on_the_others():
    training, seeds = replace(QUICK, n_steps=500, patience=1, learning_rate=3e-2), (0, 1, 2, 3)
    together = quick(make(), training=training, seeds=seeds)
    lengths = set()
    for m, seed in enumerate(seeds):
        alone = quick(make(), training=training, seeds=(seed,))
        lengths.add(len(alone.loss))
        for name, value in weights(alone.vector_field).items():
            # rounding, as above
            torch.testing.assert_close(weights(together.vector_field)[name][m], value[0], rtol=0, atol=1e-9)
    assert len(lengths) > 1  # some went on after others had stopped
    assert len(together.loss) == max(lengths)


def test_validation_cells_are_not_trained_on():
    snapshots = make()
    problems, validation = make_problems(snapshots, method="ot-cfm", path=None, sigma=None, seeds=(0,), validate=True)
    for whole, seen, held_back in zip(snapshots.points, problems[0].snapshots.points, validation[0].snapshots.points):
        rows = [set(map(tuple, x.tolist())) for x in (whole, seen, held_back)]
        assert rows[1] | rows[2] == rows[0]
        assert not rows[1] & rows[2]
        assert len(held_back) == round(0.1 * len(whole))


# ---- the network


class Own(nn.Module):
    """A user's network: any module of (t, x), with a buffer."""

    def __init__(self, heads: int = 1, seed: int = 0, out: int = 2) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 24), nn.Tanh(), nn.Linear(24, heads * out))
        self.register_buffer("frequencies", torch.tensor([[1.0, 2.0]]))
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=rng) / 4)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.net(torch.cat([t, torch.sin(t * self.frequencies), x], -1))


def example(members: int) -> Tensor:
    return torch.randn(members, 20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("method", ["ot-cfm", "sb-cfm"])
def test_a_users_module_trains_and_comes_back(method):
    module = Own(heads=2 if method == "sb-cfm" else 1)
    template = {name: value.clone() for name, value in module.state_dict().items()}
    fitted = quick(make(), method=method, seeds=(0, 1), training=replace(QUICK, module=module, n_steps=150))
    assert bool((fitted.loss[-30:].mean(0) < 0.8 * fitted.loss[:5].mean(0)).all())  # as above
    assert all(torch.equal(module.state_dict()[name], value) for name, value in template.items())  # left as it was
    field, x = fitted.vector_field, example(2)
    assert not torch.equal(field.velocity(2.0, x)[0], field.velocity(2.0, x)[1])  # their own streams
    arrays = field.to_arrays()
    assert all(isinstance(value, np.ndarray) and len(value) == 2 for value in arrays.values())
    again = NeuralField.from_arrays(arrays, module=Own(heads=2 if method == "sb-cfm" else 1, seed=9))
    assert torch.equal(again.velocity(2.0, x), field.velocity(2.0, x))
    assert again.has_score == field.has_score == (method == "sb-cfm")
    with pytest.raises(ValueError, match="module"):
        NeuralField.from_arrays(arrays)
    with pytest.raises(ValueError, match="module"):
        NeuralField.from_arrays(arrays, module=Own(out=3))


@pytest.mark.parametrize("columns", [2, 3])
def test_a_users_module_may_leave_growth_out(columns):
    fitted = quick(make(), method="uot-cfm", training=replace(QUICK, module=Own(out=columns), n_steps=150))
    assert bool((fitted.loss[-30:].mean(0) < 0.8 * fitted.loss[:5].mean(0)).all())  # as above
    field, x = fitted.vector_field, example(1)
    assert field.grows == (columns == 3)
    again = NeuralField.from_arrays(field.to_arrays(), module=Own(out=columns, seed=9))
    assert again.grows == field.grows
    assert torch.equal(again.growth(2.0, x), field.growth(2.0, x))
    assert bool(field.growth(2.0, x).any()) == field.grows
    moved = transport(field, x, 0.0, 2.0, Integration("rk4", 5, 1e-5))
    assert bool(moved.log_mass.any()) == field.grows


def test_members_of_a_users_module_are_single_fits():
    training = replace(QUICK, module=Own())
    together = weights(quick(make(), seeds=(3, 1), training=training).vector_field)
    for m, seed in enumerate((3, 1)):
        for name, alone in weights(quick(make(), seeds=(seed,), training=training).vector_field).items():
            torch.testing.assert_close(together[name][m], alone[0], rtol=0, atol=1e-10)  # rounding, as above


@pytest.mark.parametrize(
    ("method", "module"),
    [
        ("ot-cfm", Own(out=3)),
        ("ot-cfm", Own(heads=2)),
        ("sb-cfm", Own()),
        ("sb-cfm", Own(out=5)),
        ("uot-cfm", Own(heads=2)),
        ("uot-cfm", Own(out=1)),
    ],
)
def test_a_module_of_another_shape_is_an_error(method, module):
    with pytest.raises(ValueError, match="module that maps"):
        quick(make(), method=method, training=replace(QUICK, module=module))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arrays_there_and_back(method, dtype):
    field = quick(make(), method=method, seeds=(0, 1, 2), training=replace(QUICK, n_steps=5), dtype=dtype).vector_field
    again = NeuralField.from_arrays({name: value.copy() for name, value in field.to_arrays().items()})
    x = example(3).to(dtype)
    assert torch.equal(again.velocity(2.0, x), field.velocity(2.0, x))
    assert again.has_score == field.has_score == (method == "sb-cfm")
    assert again.grows == field.grows == (method == "uot-cfm")
    assert torch.equal(again.growth(2.0, x), field.growth(2.0, x))
    assert bool(field.growth(2.0, x).any()) == field.grows
    if field.has_score:
        assert torch.equal(again.score(2.0, x), field.score(2.0, x))
    else:
        with pytest.raises(ValueError, match="sb-cfm"):
            field.score(2.0, x)


def test_a_field_called_is_its_members_mean():
    field, x = quick(make(), seeds=(0, 1, 2), training=replace(QUICK, n_steps=5)).vector_field, example(1)
    mean = field.velocity(2.0, x.expand(3, 20, 2)).mean(0)
    assert np.array_equal(field(2.0, x[0].numpy()), mean.numpy())
    assert torch.equal(field.ensemble().velocity(2.0, x)[0], mean)


# ---- errors


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("width", "depth", "n_steps", "batch_size", "patience") for value in (0, -1, 1.5)),
        *(("learning_rate", value) for value in (0.0, -1.0, math.inf, math.nan)),
        *(("weight_decay", value) for value in (-1.0, math.inf, math.nan)),
        *(("ema_decay", value) for value in (-0.1, 1.0, math.nan)),
    ],
)
def test_training_out_of_range(name, value):
    with pytest.raises(ValueError, match=name):
        replace(QUICK, **{name: value})


def test_nothing_to_fit():
    with pytest.raises(ValueError, match="at least one problem"):
        train([])
    with pytest.raises(ValueError, match="at least two snapshots"):
        quick(make(times=(0.0,), sizes=(5,)))
    with pytest.raises(ValueError, match="method"):
        quick(make(), method="cfm")
    for method in ("sb-cfm", "vp-cfm"):
        with pytest.raises(ValueError, match="no path for"):
            make_problems(make(), method=method, path="straight", sigma=None, seeds=(0,), validate=False)
    with pytest.raises(ValueError, match="hermite"):
        make_problems(make(), method="ot-cfm", path="cubic", sigma=None, seeds=(0,), validate=False)
    rates = tuple(torch.zeros(len(x)) for x in make().points)
    with pytest.raises(ValueError, match="conserves mass"):
        quick(replace(make(), growth=rates), method="ot-cfm")
    with pytest.raises(ValueError, match="ot-cfm"):
        quick(make(), method="sb-cfm", sigma=0.0)
    same = torch.ones(5, 2)
    with pytest.raises(ValueError, match="differ"):
        quick(Snapshots((0.0, 1.0), (same, same)), sigma=0.1)


def test_devices():
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("gpu", "CPU", "", "cuda0", "cpu:x", "cpu:", "cuda:-1", "cuda:1:2", "auto:0", " cpu", "cpu\n"):
        with pytest.raises(ValueError, match="device of auto"):
            pick_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_missing_device_is_an_error_not_the_cpu(name):
    with pytest.raises(ValueError, match="working cuda"):
        pick_device(name)


def test_a_number_is_that_of_a_device_which_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, found in {
        "auto": "cuda",
        "cuda": "cuda",
        "cuda:1": "cuda:1",
        "cuda:01": "cuda:1",
        "cpu:0": "cpu:0",
    }.items():
        assert str(pick_device(name)) == found
    for name in ("cuda:2", "cpu:3"):
        with pytest.raises(ValueError, match=rf"working {name} device, found [12] of"):
            pick_device(name)


# ---- against PyTorch's own


def test_layers_and_their_gradients_are_those_of_autograd():
    rngs = [torch.Generator().manual_seed(k) for k in range(3)]
    network = MLP([3, 8, 6, 2], rngs).double()
    rng = torch.Generator().manual_seed(9)
    t = torch.rand(3, 10, 1, generator=rng, dtype=torch.float64)
    x = torch.randn(3, 10, 2, generator=rng, dtype=torch.float64).requires_grad_()
    h = torch.cat([t, x], -1)
    for weight, bias in zip(network.weights[:-1], network.biases):
        h = nn.functional.selu(h @ weight + bias)
    plain = h @ network.weights[-1] + network.biases[-1]
    found = network(t, x)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-13)
    inputs = [x, *network.parameters()]
    expected = torch.autograd.grad(plain.sin().sum(), inputs)
    gradients = torch.autograd.grad(found.sin().sum(), inputs)
    assert all(gradient.is_contiguous() for gradient in gradients[1:])  # as a fused optimiser takes them
    for own, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(own, theirs, rtol=0, atol=1e-13)


def test_cells_that_are_moved_all_along_the_course_keep_to_its_cells(monkeypatch):
    """Few cells in many dimensions, where a field that was trained on the paths alone loses two thirds of them."""
    rng, spread = torch.Generator().manual_seed(0), torch.linspace(1.0, 0.3, 20)
    cells = tuple(torch.randn(60, 20, generator=rng) * spread + torch.eye(20)[0] * t for t in range(5))
    course = Snapshots(tuple(float(t) for t in range(5)), cells)
    training = replace(QUICK, width=64, depth=3, n_steps=500, batch_size=128, learning_rate=5e-3, ema_decay=0.99)

    def astray() -> float:
        field = quick(course, method="uot-cfm", training=training, dtype=torch.float32).vector_field
        return share_astray(push(field, cells[0][None], 0.0, 4.0, Integration("euler", 200))[0], cells[-1])

    wide = astray()
    monkeypatch.setattr(problem, "spread_between", lambda *_: 0.0)
    assert astray() > 0.5
    assert wide < 0.1


def test_paths_of_growing_plans_are_as_wide_as_cells_are_apart_unless_told_how_wide():
    course = make()
    for method, sigma in product(METHODS, (None, 0.1)):
        problems, _ = make_problems(course, method=method, path=None, sigma=sigma, seeds=(0,), validate=False)
        if method != "uot-cfm" or sigma is not None:
            assert problems[0].spreads == ()
            continue
        apart = [spacing(x) for x in course.points]
        for k, spread in enumerate(problems[0].spreads):
            assert spread == pytest.approx((apart[k] + apart[k + 1]) / 2 / course.dimension**0.5)
        drawn = problems[0].sample(3, 8 * (len(course) - 1), torch.Generator().manual_seed(0)).path
        for k, (t0, t1) in enumerate(pairwise(course.times)):
            std = drawn.std[(drawn.t > t0) & (drawn.t < t1)]
            expected = math.hypot(problems[0].path.sigma, problems[0].spreads[k])
            torch.testing.assert_close(std, torch.full_like(std, expected))
            assert len(std) == 3 * 8


@pytest.mark.parametrize("path", [None, "straight", "land"])
def test_between_two_snapshots_alone_growing_paths_are_bridges(path):
    snapshots = growing_groups()
    told, _ = make_problems(snapshots, method="uot-cfm", path=path, sigma=0.1, seeds=(0,), validate=False)
    assert told[0].spreads == ()
    problems, _ = make_problems(snapshots, method="uot-cfm", path=path, sigma=None, seeds=(0,), validate=False)
    one, (half_way,) = problems[0], problems[0].spreads
    listed = one.listed(0)
    squares = (snapshots.points[1][listed.j] - snapshots.points[0][listed.i]).square().mean(1)
    # of its own pairs, which do not go from one group to the other as optimal transport's do where one group grows
    assert half_way == pytest.approx(0.15 * float(listed.middle @ squares) ** 0.5)
    drawn = one.sample(5, 40, torch.Generator().manual_seed(0)).path
    s = (drawn.t - snapshots.times[0]) / (snapshots.times[1] - snapshots.times[0])
    torch.testing.assert_close(drawn.std.square(), one.path.sigma**2 + 4 * s * (1 - s) * half_way**2)


def test_held_back_cells_are_judged_on_paths_as_wide_as_those_to_train_on():
    course = make()
    problems, held_back = make_problems(course, method="uot-cfm", path=None, sigma=None, seeds=(0,), validate=True)
    first, second = problems[0].snapshots.points[:2]
    assert len(first) < len(course.points[0])
    assert problems[0].spreads == held_back[0].spreads
    assert problems[0].spreads[0] == pytest.approx((spacing(first) + spacing(second)) / 2 / course.dimension**0.5)
    how = {"method": "uot-cfm", "path": None, "sigma": None, "seeds": (0,)}
    (one,), (other,) = make_problems(growing_groups(), validate=True, **how)
    assert one.spreads == other.spreads
    alone, _ = make_problems(one.snapshots, validate=False, **how)
    assert one.spreads == alone[0].spreads
    assert one.spreads != make_problems(other.snapshots, validate=False, **how)[0][0].spreads
