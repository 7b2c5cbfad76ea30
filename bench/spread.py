"""What being spread over nodes costs the models of Tiresias, predicted and as published (NSDI 2019, figure 3).

Eight workers with a parameter server beside each, on nodes like the paper's: four P100, one port of 100 Gb/s
InfiniBand. Speed at random places over speed on two nodes; the skew of the tensors beside it. The paper gives no batch
sizes, so two are shown, and what the same jobs lose with all-reduce instead of parameter servers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from headway.hardware.catalog import Machine, Part, assemble
from headway.schedule.placement.profiles import MODELS, PUBLISHED_SKEW, PUBLISHED_SPEED, model_profile
from headway.schedule.placement.spread import SpreadCost
from record import new_record, save_record

HERE = Path(__file__).parent


def main() -> None:
    """Predict all models that the zoo traces, print a table and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "spread.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=8)
    arguments = parser.parse_args()
    machine = Machine(
        parts=(Part(accelerator="P100-SXM2-16GB", count=4),), wiring="none", pcie_bytes_per_second=15.75e9, nics=1,
        nic_bytes_per_second=12.5e9, nic_latency_seconds=2e-6,
    )  # fmt: skip
    cluster = assemble("15 x 4 P100", [(f"node{node}", machine) for node in range(15)])
    record = new_record(arguments.seed)
    rows = []
    print(f"{'model':12} {'skew':>6} {'paper':>6} {'speed':>6} {'at 32':>6} {'at 64':>6} {'all-reduce':>10}")
    for model, known in MODELS.items():
        skew = model_profile(model).skew
        row = {"model": model, "skew": skew, "paper_skew": PUBLISHED_SKEW[model]}
        row["paper_speed"] = PUBLISHED_SPEED.get(model, 1.0)
        if known:
            for samples in (32, 64):
                cost = SpreadCost(known, cluster, samples=samples)
                row[f"speed_{samples}"] = 1 / cost.slowdown(arguments.workers, seed=arguments.seed)
            cost = SpreadCost(known, cluster, samples=64, architecture="all-reduce")
            row["speed_all_reduce"] = 1 / cost.slowdown(arguments.workers, seed=arguments.seed)
        rows.append(row)
        shown = [f"{row[field]:6.2f}" if field in row else "     -" for field in ("speed_32", "speed_64")]
        reduced = f"{row['speed_all_reduce']:10.2f}" if "speed_all_reduce" in row else f"{'-':>10}"
        print(f"{model:12} {skew:6.3f} {PUBLISHED_SKEW[model]:6.3f} {row['paper_speed']:6.2f}", *shown, reduced)
    record["rows"] = rows
    save_record(record, arguments.output)


if __name__ == "__main__":
    main()
