"""Dense layers with their gradients, and Adam: as much of a neural network as a small auto-encoder needs, in numpy.

Gradients are written out by hand; a test holds them to finite differences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

DECAYS = (0.9, 0.999)    # of Adam's two averages (Kingma and Ba, 2015)
EPSILON = 1e-8


class Dense:
    """Layers of weights and biases with ReLU between them and nothing after the last."""

    def __init__(self, sizes: Sequence[int], *, seed: int) -> None:
        draw = np.random.default_rng(seed)
        # He's start for ReLU: neither vanishing nor exploding at first.
        self.weights = [draw.normal(size=(fan_in, fan_out)) * np.sqrt(2.0 / fan_in)
                        for fan_in, fan_out in pairwise(sizes)]
        self.biases = [np.zeros(fan_out) for fan_out in sizes[1:]]

    @property
    def parameters(self) -> list[Floats]:
        """Weights and biases, to be changed in place."""
        return [*self.weights, *self.biases]

    def forward(self, rows: Floats) -> list[Floats]:
        """What enters each layer, and last what comes out."""
        seen = [rows]
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            out = seen[-1] @ weight + bias
            seen.append(np.maximum(out, 0.0) if layer + 1 < len(self.weights) else out)
        return seen

    def backward(self, seen: Sequence[Floats], slope: Floats) -> tuple[list[Floats], Floats]:
        """From the loss's slope at the output: its slopes by `parameters`, and at the input."""
        weights: list[Floats] = []
        biases: list[Floats] = []
        for layer in reversed(range(len(self.weights))):
            weights.append(seen[layer].T @ slope)
            biases.append(slope.sum(axis=0))
            slope = slope @ self.weights[layer].T
            if layer:
                slope = slope * (seen[layer] > 0.0)
        return [*reversed(weights), *reversed(biases)], slope

    def save(self) -> dict[str, Floats]:
        """Weights and biases by layer."""
        saved = {f"weight{layer}": weight.copy() for layer, weight in enumerate(self.weights)}
        saved.update({f"bias{layer}": bias.copy() for layer, bias in enumerate(self.biases)})
        return saved

    @classmethod
    def load(cls, saved: Mapping[str, Floats]) -> Dense:
        """What `save` returned, as it was."""
        loaded = cls((1, 1), seed=0)
        count = len(saved) // 2
        loaded.weights = [saved[f"weight{layer}"].copy() for layer in range(count)]
        loaded.biases = [saved[f"bias{layer}"].copy() for layer in range(count)]
        return loaded


class Adam:
    """Steps down slopes, each parameter at its own pace."""

    def __init__(self, parameters: Sequence[Floats], *, rate: float) -> None:
        self._parameters = list(parameters)
        self._rate = rate
        self._steps = 0
        self._means = [np.zeros_like(each) for each in parameters]
        self._squares = [np.zeros_like(each) for each in parameters]

    def step(self, slopes: Sequence[Floats]) -> None:
        """Change the parameters, in place, by one step."""
        self._steps += 1
        first, second = DECAYS
        pace = self._rate * np.sqrt(1.0 - second**self._steps) / (1.0 - first**self._steps)
        for index, slope in enumerate(slopes):
            self._means[index] += (1.0 - first) * (slope - self._means[index])
            self._squares[index] += (1.0 - second) * (slope * slope - self._squares[index])
            self._parameters[index] -= pace * self._means[index] / (np.sqrt(self._squares[index]) + EPSILON)
