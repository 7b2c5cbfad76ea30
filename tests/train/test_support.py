"""What the runtime cannot carry out yet is refused by name, before anything starts."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from headway.errors import PlanError
from headway.plan.plan import Plan, Stage
from headway.train.support import check_supported

STAGES = (Stage(start=0, stop=2), Stage(start=2, stop=4))
PLAN = Plan(
    model="m", devices=tuple("abcdefgh"), global_batch=16, micro_batch=2, data=2, tensor=2, pipeline=2,
    schedule="1f1b", stages=STAGES, tensor_sharding={"x": "column"},
)  # fmt: skip


def test_what_the_runtime_does_passes() -> None:
    assert check_supported(PLAN.validate()) is PLAN


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("context", {"context": 2, "data": 1}),
        ("expert", {"expert": 2}),
        ("sequence_parallel", {"sequence_parallel": True}),
        ("stages", {"stages": (Stage(start=0, stop=2, data=1, tensor=4), STAGES[1])}),
        ("shares", {"shares": (3, 5)}),
        ("schedule", {"schedule": "zero_bubble"}),
        ("precision", {"precision": "float8"}),
        ("recompute_attention", {"stages": (Stage(start=0, stop=2, recompute_attention=(1,)), STAGES[1])}),
        ("collectives", {"collectives": {"data": "ring"}}),
    ],
)
def test_what_can_only_be_predicted_is_refused_naming_its_field(field: str, changes: dict[str, Any]) -> None:
    plan = msgspec.structs.replace(PLAN, **changes).validate()
    with pytest.raises(PlanError, match="cannot be run yet") as caught:
        check_supported(plan, place="plan.json")
    assert field in caught.value.place
