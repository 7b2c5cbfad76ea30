"""Known models by name, as ordinary PyTorch with no parallel code, with the exact parameter counts of their publishers.

    >>> with torch.device("meta"):                     # nothing is allocated, whatever the size
    ...     model = zoo.build("llama3.1-405b")
    >>> inputs, targets = zoo.sample_inputs("llama3.1-405b", samples=2)
    >>> loss = zoo.loss("llama3.1-405b")(model(inputs), targets)

`language.py` holds the transformers and `vision.py` the convolutional networks; this module knows their sizes.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headway.errors import InputError
from headway.value import Value
from headway.workload.graph import Graph
from headway.workload.zoo.language import GPT, Bert, Llama
from headway.workload.zoo.vision import VGG, AlexNet, InceptionV3, ResNet

__all__ = ["Entry", "build", "entry", "loss", "names", "sample_inputs", "trace"]

_CLASSES: dict[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (AlexNet, Bert, GPT, InceptionV3, Llama, ResNet, VGG)
}

_GPT2 = "Radford et al. 2019, and the counts of the published checkpoints"
_LLAMA3 = "The Llama 3 Herd of Models, arXiv:2407.21783, table 3, and the model cards"
_TORCHVISION = "torchvision's model of this name"


class Entry(Value):
    """One known model.

    `kind` is the class that builds it and `sizes` are that class's arguments. `parameters` counts its elements, tied
    ones once; `source` says where the sizes and the count are from. `task` says what it is trained to do: "language"
    predicts the next token at each of `sequence` positions, "embedding" fits the pooled embedding of `sequence` tokens
    to a given one (as distillation does), and "image" classifies images of `image_size` x `image_size`.
    """

    name: str
    description: str
    kind: str
    sizes: dict[str, Any]
    parameters: int
    source: str
    task: Literal["language", "embedding", "image"] = "language"
    sequence: int = 0  # tokens of a sample; 0 for images
    image_size: int = 0


def _entries() -> dict[str, Entry]:
    def gpt(name: str, description: str, parameters: int, layers: int, width: int, heads: int, **more) -> Entry:
        context, source = more.get("context", 1024), more.get("source", _GPT2)
        sizes = {"layers": layers, "width": width, "heads": heads, "context": context}
        return Entry(
            name=name, description=description, kind="GPT", sizes=sizes, parameters=parameters, source=source,
            sequence=context,
        )  # fmt: skip

    def llama(name: str, description: str, parameters: int, source: str = _LLAMA3, sequence: int = 8192, **sizes):
        return Entry(
            name=name, description=description, kind="Llama", sizes=sizes, parameters=parameters, source=source,
            sequence=sequence,
        )  # fmt: skip

    def image(name: str, description: str, kind: str, parameters: int, image_size: int = 224, **sizes) -> Entry:
        return Entry(
            name=name, description=description, kind=kind, sizes=sizes, parameters=parameters, source=_TORCHVISION,
            task="image", image_size=image_size,
        )  # fmt: skip

    found = (
        gpt("gpt2", "GPT-2 small", 124_439_808, 12, 768, 12),
        gpt("gpt2-medium", "GPT-2 medium", 354_823_168, 24, 1024, 16),
        gpt("gpt2-large", "GPT-2 large", 774_030_080, 36, 1280, 20),
        gpt("gpt2-xl", "GPT-2 XL", 1_557_611_200, 48, 1600, 25),
        gpt(
            "gpt3-175b", "GPT-3, all of its attention dense", 174_604_259_328, 96, 12288, 96, context=2048,
            source="Brown et al., NeurIPS 2020, table 2.1",
        ),
        llama(
            "llama3.2-1b", "Llama 3.2 1B, head tied to the embedding", 1_235_814_400,
            source="the model card of Llama-3.2-1B", layers=16, width=2048, heads=32, kv_heads=8, hidden=8192,
            rotary_scaling=32.0, tied=True,
        ),
        llama(
            "llama3.1-8b", "Llama 3.1 8B", 8_030_261_248, layers=32, width=4096, heads=32, kv_heads=8, hidden=14336,
            rotary_scaling=8.0,
        ),
        llama(
            "llama3.1-70b", "Llama 3.1 70B", 70_553_706_496, layers=80, width=8192, heads=64, kv_heads=8,
            hidden=28672, rotary_scaling=8.0,
        ),
        llama(
            "llama3.1-405b", "Llama 3.1 405B", 405_853_388_800, layers=126, width=16384, heads=128, kv_heads=8,
            hidden=53248, rotary_scaling=8.0,
        ),
        llama(
            "mixtral-8x7b", "Mixtral 8x7B: two of eight experts for each token", 46_702_792_704,
            source="Jiang et al., arXiv:2401.04088, table 1, and the published checkpoint", sequence=4096, layers=32,
            width=4096, heads=32, kv_heads=8, hidden=14336, vocabulary=32000, rotary_base=1e6, experts=8, top_k=2,
        ),
        Entry(
            name="bert-base", description="BERT base, uncased: the encoder with its pooler", kind="Bert",
            sizes={"layers": 12, "width": 768, "heads": 12}, parameters=109_482_240, task="embedding", sequence=512,
            source="Devlin et al., NAACL 2019, and transformers' BertModel",
        ),
        image("resnet18", "ResNet-18", "ResNet", 11_689_512, blocks=(2, 2, 2, 2), bottleneck=False),
        image("resnet34", "ResNet-34", "ResNet", 21_797_672, blocks=(3, 4, 6, 3), bottleneck=False),
        image("resnet50", "ResNet-50", "ResNet", 25_557_032, blocks=(3, 4, 6, 3)),
        image("resnet101", "ResNet-101", "ResNet", 44_549_160, blocks=(3, 4, 23, 3)),
        image("resnet152", "ResNet-152", "ResNet", 60_192_808, blocks=(3, 8, 36, 3)),
        image("vgg11", "VGG-11", "VGG", 132_863_336, convolutions=(1, 1, 2, 2, 2)),
        image("vgg16", "VGG-16", "VGG", 138_357_544, convolutions=(2, 2, 3, 3, 3)),
        image("vgg19", "VGG-19", "VGG", 143_667_240, convolutions=(2, 2, 4, 4, 4)),
        image("alexnet", "AlexNet, one tower", "AlexNet", 61_100_840),
        image(
            "inception-v3", "Inception v3; auxiliary=True adds the auxiliary classifier: 27,161,264 parameters",
            "InceptionV3", 23_834_568, image_size=299,
        ),
    )  # fmt: skip
    return {item.name: item for item in found}


_ENTRIES = _entries()


def names() -> tuple[str, ...]:
    """The models that are known, language models first."""
    return tuple(_ENTRIES)


def entry(name: str) -> Entry:
    """What is known about a model. Raises InputError for an unknown name, with the nearest known ones as a remedy."""
    if name not in _ENTRIES:
        raise InputError(f"no model is named {name!r}", place="zoo", remedy=_nearest(name.lower(), _ENTRIES))
    return _ENTRIES[name]


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"one of: {', '.join(known)}"


def build(name: str, **overrides: Any) -> nn.Module:
    """The model, freshly initialized; `overrides` replace its sizes (`layers=2`). Call it inside `torch.device("meta")`
    to allocate nothing. Raises InputError for an unknown name or size."""
    found = entry(name)
    kind = _CLASSES[found.kind]
    known = tuple(inspect.signature(kind).parameters)
    for field in overrides:
        if field not in known:
            raise InputError(f"{name} has no size {field!r}", place="zoo", remedy=_nearest(field, known))
    return kind(**{**found.sizes, **overrides})


def sample_inputs(name: str, samples: int, sequence: int | None = None, **overrides: Any) -> tuple[Tensor, Tensor]:
    """(inputs, targets) of so many samples, on the meta device: what the model takes and what `loss(name)` takes.

    Language: tokens (samples, sequence) both, int64. Embedding: tokens, and float32 (samples, width). Image: float32
    (samples, 3, image_size, image_size), and int64 classes (samples,). `sequence` defaults to the entry's and is
    refused for images. `overrides` are those given to `build`. Raises InputError.
    """
    found = entry(name)
    if found.task == "image":
        if sequence is not None:
            raise InputError(f"{name} reads images, not sequences", place="zoo", remedy="leave the sequence out")
        images = torch.empty(samples, 3, found.image_size, found.image_size, device="meta")
        return images, torch.empty(samples, dtype=torch.int64, device="meta")
    defaults = inspect.signature(_CLASSES[found.kind]).parameters
    sizes = {**{field: item.default for field, item in defaults.items()}, **found.sizes, **overrides}
    length = sequence or min(found.sequence, sizes.get("context", found.sequence))
    if length > sizes.get("context", length):
        raise InputError(
            f"{name} reads at most {sizes['context']} tokens, not {length}", place="zoo", remedy="shorten the sequence"
        )
    tokens = torch.empty(samples, length, dtype=torch.int64, device="meta")
    if found.task == "embedding":
        return tokens, torch.empty(samples, sizes["width"], device="meta")
    return tokens, torch.empty_like(tokens)


def _next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _image_loss(output: Tensor | tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    if isinstance(output, Tensor):
        return F.cross_entropy(output, targets)
    logits, auxiliary = output
    # The weight of GoogLeNet's auxiliary classifiers (Szegedy et al., CVPR 2015, section 5).
    return F.cross_entropy(logits, targets) + 0.3 * F.cross_entropy(auxiliary, targets)


def loss(name: str) -> Callable[[Any, Tensor], Tensor]:
    """The function of (output, targets) that gives the mean loss the model is trained on. Raises InputError."""
    return {"language": _next_token_loss, "embedding": F.mse_loss, "image": _image_loss}[entry(name).task]


def trace(name: str, sequence: int | None = None, layers: int | None = None) -> Graph:
    """The model's graph, traced with its loss and without allocating it; `layers` overrides a transformer's depth.

    Raises InputError for an unknown name, or when `sequence` or `layers` mean nothing to the model.
    """
    from headway.workload.trace import trace as trace_module  # imported late: it loads torch's tracing

    overrides = {} if layers is None else {"layers": layers}
    with torch.device("meta"):
        model = build(name, **overrides)
    inputs, targets = sample_inputs(name, 2, sequence, **overrides)
    return trace_module(model, (inputs,), name=name, loss=loss(name), target=targets)
