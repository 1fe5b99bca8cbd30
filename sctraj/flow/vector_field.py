"""Vector fields: velocity, score and growth at (t, x), for M members at once; and the neural field.

`VectorField` is what the rest of the package uses, in the user's units. `NeuralField` wraps a network that sees
standardised times and cells; the other kind is in `closed_form`.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from .snapshots import Snapshots

Quantity = Literal["velocity", "score", "growth"]


@dataclass(frozen=True)
class Scaling:
    """The conversion between the user's units and the network's, for one member.

    Attributes
    ----------
    shift, scale
        Mean ``(d,)``, and the root mean square deviation: one for all coordinates, so that ratios of distances are
        kept.
    origin, gap
        First time and mean gap, in units of time.
    std
        Largest standard deviation that the path has over the mean gap, in units of x. The score head returns
        ``std * score``, which stays of the order of one however small sigma is. Zero without a score.
    """

    shift: Tensor
    scale: float
    origin: float
    gap: float
    std: float


def scaling(snapshots: Snapshots, *, std: float) -> Scaling:
    """Measure a member's scaling on its own (kept) snapshots, all of the same weight."""
    means = torch.stack([m.to(x.dtype) @ x for x, m in zip(snapshots.points, snapshots.mass)])
    shift = means.mean(0)
    squares = [m @ (x - shift).double().square().sum(1) for x, m in zip(snapshots.points, snapshots.mass)]
    scale = math.sqrt(float(sum(squares)) / len(squares) / snapshots.dimension)
    if not 0 < scale < math.inf:
        raise ValueError(f"expected cells that differ, found a standard deviation of {scale}; check the representation")
    return Scaling(shift, scale, snapshots.times[0], snapshots.mean_gap, std)


SELU_ALPHA, SELU_SCALE = 1.6732632423543772848, 1.0507009873554804934  # Klambauer et al. 2017


class _Layers(torch.autograd.Function):
    """All layers of M perceptrons as one node of the graph: activations in place, their slopes taken from their values.

    The last layer is computed as a product of transposes: with so few columns this takes a fifth of the time on a CPU.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, h: Tensor, *parameters: Tensor) -> Tensor:
        """Map ``(M, B, n)`` to ``(M, B, m)``; the parameters are the weights of all layers, then their biases."""
        weights, biases = parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]
        inputs = [h]
        for weight, bias in zip(weights[:-1], biases):
            inputs.append(_selu_(torch.baddbmm(bias, inputs[-1], weight)))  # (M, B, n) @ (M, n, m)
        ctx.save_for_backward(*inputs, *weights)
        return torch.baddbmm(biases[-1].mT, weights[-1].mT, inputs[-1].mT).mT.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        """Return the gradients with respect to the arguments of ``forward``."""
        inputs, weights = ctx.saved_tensors[: (n := len(ctx.saved_tensors) // 2)], ctx.saved_tensors[n:]
        of_weights, of_biases = [torch.bmm(gradient.mT, inputs[-1]).mT.contiguous()], [gradient.sum(1, keepdim=True)]
        for layer in range(n - 1, 0, -1):
            y, gradient = inputs[layer], torch.bmm(gradient, weights[layer].mT)
            torch.ops.aten.elu_backward.grad_input(
                gradient, SELU_ALPHA, SELU_SCALE, 1.0, True, y, grad_input=gradient
            )  # fmt: skip
            of_weights.append(torch.bmm(inputs[layer - 1].mT, gradient))
            of_biases.append(gradient.sum(1, keepdim=True))
        of_input = torch.bmm(gradient, weights[0].mT) if ctx.needs_input_grad[0] else None
        return of_input, *of_weights[::-1], *of_biases[::-1]


def _selu_(x: Tensor) -> Tensor:
    """Apply SELU in place; on a CPU by exp2, for which PyTorch takes a quarter of the time of expm1."""
    if x.device.type != "cpu":
        return torch.selu_(x)
    power = x.clamp_max(0).mul_(1 / math.log(2)).exp2_()
    return x.clamp_min_(0).add_(power, alpha=SELU_ALPHA).sub_(SELU_ALPHA).mul_(SELU_SCALE)


class Leg(NamedTuple):
    """A part of each member's way, from ``t0`` to ``t1`` ``(M,)``, and the field on it, which has no jumps there."""

    field: Any
    t0: Tensor
    t1: Tensor


