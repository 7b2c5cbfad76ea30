"""What Tiresias's models are like: how skewed their tensors are, and what being spread costs them.

The skew is the largest tensor's share of all parameters (Gu et al., NSDI 2019, section 3.3, table 1 there). Models of
the zoo are built, on the meta device; GoogLeNet and Inception-v4, which it does not have, are counted from the tables
of their papers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from headway.errors import InputError
from headway.schedule.job import ModelProfile
from headway.workload import zoo

__all__ = ["MODELS", "PUBLISHED_SKEW", "PUBLISHED_SPEED", "model_profile", "model_profiles", "tensor_elements"]

# What traces call them, to the zoo's names; "": counted here.
MODELS = {
    "vgg19": "vgg19", "vgg16": "vgg16", "vgg11": "vgg11", "alexnet": "alexnet", "resnet152": "resnet152",
    "resnet101": "resnet101", "resnet50": "resnet50", "inception3": "inception-v3", "inception4": "",
    "googlenet": "",
}  # fmt: skip

# Speed with devices at random over speed consolidated, as read off figure 3; of the other models it is about 1.
PUBLISHED_SPEED = {"vgg19": 0.72, "vgg16": 0.73, "alexnet": 0.81}
# Largest tensor over all, as printed there.
PUBLISHED_SKEW = {
    "vgg19": 0.715, "vgg16": 0.743, "vgg11": 0.773, "alexnet": 0.610, "resnet152": 0.039, "resnet101": 0.053,
    "resnet50": 0.092, "inception4": 0.036, "inception3": 0.086, "googlenet": 0.146,
}  # fmt: skip


@cache
def tensor_elements(model: str) -> tuple[int, ...]:
    """Elements of each parameter tensor, in the model's order. Raises InputError for a model that is not known."""
    if model == "googlenet":
        return tuple(_googlenet())
    if model == "inception4":
        return tuple(_inception4())
    with torch.device("meta"):
        built = zoo.build(MODELS.get(model, model))
    return tuple(parameter.numel() for parameter in built.parameters())


@cache
def model_profile(model: str) -> ModelProfile:
    """Skew and bytes (float32) of a model by the name that traces or the zoo give it.

    What being spread costs is that of figure 3 where the paper has it, else nothing; spread.py predicts it for other
    machines. Raises InputError.
    """
    if model not in MODELS and model not in zoo.names():
        raise InputError(f"no model is named {model!r}", place="profiles", remedy=f"one of: {', '.join(MODELS)}")
    elements = tensor_elements(model)
    return ModelProfile(
        name=model,
        skew=max(elements) / sum(elements),
        parameter_bytes=4.0 * sum(elements),
        spread_slowdown=1 / PUBLISHED_SPEED.get(model, 1.0),
    )


def model_profiles() -> dict[str, ModelProfile]:
    """Of all models that Tiresias's traces name."""
    return {model: model_profile(model) for model in MODELS}


def _convolution(source: int, target: int, height: int, width: int = 0, *, norm: bool = True) -> list[int]:
    """A convolution's weight, and either the two vectors of its batch norm or its bias."""
    return [source * target * height * (width or height), *([target, target] if norm else [target])]


def _googlenet() -> list[int]:
    """Szegedy et al., CVPR 2015, table 1: widths of 1x1, 3x3 reduced, 3x3, 5x5 reduced, 5x5, pooled; no batch norm."""
    table = (
        (64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64), (192, 96, 208, 16, 48, 64), (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64), (112, 144, 288, 32, 64, 64), (256, 160, 320, 32, 128, 128),
        (256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128),
    )  # fmt: skip
    tensors = [*_plain(3, 64, 7), *_plain(64, 64, 1), *_plain(64, 192, 3)]
    channels = 192
    for one, three_reduced, three, five_reduced, five, pooled in table:
        tensors += _plain(channels, one, 1)
        tensors += _plain(channels, three_reduced, 1) + _plain(three_reduced, three, 3)
        tensors += _plain(channels, five_reduced, 1) + _plain(five_reduced, five, 5)
        tensors += _plain(channels, pooled, 1)
        channels = one + three + five + pooled
    return [*tensors, channels * 1000, 1000]


def _plain(source: int, target: int, size: int) -> list[int]:
    return _convolution(source, target, size, norm=False)


Chain = Sequence[tuple[int, int, int]]  # of (target, height, width), one convolution after the other


def _inception4() -> list[int]:
    """Szegedy et al., AAAI 2017, figures 3 to 9: the stem, 4 blocks A, 7 blocks B and 3 blocks C."""
    tensors: list[int] = []

    def branch(channels: int, *chain: tuple[int, int, int]) -> None:
        for target, height, width in chain:
            tensors.extend(_convolution(channels, target, height, width))
            channels = target

    branch(3, (32, 3, 3), (32, 3, 3), (64, 3, 3))
    branch(64, (96, 3, 3))
    branch(160, (64, 1, 1), (96, 3, 3))
    branch(160, (64, 1, 1), (64, 7, 1), (64, 1, 7), (96, 3, 3))
    branch(192, (192, 3, 3))
    for _ in range(4):
        branch(384, (96, 1, 1))
        branch(384, (96, 1, 1))
        branch(384, (64, 1, 1), (96, 3, 3))
        branch(384, (64, 1, 1), (96, 3, 3), (96, 3, 3))
    branch(384, (384, 3, 3))  # reduction A: k, l, m, n = 192, 224, 256, 384
    branch(384, (192, 1, 1), (224, 3, 3), (256, 3, 3))
    for _ in range(7):
        branch(1024, (128, 1, 1))
        branch(1024, (384, 1, 1))
        branch(1024, (192, 1, 1), (224, 1, 7), (256, 7, 1))
        branch(1024, (192, 1, 1), (192, 1, 7), (224, 7, 1), (224, 1, 7), (256, 7, 1))
    branch(1024, (192, 1, 1), (192, 3, 3))  # reduction B
    branch(1024, (256, 1, 1), (256, 1, 7), (320, 7, 1), (320, 3, 3))
    for _ in range(3):
        branch(1536, (256, 1, 1))
        branch(1536, (256, 1, 1))
        branch(1536, (384, 1, 1))
        branch(384, (256, 1, 3))
        branch(384, (256, 3, 1))
        branch(1536, (384, 1, 1), (448, 1, 3), (512, 3, 1))
        branch(512, (256, 3, 1))
        branch(512, (256, 1, 3))
    return [*tensors, 1536 * 1000, 1000]
