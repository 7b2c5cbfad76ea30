"""Which plans the runtime carries out today: a plan that it cannot is refused by name before anything starts."""

from __future__ import annotations

from headway.errors import PlanError
from headway.plan.plan import Plan

__all__ = ["check_supported"]


def check_supported(plan: Plan, *, place: str = "plan") -> Plan:
    """`plan`, or PlanError naming the field that can be predicted and simulated, but not yet run here."""

    def refuse(field: str, message: str, remedy: str) -> None:
        raise PlanError(
            f"{message} cannot be run yet, only predicted, simulated and exported",
            place=f"{place}: {field}",
            remedy=remedy,
        )

    if plan.context > 1:
        refuse("context", f"context parallelism ({plan.context} ways)", "set context to 1")
    if plan.expert > 1:
        refuse("expert", f"expert parallelism ({plan.expert} ways)", "set expert to 1")
    if plan.sequence_parallel:
        refuse("sequence_parallel", "sequence parallelism", "set sequence_parallel to false")
    if not plan.is_uniform:
        refuse("stages", "stages with degrees of their own", "give all stages the same data and tensor degrees")
    if plan.shares:
        refuse("shares", "unequal shares of the batch", "leave shares empty")
    if plan.schedule == "zero_bubble":
        refuse("schedule", "the zero_bubble schedule", "use 1f1b")
    if plan.precision not in ("float32", "bfloat16"):
        refuse("precision", f"training in {plan.precision}", "use bfloat16 or float32")
    for position, stage in enumerate(plan.stages):
        if stage.recompute_attention:
            refuse(f"stages[{position}].recompute_attention", "selective recomputation", "list the layers in recompute")
    if plan.parameters_on != "device" and plan.data > 1 and plan.zero_stage != 3:
        refuse(
            "zero_stage",
            f"parameters on the {plan.parameters_on} and no slices of its own on a replica (ZeRO-{plan.zero_stage})",
            "set zero_stage to 3",
        )
    for name in plan.tiles:
        if name in plan.tensor_sharding:
            refuse(f"tiles.{name}", "a layer in tiles that tensor parallelism splits too", "do one or the other")
    if plan.collectives and plan.exchange != "headway":
        refuse("collectives", "a choice of algorithm by axis by torch's own exchange", "set exchange to headway")
    for axis in plan.collectives:
        if axis not in ("data", "tensor"):
            refuse(f"collectives.{axis}", "an algorithm for an axis without collectives of its own", "data or tensor")
    return plan