class MLP(nn.Module):
    """M perceptrons at once: batched weights, one matmul per layer for all members.

    Parameters
    ----------
    sizes
        Widths of the layers, input first.
    rngs
        One CPU generator per member, from which its initial weights are drawn.
    tempos
        Factors on the times that go in, one per member: at a slow tempo a network first learns what changes slowly.
    """

    tempo: Tensor

    def __init__(
        self, sizes: Sequence[int], rngs: Sequence[torch.Generator], tempos: Sequence[float] | None = None
    ) -> None:
        super().__init__()

        def uniform(fan_in: int, *shape: int) -> nn.Parameter:
            draws = [torch.rand(shape, generator=rng, dtype=torch.float64) for rng in rngs]
            return nn.Parameter((2 * torch.stack(draws) - 1) / math.sqrt(fan_in))  # (M, *shape)

        pairs = list(pairwise(sizes))
        self.weights = nn.ParameterList([uniform(n, n, m) for n, m in pairs])
        self.biases = nn.ParameterList([uniform(n, 1, m) for n, m in pairs])
        # in double precision if the times are: a rounded tempo would make single and double fields differ
        self.register_buffer("tempo", torch.tensor(tempos or [1.0] * len(rngs), dtype=torch.float64).reshape(-1, 1, 1))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Map standardised times ``(M, B, 1)`` and points ``(M, B, d)`` to the heads' outputs ``(M, B, sizes[-1])``."""
        return _Layers.apply(torch.cat([self.tempo * t, x], -1), *self.weights, *self.biases)


class Modules(nn.Module):
    """M copies of a user's module, run as one.

    Parameters
    ----------
    module
        Maps standardised times ``(B, 1)`` and points ``(B, d)`` to the velocity, ``(B, d)``, or to velocity and score,
        ``(B, 2 d)``, if there is to be a score; with one column more for growth if the population grows. Every member
        starts from the module's weights.
    members
        How many.
    """

    def __init__(self, module: nn.Module, members: int) -> None:
        super().__init__()
        self.names = [name for name, _ in [*module.named_parameters(), *module.named_buffers()]]
        stacked = [p.detach().expand(members, *p.shape).clone() for p in module.parameters()]
        self.stacked = nn.ParameterList(stacked)
        for k, buffer in enumerate(module.buffers()):
            self.register_buffer(f"buffer_{k}", buffer.detach().expand(members, *buffer.shape).clone())
        # not registered as a submodule: its own weights are only a template
        self.__dict__["template"] = copy.deepcopy(module)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Map standardised times ``(M, B, 1)`` and points ``(M, B, d)`` to the module's outputs."""
        template = self.__dict__["template"].to(x.device, x.dtype).train(self.training)

        def one(state: dict[str, Tensor], t: Tensor, x: Tensor) -> Tensor:
            return torch.func.functional_call(template, state, (t, x))

        state = dict(zip(self.names, [*self.stacked, *self.buffers()]))
        return torch.func.vmap(one, randomness="different")(state, t, x)


@dataclass(frozen=True)
class FieldSample:
    """Velocity ``(M, B, d)`` per unit of time, score ``(M, B, d)`` per unit of x and growth ``(M, B, 1)`` per time.

    Score and growth are None if the field has none.
    """

    velocity: Tensor
    score: Tensor | None = None
    growth: Tensor | None = None


