"""Which tier for which model: what the planner chooses when states may rest off the device, and what that costs.

    python bench/which_tier.py

GPTs of 1.3 to 175 billion parameters (sizes of Brown et al., NeurIPS 2020, table 2.1), sequences of 2,048 tokens, in
bfloat16, under our own runtime's plans, on one H100 of a DGX-H100 and on all eight. For each the best plan with
everything on the devices, with the optimizer off them, and with anything off them; and beside it what ZeRO-Infinity's
model says of the tiers (Rajbhandari et al., SC 2021, section 4): the share of the device's rate that is left when that
kind of state comes over the tier's link and nothing hides it. Nothing is random.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from headway.errors import DoesNotFitError
from headway.hardware.catalog import load_cluster
from headway.predict.tiers import (
    TierRates,
    activation_intensity,
    efficiency,
    optimizer_intensity,
    parameter_intensity,
    state_bytes,
)
from headway.search.find import Constraints, find
from headway.units import format_bytes, format_seconds
from headway.workload.graph import Workload
from headway.workload.transformer import TransformerShape, transformer
from record import new_record, save_record

HERE = Path(__file__).parent
SEQUENCE = 2048
# Layers, hidden size, heads.
MODELS = {
    "GPT 1.3 B": (24, 2048, 16),
    "GPT 6.7 B": (32, 4096, 32),
    "GPT 13 B": (40, 5120, 40),
    "GPT 30 B": (48, 7168, 56),
    "GPT 66 B": (80, 8192, 64),
    "GPT 175 B": (96, 12288, 96),
}
MACHINES = ((1, 32), (8, 256))  # devices of one DGX-H100, samples of a step
OFFLOADS = ("none", "optimizer", "any")


def chosen(name: str, devices: int, batch: int, offload: Any) -> dict[str, Any]:
    """The planner's choice for one model, as a row."""
    layers, hidden, heads = MODELS[name]
    shape = TransformerShape(layers=layers, hidden=hidden, heads=heads, vocabulary=50257, sequence=SEQUENCE)
    workload = Workload(graph=transformer(shape, name), global_batch=batch)
    row: dict[str, Any] = {"model": name, "devices": devices, "batch": batch, "offload": offload}
    try:
        ranking = find(
            workload, load_cluster("dgx-h100"), devices=devices, keep=1,
            constraints=Constraints(precision="bfloat16", offload=offload),
        )  # fmt: skip
    except DoesNotFitError as error:
        return row | {"plan": None, "why": str(error)}
    best = ranking.best[0]
    fullest = max(best.prediction.memory, key=lambda each: each.total_bytes)
    return row | {
        "plan": best.plan.describe(),
        "step_seconds": best.prediction.time.step_seconds,
        "tokens_per_second": batch * SEQUENCE / best.prediction.time.step_seconds,
        "device_bytes": fullest.total_bytes,
        "tiers": fullest.tiers,
    }


def lower_bounds(name: str, batch: int) -> dict[str, Any]:
    """ZeRO-Infinity's efficiencies for one model on one H100, a sample count of `batch` in each pass."""
    layers, hidden, _ = MODELS[name]
    cluster = load_cluster("dgx-h100")
    rates, device = TierRates(cluster), cluster.devices[0].name
    kind = cluster.accelerator_of(0)
    peak = kind.flop_per_second["bfloat16"] * kind.efficiency
    intensities = {
        "parameters": parameter_intensity(SEQUENCE, batch),
        "optimizer": optimizer_intensity(SEQUENCE, batch),
        "activations": activation_intensity(hidden),
    }
    return {
        "model": name,
        "batch": batch,
        "state_bytes": state_bytes(layers, hidden),
        "efficiency": {
            kind: {tier: efficiency(ait, rates.copy_rate(tier, device), peak) for tier in ("host", "disk")}
            for kind, ait in intensities.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--output", type=Path, default=HERE / "results" / "which_tier.json")
    arguments = parser.parse_args()
    console = Console(width=100)
    record = new_record("none: nothing is random")
    record["cluster"], record["sequence"] = "dgx-h100", SEQUENCE
    record["efficiency"] = [lower_bounds(name, MACHINES[0][1]) for name in arguments.models]
    record["rows"] = []
    for devices, batch in MACHINES:
        table = Table(title=f"{devices} x H100, {batch} samples a step", box=SIMPLE_HEAD)
        for heading in ("model", "--offload", "best plan", "step", "tokens/s", "device", "elsewhere"):
            table.add_column(heading, justify="left" if heading in ("model", "--offload", "best plan") else "right")
        for name in arguments.models:
            for offload in OFFLOADS:
                row = chosen(name, devices, batch, offload)
                record["rows"].append(row)
                if row["plan"] is None:
                    table.add_row(name, offload, "does not fit", "", "", "", "")
                    continue
                elsewhere = ", ".join(f"{tier} {format_bytes(held)}" for tier, held in row["tiers"].items())
                table.add_row(
                    name, offload, row["plan"], format_seconds(row["step_seconds"]),
                    f"{row['tokens_per_second']:,.0f}", format_bytes(row["device_bytes"]), elsewhere,
                )  # fmt: skip
        console.print(table)
    table = Table(title="Efficiency if nothing hides the copies (ZeRO-Infinity, section 4), one H100", box=SIMPLE_HEAD)
    for heading in ("model", "parameters: host", "disk", "optimizer: host", "disk", "activations: host", "disk"):
        table.add_column(heading, justify="right")
    for row in record["efficiency"]:
        shares = (f"{share:.0%}" for tiers in row["efficiency"].values() for share in tiers.values())
        table.add_row(row["model"], *shares)
    console.print(table)
    save_record(record, arguments.output)


if __name__ == "__main__":
    main()
