"""AlexNet, VGG, ResNet and Inception as ordinary PyTorch, with the very parameters of torchvision's.

All take images (B, 3, height, width) and return logits (B, classes).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["VGG", "AlexNet", "InceptionV3", "ResNet"]


class AlexNet(nn.Module):
    """The one-tower AlexNet of Krizhevsky (arXiv:1404.5997)."""

    def __init__(self, *, classes: int = 1000, dropout: float = 0.5) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        # (in, out, kernel, stride, padding, whether a max-pool follows)
        for channels_in, channels_out, kernel, stride, padding, pool in (
            (3, 64, 11, 4, 2, True),
            (64, 192, 5, 1, 2, True),
            (192, 384, 3, 1, 1, False),
            (384, 256, 3, 1, 1, False),
            (256, 256, 3, 1, 1, True),
        ):
            layers += [nn.Conv2d(channels_in, channels_out, kernel, stride, padding), nn.ReLU(inplace=True)]
            if pool:
                layers.append(nn.MaxPool2d(3, 2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(6)
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Dropout(dropout), nn.Linear(256 * 36, 4096), nn.ReLU(inplace=True),
            nn.Dropout(dropout), nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Linear(4096, classes),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(images)))


class VGG(nn.Module):
    """Simonyan and Zisserman, ICLR 2015, table 1; `convolutions` counts the 3x3 convolutions of each of five groups."""

    def __init__(
        self, *, convolutions: tuple[int, ...] = (2, 2, 3, 3, 3), classes: int = 1000, dropout: float = 0.5
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for count, width in zip(convolutions, (64, 128, 256, 512, 512), strict=True):
            for _ in range(count):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(512 * 49, 4096), nn.ReLU(inplace=True), nn.Dropout(dropout),
            nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Dropout(dropout), nn.Linear(4096, classes),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(images)))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, or a bottleneck of 1x1, 3x3, 1x1 with the stride in the 3x3 (ResNet "v1.5")."""

    def __init__(self, channels_in: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        channels_out = width * (4 if bottleneck else 1)
        sizes = [(1, 1), (3, stride), (1, 1)] if bottleneck else [(3, stride), (3, 1)]
        layers: list[nn.Module] = []
        channels = channels_in
        for position, (kernel, step) in enumerate(sizes):
            last = position == len(sizes) - 1
            target = channels_out if last else width
            layers += [nn.Conv2d(channels, target, kernel, step, kernel // 2, bias=False), nn.BatchNorm2d(target)]
            if not last:
                layers.append(nn.ReLU(inplace=True))
            channels = target
        self.body = nn.Sequential(*layers)
        if stride != 1 or channels_in != channels_out:
            self.shortcut: nn.Module = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )
        else:
            self.shortcut = nn.Identity()
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    """He et al., CVPR 2016, table 1; `blocks` counts the residual blocks of each of four groups."""

    def __init__(
        self,
        *,
        blocks: tuple[int, ...] = (3, 4, 6, 3),
        bottleneck: bool = True,
        width: int = 64,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        body: list[nn.Module] = []
        channels = width
        for group, count in enumerate(blocks):
            for position in range(count):
                stride = 2 if group > 0 and position == 0 else 1
                body.append(ResidualBlock(channels, width * 2**group, stride, bottleneck))
                channels = width * 2**group * (4 if bottleneck else 1)
        self.body = nn.Sequential(*body)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.pool(self.body(self.stem(images))).flatten(1))


class ConvolutionNorm(nn.Sequential):
    """Convolution without bias, batch normalization, ReLU: the brick of Inception."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels_out, kernel, stride, padding, bias=False),
            nn.BatchNorm2d(channels_out, eps=0.001),
            nn.ReLU(inplace=True),
        )


class Branches(nn.Module):
    """The same input through several branches, joined along the channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


def _inception_a(channels: int, pooled: int) -> Branches:  # figure 5 of the paper
    return Branches(
        ConvolutionNorm(channels, 64, 1),
        nn.Sequential(ConvolutionNorm(channels, 48, 1), ConvolutionNorm(48, 64, 5, padding=2)),
        nn.Sequential(
            ConvolutionNorm(channels, 64, 1),
            ConvolutionNorm(64, 96, 3, padding=1),
            ConvolutionNorm(96, 96, 3, padding=1),
        ),
        nn.Sequential(nn.AvgPool2d(3, 1, 1), ConvolutionNorm(channels, pooled, 1)),
    )


def _inception_b(channels: int) -> Branches:  # figure 10: halves the grid
    return Branches(
        ConvolutionNorm(channels, 384, 3, 2),
        nn.Sequential(
            ConvolutionNorm(channels, 64, 1), ConvolutionNorm(64, 96, 3, padding=1), ConvolutionNorm(96, 96, 3, 2)
        ),
        nn.MaxPool2d(3, 2),
    )


def _inception_c(channels: int, width: int) -> Branches:  # figure 6 with n = 7
    def across(source: int, target: int) -> ConvolutionNorm:
        return ConvolutionNorm(source, target, (1, 7), padding=(0, 3))

    def down(source: int, target: int) -> ConvolutionNorm:
        return ConvolutionNorm(source, target, (7, 1), padding=(3, 0))

    return Branches(
        ConvolutionNorm(channels, 192, 1),
        nn.Sequential(ConvolutionNorm(channels, width, 1), across(width, width), down(width, 192)),
        nn.Sequential(
            ConvolutionNorm(channels, width, 1), down(width, width), across(width, width), down(width, width),
            across(width, 192),
        ),
        nn.Sequential(nn.AvgPool2d(3, 1, 1), ConvolutionNorm(channels, 192, 1)),
    )  # fmt: skip


def _inception_d(channels: int) -> Branches:  # halves the grid again
    return Branches(
        nn.Sequential(ConvolutionNorm(channels, 192, 1), ConvolutionNorm(192, 320, 3, 2)),
        nn.Sequential(
            ConvolutionNorm(channels, 192, 1),
            ConvolutionNorm(192, 192, (1, 7), padding=(0, 3)),
            ConvolutionNorm(192, 192, (7, 1), padding=(3, 0)),
            ConvolutionNorm(192, 192, 3, 2),
        ),
        nn.MaxPool2d(3, 2),
    )


def _inception_e(channels: int) -> Branches:  # figure 7
    def fork() -> Branches:
        return Branches(
            ConvolutionNorm(384, 384, (1, 3), padding=(0, 1)), ConvolutionNorm(384, 384, (3, 1), padding=(1, 0))
        )

    return Branches(
        ConvolutionNorm(channels, 320, 1),
        nn.Sequential(ConvolutionNorm(channels, 384, 1), fork()),
        nn.Sequential(ConvolutionNorm(channels, 448, 1), ConvolutionNorm(448, 384, 3, padding=1), fork()),
        nn.Sequential(nn.AvgPool2d(3, 1, 1), ConvolutionNorm(channels, 192, 1)),
    )


class InceptionV3(nn.Module):
    """Szegedy et al., CVPR 2016, table 1, for images of at least 75 x 75 (299 x 299 in the paper).

    With `auxiliary`, in training it returns (logits, logits of the auxiliary classifier, section 4) instead of logits.
    """

    def __init__(self, *, classes: int = 1000, dropout: float = 0.5, auxiliary: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            ConvolutionNorm(3, 32, 3, 2), ConvolutionNorm(32, 32, 3), ConvolutionNorm(32, 64, 3, padding=1),
            nn.MaxPool2d(3, 2), ConvolutionNorm(64, 80, 1), ConvolutionNorm(80, 192, 3), nn.MaxPool2d(3, 2),
        )  # fmt: skip
        self.fine = nn.Sequential(
            _inception_a(192, 32), _inception_a(256, 64), _inception_a(288, 64), _inception_b(288),
            _inception_c(768, 128), _inception_c(768, 160), _inception_c(768, 160), _inception_c(768, 192),
        )  # fmt: skip
        self.auxiliary = (
            nn.Sequential(
                nn.AvgPool2d(5, 3), ConvolutionNorm(768, 128, 1), ConvolutionNorm(128, 768, 5),
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(768, classes),
            )
            if auxiliary
            else None
        )  # fmt: skip
        self.coarse = nn.Sequential(_inception_d(768), _inception_e(1280), _inception_e(2048))
        self.classifier = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Dropout(dropout), nn.Flatten(), nn.Linear(2048, classes)
        )

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.fine(self.stem(images))
        logits = self.classifier(self.coarse(x))
        if self.auxiliary is not None and self.training:
            return logits, self.auxiliary(x)
        return logits