class VectorField(nn.Module, ABC):
    """Velocities, and any scores and growth rates, of M members, in the user's units, per unit of real time.

    Attributes
    ----------
    scale
        Root mean square deviation of each member's data, ``(M, 1, 1)``.
    """

    scale: Tensor

    @property
    def members(self) -> int:
        """Number of members M."""
        return len(self.scale)

    @property
    @abstractmethod
    def dimension(self) -> int:
        """Number of coordinates d."""

    @property
    @abstractmethod
    def has_score(self) -> bool:
        """Whether the field has a score."""

    @property
    @abstractmethod
    def grows(self) -> bool:
        """Whether the field has a growth rate."""

    @abstractmethod
    def evaluate(self, t: Tensor | float, x: Tensor) -> FieldSample:
        """Return velocity, score and growth.

        Parameters
        ----------
        t
            Real time: a float, or a tensor that broadcasts to ``(M, B, 1)``.
        x
            Points ``(M, B, d)``.
        """

    @abstractmethod
    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return everything that the field consists of, as arrays."""

    def bandwidth(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the standard deviation ``(M, B, 1)`` of the kernel with which the field averages; zero without one."""
        return x.new_zeros(*x.shape[:-1], 1)

    def legs(self, t0: Tensor, t1: Tensor) -> Sequence[Leg]:
        """Return the ways from ``t0`` to ``t1``, ``(M,)`` each, cut where the field jumps: one leg, if nowhere."""
        return [Leg(self, t0, t1)]

    def velocity(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the velocity ``(M, B, d)`` at real time ``t`` and points ``(M, B, d)``."""
        return self.evaluate(t, x).velocity

    def score(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the score ``(M, B, d)`` at real time ``t`` and points ``(M, B, d)``."""
        score = self.evaluate(t, x).score
        if score is None:
            raise ValueError("expected a field with a score, found velocity alone; fit with method='sb-cfm'")
        return score

    def growth(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the growth rate ``(M, B, 1)`` at real time ``t`` and points ``(M, B, d)``; zero without growth."""
        growth = self.evaluate(t, x).growth
        return x.new_zeros(*x.shape[:-1], 1) if growth is None else growth

    @torch.no_grad()
    def __call__(self, t: float, x: np.ndarray, of: Quantity = "velocity") -> np.ndarray:
        """Return the velocity at points ``(n, d)``, averaged over the members, as an array ``(n, d)``.

        According to ``of``, it may be the score ``(n, d)`` or the growth rate ``(n,)`` instead.

        Raises
        ------
        ValueError
            If the time is not a single finite number, the points have another shape, or there is no such quantity.
        """
        if of not in get_args(Quantity):
            raise ValueError(f"expected one of {', '.join(get_args(Quantity))}, found {of!r}")
        if np.ndim(t):
            raise ValueError(f"expected one time, found {np.size(t)}; call the field once for each")
        x = np.asarray(x)
        if not math.isfinite(t):
            raise ValueError(f"expected a finite time, found {t}; pass one in the unit of the snapshots' times")
        if x.ndim != 2 or x.shape[1] != self.dimension:
            raise ValueError(f"expected points (n, {self.dimension}), found shape {x.shape}; a single one is x[None]")
        points = torch.as_tensor(x).to(self.scale)
        found = getattr(self, of)(t, points.expand(self.members, *points.shape)).mean(0).cpu().numpy()
        return found[:, 0] if of == "growth" else found

    def ensemble(self) -> Ensemble:
        """Return the members' mean as a field of one member."""
        return Ensemble(self)


class Ensemble:
    """The mean of a field's members, as a field of one member."""

    members = 1

    def __init__(self, field: VectorField) -> None:
        self.field = field
        self.scale = field.scale.mean(0, keepdim=True)
        self.has_score = field.has_score

    def evaluate(self, t: Tensor | float, x: Tensor) -> FieldSample:
        """Return velocity, score and growth at points ``(1, B, d)``."""
        each = self.field.evaluate(t, x.expand(self.field.members, *x.shape[1:]))
        velocity, score, growth = (
            None if v is None else v.mean(0, keepdim=True) for v in (each.velocity, each.score, each.growth)
        )
        assert velocity is not None
        return FieldSample(velocity, score, growth)

    def bandwidth(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the members' mean bandwidth at points ``(1, B, d)``."""
        return self.field.bandwidth(t, x.expand(self.field.members, *x.shape[1:])).mean(0, keepdim=True)

    def legs(self, t0: Tensor, t1: Tensor) -> Sequence[Leg]:
        """Return the way from ``t0`` to ``t1`` in legs, each with the members' mean as its field."""
        of_all = self.field.legs(t0.expand(self.field.members), t1.expand(self.field.members))
        return [Leg(Ensemble(leg.field), leg.t0[:1], leg.t1[:1]) for leg in of_all]

    def velocity(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the velocity at points ``(1, B, d)``."""
        return self.evaluate(t, x).velocity


class NeuralField(VectorField):
    """A field learned by a network.

    Parameters
    ----------
    network
        Maps standardised times ``(M, B, 1)`` and points ``(M, B, d)`` to ``(M, B, d)``, or to ``(M, B, 2 d)`` with a
        score, and to one column more with growth.
    scalings
        One per member.
    """

    shift: Tensor
    origin: Tensor
    gap: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, scalings: Sequence[Scaling]) -> None:
        super().__init__()
        self.network = network
        self.scored = all(s.std > 0 for s in scalings)

        def stack(values: Sequence[Tensor | float]) -> Tensor:
            rows = [torch.as_tensor(v, dtype=torch.float64).reshape(1, -1) for v in values]
            return torch.stack(rows)  # (M, 1, d) or (M, 1, 1)

        for name in ("shift", "scale", "origin", "gap", "std"):
            self.register_buffer(name, stack([getattr(s, name) for s in scalings]))

    @property
    def dimension(self) -> int:
        """Number of coordinates d."""
        return self.shift.shape[-1]

    @property
    def has_score(self) -> bool:
        """Whether the field has a score head."""
        return self.scored

    @property
    def grows(self) -> bool:
        """Whether the field has a growth head."""
        middle = self.shift.expand(self.members, 1, -1)
        return self.evaluate(float(self.origin[0]), middle).growth is not None

    def evaluate(self, t: Tensor | float, x: Tensor) -> FieldSample:
        """Return velocity, score and growth."""
        t = torch.as_tensor(t, dtype=x.dtype).to(x.device, non_blocking=True)  # without making the host wait
        output = self.network(
            ((t - self.origin) / self.gap).expand(*x.shape[:-1], 1).to(x.dtype), (x - self.shift) / self.scale
        )
        d = x.shape[-1]
        rest = 2 * d if self.has_score else d  # the column of growth
        return FieldSample(
            velocity=output[..., :d] * (self.scale / self.gap),
            score=output[..., d:rest] / self.std if self.has_score else None,
            growth=output[..., rest:] / self.gap if output.shape[-1] > rest else None,
        )

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return weights and scaling as arrays, the member axis first."""
        return {name: value.cpu().numpy() for name, value in self.state_dict().items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], module: nn.Module | None = None) -> NeuralField:
        """Rebuild a field from the arrays of ``to_arrays``; a field with a user's module needs that module again.

        Raises
        ------
        ValueError
            If the arrays are those of a user's module, and none or another one is given.
        """
        state = {name: torch.as_tensor(np.asarray(value)) for name, value in arrays.items()}
        members = len(state["scale"])
        n_layers = sum(name.startswith("network.weights.") for name in state)
        network: nn.Module
        if module is not None:
            network = Modules(module, members)
        elif n_layers:
            shapes = [state[f"network.weights.{k}"].shape for k in range(n_layers)]
            rngs = [torch.Generator() for _ in range(members)]
            network = MLP([shapes[0][1], *(s[2] for s in shapes)], rngs)
        else:
            raise ValueError("expected the user's own module that this field was fitted with: pass module=...")
        blank = Scaling(torch.zeros(state["shift"].shape[-1]), 1.0, 0.0, 1.0, float(state["std"].min()))
        field = cls(network, [blank] * members).to(state["scale"].dtype)
        try:
            field.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"expected the module that this field was fitted with; {error}") from error
        return field
