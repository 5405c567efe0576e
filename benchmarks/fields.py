"""The fields the benchmarks solve: a formula, a small network, a convolution block."""

import torch
from torch import nn


class LotkaVolterra(nn.Module):
    """Prey and predators, y [batch, 2]; the four rates are parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = nn.Parameter(torch.tensor([1.1, 0.4, 0.4, 0.1]))

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        growth, hunted, death, fed = self.rates
        prey, predators = y[:, :1], y[:, 1:]
        return torch.cat([prey * (growth - hunted * predators), predators * (fed * prey - death)], 1)


class MLP(nn.Module):
    def __init__(self, width: int = 8, hidden: int = 32):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, width))

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.net(y)


class TimeConvolution(nn.Module):
    """A convolution that sees the time as one more channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.convolution = nn.Conv2d(channels + 1, channels, 3, padding=1)

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.convolution(torch.cat([torch.ones_like(y[:, :1]) * t, y], 1))


class ConvolutionField(nn.Module):
    """The field of torchdiffeq's MNIST example: two convolutions between group normalisations."""

    def __init__(self, channels: int = 64):
        super().__init__()
        groups = min(32, channels)
        self.norm1, self.conv1 = nn.GroupNorm(groups, channels), TimeConvolution(channels)
        self.norm2, self.conv2 = nn.GroupNorm(groups, channels), TimeConvolution(channels)
        self.norm3 = nn.GroupNorm(groups, channels)

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        y = self.conv1(t, torch.relu(self.norm1(y)))
        return self.norm3(self.conv2(t, torch.relu(self.norm2(y))))


class Counted(nn.Module):
    """A field that counts its calls."""

    def __init__(self, field: nn.Module):
        super().__init__()
        self.field, self.calls = field, 0

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.field(t, y)
