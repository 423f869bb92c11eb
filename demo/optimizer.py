"""Muon for the matrices inside the layers, Adam for the embedding, the output and the gains."""

from collections import defaultdict

import torch
from torch import Tensor

# Newton-Schulz steps, and the coefficients of their quintic, which pulls every singular value towards one. More steps
# come closer to one, but these products already are a good part of a training step's time.
_STEPS = 3
_LINEAR, _CUBIC, _QUINTIC = 3.4445, -4.7750, 2.0315


def _orthogonalised(matrices: Tensor) -> Tensor:
    """Return a semi-orthogonal matrix near each of a stack, by Newton-Schulz iteration."""
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    result = matrices.transpose(-1, -2) if is_tall else matrices
    result = result / (result.flatten(-2).norm(dim=-1)[..., None, None] + 1e-7)
    for _ in range(_STEPS):
        gram = result @ result.transpose(-1, -2)
        result = _LINEAR * result + (_CUBIC * gram + _QUINTIC * gram @ gram) @ result
    return result.transpose(-1, -2) if is_tall else result


class Optimizer:
    """One optimizer for all weights, whose learning rates follow one schedule."""

    def __init__(self, weights: dict[str, Tensor], muon_rate: float, adam_rate: float):
        self._groups: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        others = []
        for name, weight in weights.items():
            if weight.dim() == 2 and name.startswith("layers."):
                self._groups[tuple(weight.shape)].append(weight)
            else:
                others.append(weight)
        self._momentum = {shape: torch.zeros(len(group), *shape) for shape, group in self._groups.items()}
        self._adam = torch.optim.AdamW(others, lr=adam_rate, betas=(0.9, 0.97), eps=1e-10, weight_decay=0.0, fused=True)
        self._muon_rate, self._adam_rate = muon_rate, adam_rate

    def step(self, factor: float) -> None:
        """Apply the gradients with `factor` times the peak learning rates, and clear them."""
        for group in self._adam.param_groups:
            group["lr"] = self._adam_rate * factor
        self._adam.step()
        self._adam.zero_grad()
        for shape, group in self._groups.items():
            gradients = torch.stack([weight.grad for weight in group])
            momentum = self._momentum[shape]
            momentum.lerp_(gradients, 0.05)
            updates = _orthogonalised(gradients.lerp(momentum, 0.95))
            rate = self._muon_rate * factor * max(1, shape[0] / shape[1]) ** 0.5
            for weight, update in zip(group, updates, strict=True):
                weight.data.add_(update, alpha=-rate)
                weight.grad = None

    def state_dict(self) -> dict:
        """Return what a resumed training needs."""
        return {"momentum": self._momentum, "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Continue from what `state_dict` returned."""
        self._momentum = state["momentum"]
        self._adam.load_state_dict(state["adam"])
