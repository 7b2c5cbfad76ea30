"""One layer of a transformer, written down operator by operator, as a tracer would have seen it.

`LayerRecord` keeps what a layer's kernels run forward, and how each is differentiated; `LayerRecord.finish` then runs
the backward pass. Tensors and modules are named within the layer, so that one record stands for all equal layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from headway.workload.graph import Affine, Attention, TensorKind

if TYPE_CHECKING:
    from headway.workload.transformer import TransformerShape

__all__ = [
    "GRADIENT",
    "INPUT",
    "Block",
    "LayerRecord",
    "Recorded",
    "Tensor",
    "Use",
    "constant",
    "parameter_gradient",
    "per_sample",
]


class Tensor(NamedTuple):
    """A tensor of a layer: for each of `tokens` tokens of a sample `width` numbers; the width divided, or not."""

    at: int
    width: int
    sharded: bool = False
    tokens: int = 0


class Use(NamedTuple):
    """A tensor as one operator sees it: which one, in what shape, and the dimension divided among tensor ranks."""

    at: int
    kind: TensorKind
    dim: int = -1


class Recorded(NamedTuple):
    """An operator of a layer; tensors are numbered within the layer, modules named without its prefix."""

    target: str
    module: str
    inputs: tuple[TensorKind, ...]
    outputs: tuple[TensorKind, ...]
    input_tensors: tuple[int, ...]
    output_tensors: tuple[int, ...]
    arguments: tuple
    flop: Affine
    reads: tuple[str, ...]
    block: int
    sharded_inputs: tuple[int, ...]
    sharded_outputs: tuple[int, ...]


class Block(NamedTuple):
    """A `TensorBlock` of a layer, its names without the layer's prefix."""

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    divisor: int
    input: TensorKind
    output: TensorKind
    parameters: dict[str, int]


INPUT, GRADIENT = 0, 1  # a layer's tensors that come from its neighbours


