"""What the time of a step is made of, before a schedule puts it in order: each stage's work on one micro-batch, by
kind, and what each pipeline rank does once in a step.

`Predictor.parts` makes them; the closed form adds them up, the simulation plays them.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["NO_EXCHANGE", "Exchange", "Offload", "Parts", "RankParts", "StageParts"]


class Exchange(NamedTuple):
    """Communication or copies of one kind, for one micro-batch in one stage, in seconds.

    `forward` and `backward` are how long it takes by itself; the `exposed_*` part is by how much it makes the pass
    longer: all of it where compute waits, and what compute cannot hide (with what compute loses meanwhile) elsewhere.
    """

    forward: float = 0.0
    backward: float = 0.0
    exposed_forward: float = 0.0
    exposed_backward: float = 0.0


NO_EXCHANGE = Exchange()


class StageParts(NamedTuple):
    """One micro-batch in one stage, in seconds, on the slowest of the stage's ranks."""

    forward: float  # compute of the forward pass
    backward_input: float  # compute of the gradients that the stage before waits for
    backward_weight: float  # compute of the parameters' gradients, which may wait (zero-bubble schedules)
    recompute: float = 0.0  # forward compute that is run again in backward: whole layers, or attention cores
    accumulate: float = 0.0  # adding this micro-batch's gradients to the earlier ones'
    tensor: Exchange = NO_EXCHANGE  # tensor (and sequence) parallel collectives of the blocks
    context: Exchange = NO_EXCHANGE  # keys and values round the context group
    expert: Exchange = NO_EXCHANGE  # tokens to their experts and back
    gather: Exchange = NO_EXCHANGE  # ZeRO: parameters gathered
    scatter: Exchange = NO_EXCHANGE  # ZeRO: gradients reduced and scattered, in backward
    transfer: Exchange = NO_EXCHANGE  # parameters and activations from and to another memory tier
    send: float = 0.0  # the tensor that crosses to the next stage, and its gradient back; 0 for the last stage

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        """Tensor, context, expert, gather, scatter, transfer."""
        return (self.tensor, self.context, self.expert, self.gather, self.scatter, self.transfer)

    @property
    def backward(self) -> float:
        """Compute of the backward pass, with what it runs again and the adding of gradients."""
        return self.backward_input + self.backward_weight + self.recompute + self.accumulate

    @property
    def forward_seconds(self) -> float:
        """The forward pass of one micro-batch, exposed communication included, sends excluded."""
        return self.forward + sum(exchange.exposed_forward for exchange in self.exchanges)

    @property
    def backward_seconds(self) -> float:
        """The backward pass of one micro-batch, exposed communication included, sends excluded."""
        return self.backward + sum(exchange.exposed_backward for exchange in self.exchanges)


class Offload(NamedTuple):
    """An update away from the device, in seconds: each by itself.

    `out`: gradients on their way to the tier, beside the last backward pass; `exposed_out`: the part of it that shows.
    `update`: the host's arithmetic; `states`: optimizer states read from another tier and written back; `back`: updated
    parameters to the device. The three go beside each other, chunk by chunk: `seconds`. `kept`: the device's own part.
    """

    out: float
    exposed_out: float
    update: float
    states: float
    back: float
    kept: float

    @property
    def seconds(self) -> float:
        """From the last gradient that arrived to the last parameter that is back."""
        return max(self.update, self.states, self.back)


class RankParts(NamedTuple):
    """What a pipeline rank does once in a step, in seconds."""

    gradients: float = 0.0  # reducing gradients: what backward does not hide
    exchanged: float = 0.0  # reducing gradients: all of it
    update: float = 0.0  # the optimizer, with the transfers of its states where they rest elsewhere
    after: float = 0.0  # updated parameters sent to the other replicas
    tied: float = 0.0  # the part of `gradients` that sums tied parameters over pipeline ranks
    background: float = 0.0  # a delayed update, beside the next step; no step is shorter
    offload: Offload | None = None  # what `update` and `background` are made of, where the optimizer rests elsewhere


class Parts(NamedTuple):
    """Everything that the time of a step is made of.

    `sends[r]`: the longest send from pipeline rank r to the next (the last one: back to the first, for virtual stages).
    `finish[r]`: when rank r is done with its last micro-batch, by the schedule. `loss`: the all-reduce of the loss.
    `micro_batches`: that this replica runs (see `Plan.shares`).
    """

    stages: tuple[StageParts, ...]
    ranks: tuple[RankParts, ...]
    sends: tuple[float, ...]
    finish: tuple[float, ...]
    loss: float = 0.0
    micro_batches: int = 1
