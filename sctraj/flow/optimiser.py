"""How the training loop moves weights: AdamW, its learning rate's cycle, and early stopping of single members."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def one_cycle(progress: float) -> float:
    """Return the learning rate over its highest: a linear rise over the first tenth, then a cosine fall to zero."""
    rise = 0.1
    if progress < rise:
        return (progress + 0.01) / (rise + 0.01)
    return 0.5 * (1 + math.cos(math.pi * (progress - rise) / (1 - rise)))


class AdamW:
    """AdamW with PyTorch's defaults (Loshchilov & Hutter 2019).

    ``torch.optim.AdamW`` takes the same steps, but creating one loads the compiler, which takes longer than a short
    fit.
    """

    def __init__(self, weights: list[Tensor], weight_decay: float) -> None:
        self.weights, self.weight_decay = weights, weight_decay
        self.means = [torch.zeros_like(w) for w in weights]
        self.squares = [torch.zeros_like(w) for w in weights]
        device = weights[0].device
        self.taken = [torch.zeros((), device=device) for _ in weights]
        self.fused = device.type in ("cpu", "cuda")

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor | None], learning_rate: Tensor | float) -> None:
        """Take a step; weights without a gradient stay as they are."""
        moved = [k for k, gradient in enumerate(gradients) if gradient is not None]
        adamw(
            [self.weights[k] for k in moved],
            [gradient.contiguous() for gradient in gradients if gradient is not None],  # like the weights
            [self.means[k] for k in moved],
            [self.squares[k] for k in moved],
            [],
            [self.taken[k] for k in moved],
            fused=self.fused,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=learning_rate,
            weight_decay=self.weight_decay,
            eps=1e-8,
            maximize=False,
        )


class swapped:
    """Replace the weights' values within a ``with`` block."""

    def __init__(self, weights: list[Tensor], values: list[Tensor]) -> None:
        self.weights, self.values = weights, values

    def __enter__(self) -> None:
        self.kept = [w.detach().clone() for w in self.weights]
        for w, v in zip(self.weights, self.values):
            w.copy_(v)

    def __exit__(self, *_: object) -> None:
        for w, v in zip(self.weights, self.kept):
            w.copy_(v)


class EarlyStopping:
    """Each member's best weights so far; a member without improvement for ``patience`` evaluations is done for good."""

    def __init__(self, weights: list[Tensor], members: int, patience: int) -> None:
        self.best, device = [w.clone() for w in weights], weights[0].device
        self.lowest = torch.full((members,), math.inf, device=device)
        self.waited = torch.zeros(members, dtype=torch.long, device=device)
        self.patience = patience

    def look(self, loss: Tensor, weights: list[Tensor]) -> None:
        """Record the members' validation losses with these weights."""
        better = (loss < self.lowest) & (self.waited < self.patience)
        self.lowest = torch.where(better, loss.to(self.lowest), self.lowest)
        done = self.waited >= self.patience
        self.waited = torch.where(better, 0, self.waited + 1)
        self.waited = torch.where(done, self.patience, self.waited)
        for best, w in zip(self.best, weights):
            best.copy_(torch.where(better.view(-1, *[1] * (w.dim() - 1)), w, best))

    def done(self) -> bool:
        """Ask whether all members are done; the host waits for the device to answer."""
        return bool((self.waited >= self.patience).all())