class LayerRecord:
    """Records one layer: operators forward, and how each is differentiated; `finish` runs that backward.

    Gradients of a tensor that is used twice are added up, as autograd does. `keep` names what backward needs. `sizes`:
    bytes of each tensor and sample, 0 where they are counted elsewhere.
    """

    def __init__(self, shape: TransformerShape) -> None:
        self.shape = shape
        self.forward: list[Recorded] = []
        self.backward: list[Recorded] = []
        self.blocks: list[Block] = []
        self.parameters: dict[str, tuple[int, ...]] = {}
        self.parameter_tensors: dict[str, int] = {}
        self.attention: Attention | None = None
        self.experts: tuple[tuple[str, ...], float] | None = None
        self.loss_saved = 0.0
        self.fixed_saved = 0.0
        self.input = Tensor(INPUT, shape.hidden, tokens=shape.sequence)
        self.output = self.input
        self.sizes: dict[int, float] = {INPUT: 0.0, GRADIENT: 4.0 * shape.sequence * shape.hidden}
        self._kept: dict[int, bool] = {}  # tensor → whether it is divided
        self._loss_kept: set[int] = set()
        self._steps: list[Callable[[], None]] = []  # the backward pass, to be run from the last to the first
        self._gradients: dict[int, Use] = {}
        self._next = 2
        self._into = self.forward
        self.block = -1

    # -- tensors

    def tensor(self, width: int, sharded: bool = False, tokens: int = 0) -> Tensor:
        """A new tensor of this layer."""
        return Tensor(self.number(), width, sharded, tokens or self.shape.sequence)

    def number(self) -> int:
        """The number of a new tensor."""
        self._next += 1
        return self._next - 1

    @property
    def tensors(self) -> int:
        """How many tensors have been numbered."""
        return self._next

    def parameter(self, name: str, *shape: int) -> int:
        """The tensor of a parameter of this layer, which is made at its first mention."""
        if name not in self.parameters:
            self.parameters[name] = shape
            self.parameter_tensors[name] = self.number()
        return self.parameter_tensors[name]

    def whole(self, tensor: Tensor) -> Use:
        """As (samples, tokens, width)."""
        return Use(tensor.at, per_sample(tensor.tokens, tensor.width), 2 if tensor.sharded else -1)

    def flat(self, tensor: Tensor) -> Use:
        """As (samples x tokens, width)."""
        return Use(tensor.at, TensorKind((0, tensor.width), (tensor.tokens, 0), "float32"), 1 if tensor.sharded else -1)

    def heads(self, tensor: Tensor) -> Use:
        """As (samples, heads, tokens, head width)."""
        width = self.shape.head_width
        kind = per_sample(tensor.width // width, tensor.tokens, width)
        return Use(tensor.at, kind, 1 if tensor.sharded else -1)

    def statistic(self, width: int = 1) -> Use:
        """A new tensor of `width` float32 numbers for each token."""
        return Use(self.number(), per_sample(self.shape.sequence, width))

    def keep(self, *uses: Use | Tensor, loss: bool = False) -> None:
        """Backward needs these. What the loss keeps is counted apart."""
        for use in uses:
            if use.at == INPUT or use.at in self.parameter_tensors.values():
                continue
            if loss:
                self._loss_kept.add(use.at)
            else:
                self._kept[use.at] = use.sharded if isinstance(use, Tensor) else use.dim >= 0

    # -- operators

    def run(
        self, target: str, module: str, inputs: list[Use], outputs: list[Use], flop: float = 0.0,
        reads: tuple[str, ...] = (), numbers: tuple = (),
    ) -> None:  # fmt: skip
        """Record an operator. `numbers`: arguments behind the tensors."""
        for use in outputs:
            self.sizes.setdefault(use.at, float(use.kind.bytes(1)))
        sharded = self.block >= 0 and any(use.dim >= 0 for use in (*inputs, *outputs))
        self._into.append(
            Recorded(
                target=target if "." in target else f"aten.{target}.default",
                module=module,
                inputs=tuple(use.kind for use in inputs),
                outputs=tuple(use.kind for use in outputs),
                input_tensors=tuple(use.at for use in inputs),
                output_tensors=tuple(use.at for use in outputs),
                arguments=(*({"tensor": at} for at in range(len(inputs))), *numbers),
                flop=Affine(per_sample=flop),
                reads=reads,
                block=self.block if sharded else -1,
                sharded_inputs=tuple(use.dim for use in inputs) if sharded else (),
                sharded_outputs=tuple(use.dim for use in outputs) if sharded else (),
            )
        )

    def differentiate(self, step: Callable[[], None]) -> None:
        """`step` runs in the backward pass, in the block of now."""
        block = self.block

        def there() -> None:
            self.block = block
            step()

        self._steps.append(there)

    def gradient(self, tensor: Tensor) -> Tensor:
        """The gradient that has arrived at a tensor."""
        return tensor._replace(at=self._gradients[tensor.at].at)

    def arrive(self, tensor: Tensor, gradient: Use, module: str) -> None:
        """A gradient for a tensor: added to what came before it."""
        before = self._gradients.get(tensor.at)
        if before is not None:
            total = self.whole(tensor._replace(at=self.number()))
            self.run("aten.add.Tensor", module, [self.whole(tensor._replace(at=before.at)),
                                                 self.whole(tensor._replace(at=gradient.at))], [total])  # fmt: skip
            gradient = total
        self._gradients[tensor.at] = gradient

    def finish(self, output: Tensor, gradient: int = GRADIENT) -> None:
        """The layer ends with `output`; `gradient` arrives there."""
        self.output = output
        self.keep(output)  # the norm with which the next layer begins needs it
        self.block = -1
        self._into = self.backward
        if gradient != GRADIENT:
            self.sizes[GRADIENT] = 0.0
        else:
            self._gradients[output.at] = self.whole(output)._replace(at=GRADIENT)
        for step in reversed(self._steps):
            step()

    # -- what becomes of it

    @property
    def input_gradient(self) -> int:
        """The tensor that goes to the layer before as the gradient of its output; -1 for none."""
        use = self._gradients.get(INPUT)
        return use.at if use else -1

    def saved(self) -> tuple[Affine, Affine]:
        """Bytes kept for backward, and those of them that tensor parallelism divides."""
        everything = sum(self.sizes[at] for at in self._kept)
        divided = sum(self.sizes[at] for at, sharded in self._kept.items() if sharded)
        return Affine(self.fixed_saved, everything), Affine(0.0, divided)

    def loss_bytes(self) -> Affine:
        """Bytes that the loss keeps."""
        return Affine(0.0, sum(self.sizes[at] for at in self._loss_kept))

    def extras(self) -> tuple[Affine, Affine]:
        """Most bytes alive at once above what is kept, forward and backward, gradients of parameters left out."""
        kept = {**self._kept, **dict.fromkeys(self._loss_kept, False)}
        above = sum(self.sizes[at] for at in kept)
        parameters = set(self.parameter_tensors.values())
        peaks = []
        # When this layer goes backward, the next one has released what this one handed to it.
        released = {GRADIENT, *kept} - {self.output.at}
        for operators, alive in ((self.forward, {INPUT}), (self.backward, released)):
            last = {at: position for position, one in enumerate(operators)
                    for at in (*one.input_tensors, *one.output_tensors)}  # fmt: skip
            stays = set(kept) if operators is self.forward else {self.input_gradient}
            live = sum(self.sizes.get(at, 0.0) for at in alive)
            peak = live
            for position, one in enumerate(operators):
                for at in one.output_tensors:
                    if at not in alive and at not in parameters:
                        alive.add(at)
                        live += self.sizes[at]
                peak = max(peak, live)
                for at in {*one.input_tensors, *one.output_tensors}:
                    if last[at] == position and at in alive and at not in stays:
                        alive.discard(at)
                        live -= self.sizes.get(at, 0.0)
            peaks.append(Affine(0.0, max(0.0, peak - above)))
        return peaks[0], peaks[1]


def per_sample(*shape: int) -> TensorKind:
    """A float32 tensor of this shape for each sample, the samples as dimension 0."""
    return TensorKind((0, *shape), (1, *(0 for _ in shape)), "float32")


def constant(*shape: int, dtype: str = "float32") -> TensorKind:
    """A tensor whose shape does not depend on the samples."""
    return TensorKind(shape, tuple(0 for _ in shape), dtype)


def parameter_gradient(layer: LayerRecord) -> int:
    """A new tensor that holds the gradient of a parameter: counted with the gradients, not with what is alive."""
    at = layer.number()
    layer.sizes[at] = 0.0
    return at
