"""The net of `tests.peers.winograd` in PyTorch, its Winograd-aware layers written from the formula.

F(4, 3) with learned transforms, each of nine sites rounded to 8 bits with a moving average of its
range, straight through (arXiv 2002.10711). Two ways to add up over channels: a matrix product a
tap, and a broadcast product of all inputs with all kernels.
"""

import torch
from torch import nn
from torch.nn import functional

from efficient_nets.ops.winograd import points, transforms

TILE, BITS = 4, 8


class Rounding(nn.Module):
    """Symmetric codes -128 ... 127 of step max |range| / 127.5; the range moves in training."""

    def __init__(self):
        super().__init__()
        self.register_buffer("limits", torch.zeros(2))

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                seen = torch.stack([x.min().clamp(max=0), x.max().clamp(min=0)])
                self.limits.lerp_(seen, 0.01 if self.limits.any() else 1.0)
        step = self.limits.abs().max() / (2 ** (BITS - 1) - 0.5)
        rounded = (x / step).round().clamp(-(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1) * step
        return x + (rounded - x).detach()


class WinogradConv(nn.Module):
    """3x3, stride 1, one zero on each side."""

    def __init__(self, channels: int, features: int, broadcast: bool):
        super().__init__()
        self.broadcast = broadcast
        weight = torch.empty(features, channels, 3, 3)
        self.weight = nn.Parameter(nn.init.kaiming_normal_(weight))
        exact = transforms.cook_toom(TILE, 3, points.points("half", TILE + 1))
        at, g, bt = (torch.tensor(m, dtype=torch.float32) for m in transforms.as_floats(exact))
        self.at, self.g, self.bt = nn.Parameter(at), nn.Parameter(g), nn.Parameter(bt)
        names = ("x", "w", "at", "g", "bt", "u", "v", "m", "y")
        self.rounding = nn.ModuleDict({name: Rounding() for name in names})

    def forward(self, x):
        q = self.rounding
        at, g, bt = q["at"](self.at), q["g"](self.g), q["bt"](self.bt)
        x, w = q["x"](x), q["w"](self.weight)
        batch, _, height, width = x.shape
        rows, columns = -(-height // TILE), -(-width // TILE)
        pad = (1, columns * TILE + 1 - width, 1, rows * TILE + 1 - height)
        tiles = functional.pad(x, pad).unfold(2, 6, TILE).unfold(3, 6, TILE)
        v = q["v"](bt @ tiles @ bt.T)  # N, C, rows, columns, 6, 6
        u = q["u"](g @ w @ g.T)  # O, C, 6, 6
        if self.broadcast:
            m = (v[:, None] * u[None, :, :, None, None]).sum(2)
        else:
            flat = v.permute(4, 5, 0, 2, 3, 1).reshape(36, -1, v.shape[1])
            m = flat @ u.permute(2, 3, 1, 0).reshape(36, v.shape[1], -1)
            m = m.reshape(6, 6, batch, rows, columns, -1).permute(2, 5, 3, 4, 0, 1)
        y = at @ q["m"](m) @ at.T  # N, O, rows, columns, 4, 4
        y = y.permute(0, 1, 2, 4, 3, 5).reshape(batch, -1, rows * TILE, columns * TILE)
        return q["y"](y[:, :, :height, :width])


class RoundedConv(nn.Conv2d):
    """The direct 1x1 convolution of shortcuts, rounded at input, kernel and output."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.rounding = nn.ModuleList(Rounding() for _ in range(3))

    def forward(self, x):
        x, w = self.rounding[0](x), self.rounding[1](self.weight)
        return self.rounding[2](functional.conv2d(x, w))


class Block(nn.Module):
    def __init__(self, channels: int, features: int, conv, pointwise):
        super().__init__()
        self.conv1, self.norm1 = conv(channels, features), nn.BatchNorm2d(features)
        self.conv2, self.norm2 = conv(features, features), nn.BatchNorm2d(features)
        self.shortcut = None
        if channels != features:
            one = pointwise(channels, features, 1, bias=False)
            self.shortcut = nn.Sequential(one, nn.BatchNorm2d(features))

    def forward(self, x):
        y = functional.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return functional.relu(y + (x if self.shortcut is None else self.shortcut(x)))


def net(width: float, way: str) -> nn.Module:
    """The ResNet-18-like net for 32x32 images and 10 classes.

    Args:
      width: Multiplies 64, 128, 256 and 512 channels; the stem has 32.
      way: 'direct' in float, 'batched' or 'broadcast'.
    """

    def conv(channels, features):
        if way == "direct":
            return nn.Conv2d(channels, features, 3, padding=1, bias=False)
        return WinogradConv(channels, features, way == "broadcast")

    pointwise = nn.Conv2d if way == "direct" else RoundedConv
    layers = [nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    channels = 32
    for stage in range(4):
        features = round(64 * 2**stage * width)
        layers += [nn.MaxPool2d(2)] if stage else []
        layers += [Block(channels, features, conv, pointwise)]
        layers += [Block(features, features, conv, pointwise)]
        channels = features
    return nn.Sequential(*layers, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(channels, 10))
