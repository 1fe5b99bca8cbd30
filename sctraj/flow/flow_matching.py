"""Conditional flow matching: the training loop, the same for one fit and for many.

Draw a pair of cells, a time and a point on the path between them, and regress the network on the path's velocity there:
the minimiser is the mean velocity of all paths through a point, which carries the population along (Tong et al. 2023).
All members are trained in one batch: their pairs are drawn in bulk, each member's from its own random stream, and every
step is one batched matmul per layer. No member's numbers enter another's.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .optimiser import AdamW, EarlyStopping, one_cycle, swapped
from .problem import Problem
from .replay import Replayed
from .snapshots import to_device
from .vector_field import MLP, Modules, NeuralField, VectorField, scaling

CHUNK = 2**19  # numbers drawn at once for a member: enough for a few dozen steps in five dimensions
CHUNK_ON_GPU = 2**21  # on a GPU, where a draw takes as long as launching its kernels, however much it draws
EVALUATE_EVERY = 25  # steps between evaluations of the validation loss
VALIDATION_PAIRS = 512  # per interval
FULL_INTERVALS = 5  # up to so many intervals have a batch each; those of a longer course, alike, share as many pairs
DIVERGED = 10.0  # a final loss above this many times the first one has not converged
GROWTH_WEIGHT = 0.1  # of the growth's error in the loss: growth is learned beside the velocity, not instead of it


@dataclass(frozen=True)
class Fit:
    """A trained field.

    Attributes
    ----------
    vector_field
        M members.
    loss
        Training loss of every step, ``(n_steps, M)``: the mean squared error of the velocity in units of the data's rms
        deviation per mean gap, plus, if there is a score, that of the score times the path's standard deviation, plus a
        tenth of that of the growth (per mean gap).
    validation_loss
        The same for pairs of held-back cells, ``(n_evaluations, M)``; empty unless early stopping was asked for.
    """

    vector_field: VectorField
    loss: Tensor
    validation_loss: Tensor


class _Batch(NamedTuple):
    """Standardised training data of all members: leading axes ``(S, M, B)``; ``S`` steps."""

    t: Tensor
    x: Tensor
    velocity: Tensor
    noise: Tensor  # minus std times the score target; (S, M, B, 0) without a score
    growth: Tensor  # target, per mean gap; (S, M, B, 0) if nothing grows
    weight: Tensor  # of the velocity's and the growth's error
    std: Tensor  # of the path, in units of `Problem.std`: at most the root of the interval's length over the mean gap


def pick_device(name: str) -> torch.device:
    """Return the device for ``"auto"`` (cuda, else mps, else cpu), ``"cpu"``, ``"cuda"`` (``"cuda:1"``) or ``"mps"``.

    Raises
    ------
    ValueError
        If the device is unknown or not available; there is no silent fallback.
    """
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = {"cuda": n_cuda, "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        return torch.device(next(kind for kind, n in there.items() if n))
    asked = re.fullmatch("(cpu|cuda|mps)(?::([0-9]+))?", name)
    if asked is None:
        raise ValueError(f"expected a device of auto, cpu, cuda, mps, found {name!r}; of several take one as cuda:1")
    kind, index = asked[1], None if asked[2] is None else int(asked[2])
    if (index or 0) >= there[kind]:
        raise ValueError(
            f"expected a working {name} device, found {there[kind] or 'none'} of {kind}; pass device='cpu' or "
            "device='auto'"
        )
    return torch.device(kind) if index is None else torch.device(kind, index)


@dataclass(frozen=True)
class Training:
    """How to train.

    Attributes
    ----------
    module
        The user's own network (see `Modules`), or None for a perceptron with ``depth`` hidden layers of ``width``
        units.
    n_steps
        Steps of the optimiser (AdamW; a one-cycle schedule whose highest rate is ``learning_rate``).
    batch_size
        Pairs per interval in each step; more than ``FULL_INTERVALS`` intervals share as many pairs as these would have.
    ema_decay
        Decay of the exponential moving average of the weights, which is returned; 0 for the last weights.
    patience
        Number of evaluations (one every 25 steps) without improvement of its validation loss after which a member keeps
        its best weights; None: no early stopping.
    """

    module: nn.Module | None
    width: int
    depth: int
    n_steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    ema_decay: float
    patience: int | None

    def __post_init__(self) -> None:
        for name in ("width", "depth", "n_steps", "batch_size", "patience"):
            value = getattr(self, name)
            if value is None:
                continue
            is_number = isinstance(value, numbers.Real)
            if not is_number or not 1 <= value < math.inf or value != int(value):
                raise ValueError(f"expected {name} to be a whole number of at least 1, found {value!r}")
            object.__setattr__(self, name, int(value))  # a whole float is accepted
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"expected a positive learning_rate, found {self.learning_rate}")
        if not 0 <= self.weight_decay < math.inf or not 0 <= self.ema_decay < 1:
            raise ValueError(
                f"expected weight_decay >= 0 and 0 <= ema_decay < 1, found {self.weight_decay}, {self.ema_decay}"
            )


def fit(
    problems: Sequence[Problem],
    *,
    validation: Sequence[Problem],
    training: Training,
    device: torch.device,
    dtype: torch.dtype,
    progress: bool,
) -> Fit:
    """Train the members' vector fields by conditional flow matching (Tong et al. 2023, algorithm 1, eq. 10).

    Parameters
    ----------
    problems
        One per member; all of one dimension, and all with a score or all without.
    validation
        Problems of held-back cells for early stopping, one per member; or none.
    training
        Network, steps, rates.
    device, dtype
        Where to train, and in what precision.
    progress
        Whether to show a progress bar.

    Raises
    ------
    ValueError
        If there is no member, or the outputs of a user's module have another shape.
    RuntimeError
        If the final loss is not finite, or is far above the first one.
    """
    if not problems:
        raise ValueError("expected at least one problem to fit, found none")
    d, members = problems[0].snapshots.dimension, len(problems)
    velocity_and_score = d * (2 if problems[0].std > 0 else 1)
    grows = problems[0].grows
    scalings = [scaling(p.snapshots, std=p.std) for p in problems]
    network: nn.Module
    if training.module is None:
        rngs = [torch.Generator().manual_seed(p.seed) for p in problems]
        sizes = [1 + d, *[training.width] * training.depth, velocity_and_score + grows]
        network = MLP(sizes, rngs, [p.tempo for p in problems])
    else:
        network = Modules(training.module, members)
    field = NeuralField(network, scalings).to(device, dtype)

    n_steps = training.n_steps
    problems = [to_device(p, device) for p in problems]
    streams = [torch.Generator(device).manual_seed(p.seed) for p in problems]
    n_intervals = max(len(p.couplings) for p in problems)
    batches = _batches(problems, streams, field, pairs_a_step(training.batch_size, n_intervals), n_steps)
    held_back = None
    if validation:
        streams = [torch.Generator(device).manual_seed(p.seed + 1) for p in problems]
        unseen = [to_device(p, device) for p in validation]
        held_back = next(_batches(unseen, streams, field, VALIDATION_PAIRS * n_intervals, 1))
    with torch.no_grad():
        shape = network(torch.zeros(members, 2, 1).to(field.scale), torch.zeros(members, 2, d).to(field.scale)).shape
    # a user's module may leave growth out
    if shape[:2] != (members, 2) or shape[-1] - velocity_and_score not in (0, grows):
        wanted = f"(2, {velocity_and_score + grows})" + (f", or without growth (2, {velocity_and_score})" * grows)
        raise ValueError(f"expected a module that maps (2, 1), (2, {d}) to {wanted}, found {tuple(shape[1:])}")
    losses, validation_losses = _train(field, batches, held_back, training=training, progress=progress)
    history = losses.cpu()
    if not bool(history[-1].isfinite().all()):
        raise RuntimeError(f"expected a finite loss, found {history[-1].tolist()}; take a lower learning_rate")
    first, last = history[0], history[-max(1, n_steps // 20) :].mean(0)  # the first loss precedes any step
    if bool((last > DIVERGED * first.clamp(min=1)).any()):
        raise RuntimeError(
            f"expected a loss that falls, found {first.tolist()} at first and {last.tolist()} at last; take a lower "
            "learning_rate"
        )
    field.eval().requires_grad_(False)
    return Fit(field, history, validation_losses.cpu())


def _train(
    field: NeuralField, batches: Iterator[_Batch], held_back: _Batch | None, *, training: Training, progress: bool
) -> tuple[Tensor, Tensor]:
    """Train the field's network in place.

    The host waits for the device only if there is a ``held_back`` batch, to ask whether all members are done.

    Returns
    -------
    Training losses ``(n_steps, M)`` and validation losses ``(n_evaluations, M)``, on the field's device.
    """
    members, n_steps, device = field.members, training.n_steps, field.scale.device
    weights: list[Tensor] = list(field.network.parameters())
    optimiser = AdamW(weights, training.weight_decay)
    average = [w.detach().clone() for w in weights]
    stopping = EarlyStopping(average, members, training.patience or n_steps)

    def act(rate: Tensor | float, fading: Tensor | float, *batch: Tensor) -> Tensor:
        loss = _loss(field, _Batch(*batch))  # (M,)
        # members share no weights, so each gets the gradient of its own loss
        optimiser.step(torch.autograd.grad(loss.sum(), weights, allow_unused=True), rate)
        with torch.no_grad():
            for mean, w in zip(average, weights):
                mean.lerp_(w, fading)
        return loss.detach()

    rates: Sequence[Tensor | float] = [training.learning_rate * one_cycle(step / n_steps) for step in range(n_steps)]
    # a short memory while the weights still move far
    fadings: Sequence[Tensor | float] = [1 - min(training.ema_decay, (1 + k) / (10 + k)) for k in range(n_steps)]
    run: Callable[..., Tensor] = act
    if device.type == "cuda" and isinstance(field.network, MLP):  # a user's module may not be recordable
        each = (torch.tensor(v, dtype=torch.float32).to(device, non_blocking=True) for v in (rates, fadings))
        rates, fadings = (v.unbind() for v in each)
        run = Replayed(act, device)

    losses = field.scale.new_empty(n_steps, members)
    validation_losses = []
    for step in _steps(n_steps, members, progress=progress):
        losses[step] = run(rates[step], fadings[step], *next(batches))
        if held_back is not None and (step + 1) % EVALUATE_EVERY == 0:
            with torch.no_grad(), swapped(weights, average):
                validation_losses.append(_loss(field, held_back))
            stopping.look(validation_losses[-1], average)
            if stopping.done():
                losses = losses[: step + 1]
                break
    with torch.no_grad():
        best = stopping.best if validation_losses else average
        for w, value in zip(weights, best):
            w.copy_(value)
    return losses, torch.stack(validation_losses) if validation_losses else losses[:0]


def _steps(n_steps: int, members: int, *, progress: bool) -> Iterable[int]:
    if not progress:
        return range(n_steps)
    from tqdm.auto import trange  # imported only where needed: it warns in notebooks without widgets

    return trange(n_steps, desc=f"flow matching, {members} member(s)", leave=False)


def pairs_a_step(batch_size: int, n_intervals: int) -> int:
    """Return the number of pairs in a training step on a course of so many intervals, the same number for each."""
    return n_intervals * math.ceil(batch_size * min(n_intervals, FULL_INTERVALS) / n_intervals)


def _batches(
    problems: Sequence[Problem],
    streams: Sequence[torch.Generator],
    field: NeuralField,
    n_pairs: int,
    n_steps: int,
) -> Iterator[_Batch]:
    """Yield every step's data, views of what is drawn in bulk for some dozens of steps at a time."""
    # the same for any number of members, so that a member's stream does not depend on the others
    most = CHUNK if field.scale.device.type == "cpu" else CHUNK_ON_GPU
    at_once = max(1, min(n_steps, most // (n_pairs * (3 * field.dimension + 3))))
    for start in range(0, n_steps, at_once):
        chunk = _draw(problems, streams, field, at_once, n_pairs)
        for step in range(min(at_once, n_steps - start)):
            yield _Batch(*(drawn[step] for drawn in chunk))
        del chunk  # before the next one is drawn


def _draw(
    problems: Sequence[Problem], streams: Sequence[torch.Generator], field: NeuralField, n_steps: int, n_pairs: int
) -> _Batch:
    """Draw and standardise ``n_steps`` batches of every member, in the cells' own precision."""
    dtype = field.scale.dtype

    def row(problem: Problem, stream: torch.Generator, *scaling: Tensor) -> _Batch:
        shift, scale, origin, gap, std = scaling
        drawn = problem.sample(n_steps, n_pairs, stream)
        sample, empty = drawn.path, drawn.path.x[..., :0]
        noise = -sample.score * sample.std if sample.score is not None and problem.std > 0 else None
        # an interval's errors are weighted by how far they displace cells by its end, a pair's by its mass
        weight = (drawn.length / gap).square().expand(n_steps, n_pairs, 1)
        return _Batch(
            t=((sample.t - origin) / gap).to(dtype),
            x=((sample.x - shift) / scale).to(dtype),
            velocity=(sample.velocity * (gap / scale)).to(dtype),
            noise=(empty if noise is None else noise).to(dtype),
            growth=(empty if drawn.growth is None else drawn.growth * gap).to(dtype),
            weight=(weight if drawn.weight is None else weight * drawn.weight).to(dtype),
            std=(torch.zeros_like(sample.std) if noise is None else sample.std / std).to(dtype),
        )

    found: list[Tensor] = []
    members = zip(problems, streams, field.shift, field.scale, field.origin, field.gap, field.std)
    for m, member in enumerate(members):
        drawn = row(*member)
        if not found:
            found = [v.new_empty(n_steps, len(problems), *v.shape[1:]) for v in drawn]
        for whole, v in zip(found, drawn):
            whole[:, m] = v
    return _Batch(*found)


def _loss(field: NeuralField, batch: _Batch) -> Tensor:
    """Return each member's loss ``(M,)``: CFM for velocity and growth, std-weighted denoising score matching."""
    output = field.network(batch.t, batch.x)
    d, n_score, n_growth = (v.shape[-1] for v in (batch.x, batch.noise, batch.growth))
    loss = (batch.weight * (output[..., :d] - batch.velocity).square()).mean((1, 2))
    if n_score:
        # |std (s_theta - score)|^2 with score = -noise / std (Tong et al. 2023b, [SF]2M, eq. 10 with lambda = std)
        loss = loss + (batch.std * output[..., d : d + n_score] + batch.noise).square().mean((1, 2))
    if n_growth and output.shape[-1] > d + n_score:
        loss = loss + GROWTH_WEIGHT * (batch.weight * (output[..., d + n_score :] - batch.growth).square()).mean((1, 2))
    return loss
