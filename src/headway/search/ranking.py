"""What a search finds: the best plans, and why the others are not among them."""

from __future__ import annotations

from typing import Literal

from headway.errors import FieldError
from headway.plan.plan import Plan
from headway.predict.prediction import Prediction
from headway.value import Value

__all__ = ["Candidate", "Constraints", "Goal", "Ranking", "Rejected"]

Goal = Literal["time", "memory", "cost"]


class Constraints(Value):
    """What the plans must look like; None leaves a field to the search.

    `recompute`: "any" recomputes as little as makes the plan fit; "none", "full" and "selective" (the attention core of
    every layer) say what it says. `runnable`: only plans that Headway's own runtime carries out; without it the search
    also weighs `context` and `expert` parallelism, divides activations by tokens (`sequence_parallel`, None: wherever
    tensor is above 1) and knows the zero_bubble schedule. `offload`: "optimizer" and "any" let optimizer states, and
    parameters and activations too, rest on the host, on disk, or in other nodes' memory; `delayed_update`: the host's
    update may go on beside the next step, whose gradients are then of parameters one step old.
    `memory_fraction`: the share of a device's memory that a plan may fill; the rest is for the framework itself and
    for fragmentation. `exchange`: who carries out the collectives of all plans (see Plan); on a probed machine its
    figures must have been measured with the same.
    """

    data: int | None = None
    tensor: int | None = None
    pipeline: int | None = None
    micro_batch: int | None = None
    zero_stage: Literal[0, 1, 2, 3] | None = None
    recompute: Literal["any", "none", "full", "selective"] = "any"
    schedule: Literal["none", "gpipe", "1f1b", "interleaved", "zero_bubble"] | None = None
    precision: Literal["float32", "bfloat16", "float16", "float8"] | None = None
    memory_fraction: float = 0.95
    exchange: Literal["torch", "headway"] = "torch"
    context: int | None = None
    expert: int | None = None
    sequence_parallel: bool | None = None
    offload: Literal["none", "optimizer", "any"] = "none"
    delayed_update: bool = False
    runnable: bool = True

    def validate(self, *, place: str = "constraints") -> Constraints:
        """These constraints, or FieldError naming the field that no plan can meet."""
        for field in ("data", "tensor", "pipeline", "context", "expert", "micro_batch"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise FieldError(f"must be at least 1, not {value}", place=f"{place}: {field}")
        if not 0 < self.memory_fraction <= 1:
            raise FieldError(
                f"must be above 0 and at most 1, not {self.memory_fraction:g}",
                place=f"{place}: memory_fraction",
                remedy="0.95 leaves 5 % of each device's memory free",
            )
        if self.delayed_update and self.offload == "none":
            raise FieldError(
                "speaks of an optimizer off the device",
                place=f"{place}: delayed_update",
                remedy="add --offload optimizer",
            )
        if self.runnable:
            self._validate_runnable(place)
        if self.zero_stage and self.data == 1 and self.context in (None, 1):
            raise FieldError(
                f"ZeRO stage {self.zero_stage} divides states over replicas, and data is 1",
                place=f"{place}: zero_stage",
                remedy="leave data open, or set zero_stage to 0",
            )
        if self.pipeline is not None and self.schedule is not None and (self.pipeline > 1) != (self.schedule != "none"):
            raise FieldError(
                f"{self.schedule!r} with {self.pipeline} pipeline ranks",
                place=f"{place}: schedule",
                remedy="'none' without a pipeline; 'gpipe', '1f1b' or 'interleaved' with one",
            )
        return self

    def _validate_runnable(self, place: str) -> None:
        beyond = {
            "context": (self.context or 1) > 1,
            "expert": (self.expert or 1) > 1,
            "sequence_parallel": bool(self.sequence_parallel),
            "recompute": self.recompute == "selective",
            "schedule": self.schedule == "zero_bubble",
            "precision": self.precision not in (None, "float32", "bfloat16"),
        }
        for field, is_beyond in beyond.items():
            if is_beyond:
                raise FieldError(
                    f"{getattr(self, field)!r} can be predicted, and Headway's own runtime does not carry it out yet",
                    place=f"{place}: {field}",
                    remedy="leave it out, or plan for machines described with --cluster, which are only predicted",
                )

    def describe(self) -> str:
        """`data 2, recompute full`: what is fixed."""
        names = (
            "data",
            "tensor",
            "pipeline",
            "context",
            "expert",
            "micro_batch",
            "zero_stage",
            "schedule",
            "precision",
        )
        fixed = [f"{name.replace('_', ' ')} {getattr(self, name)}" for name in names if getattr(self, name) is not None]
        if self.sequence_parallel is not None:
            fixed.append(f"sequence parallel {'on' if self.sequence_parallel else 'off'}")
        if self.offload != "none":
            fixed.append(f"offload {self.offload}" + (" with delayed updates" if self.delayed_update else ""))
        if self.recompute != "any":
            fixed.append(f"recompute {self.recompute}")
        return ", ".join(fixed)


class Candidate(Value):
    """A plan that fits, and what it is predicted to cost."""

    plan: Plan
    prediction: Prediction


class Rejected(Value):
    """A device mesh of these degrees, by the best of its plans that was looked at, and why it is not among the best.

    `kind`: "does not fit" (`excess_bytes` over, at least), "slower" (than the best, `factor` times; "dearer" and
    "more memory" for the other goals) or "impossible" (no plan of these degrees is valid). `because`: the part of the
    step, or of memory, that makes most of the difference. `exact` is false where the figure is only a bound, because a
    bound was enough to leave the plan out.
    """

    summary: str
    data: int
    tensor: int
    pipeline: int
    kind: Literal["does not fit", "slower", "dearer", "more memory", "impossible"]
    reason: str
    excess_bytes: float = 0.0
    factor: float = 0.0
    because: str = ""
    exact: bool = True
    context: int = 1
    expert: int = 1


class Ranking(Value):
    """The result of a search.

    `considered` counts the plans of the space (recomputation not counted: each plan recomputes as much as it must);
    `evaluated` those predicted in full; `totals` how many of `considered` were left out for which reason. `seed` is
    None: an exhaustive search draws nothing.
    """

    goal: Goal
    best: tuple[Candidate, ...]
    rejected: tuple[Rejected, ...] = ()
    totals: dict[str, int] = {}
    considered: int = 0
    evaluated: int = 0
    seconds: float = 0.0
    seed: int | None = None
    history: tuple[tuple[float, float], ...] = ()  # (seconds since it began, seconds of the best step so far)
