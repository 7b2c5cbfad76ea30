"""How close are predictions to published measurements? Headway's, a FLOP count's, and llm-analysis's, on the same rows.

    python bench/prediction.py --data FOLDER            every table in FOLDER; results in bench/results/
    python bench/prediction.py --data FOLDER --worst 20

FOLDER holds tables that `headway.predict.published` reads (others are named and left out). Errors are printed for the
rows that constants may be fitted on, and for the held-out ones. The FLOP count has one constant, the share of the peak
that is reached, which is fitted here on the fitted rows; llm-analysis (`pip install llm-analysis`) is run with its own
defaults if it is installed, on what it can say: dense models, no context parallelism.

Behind the errors stands what a table allows (`ceilings.py`): how well any smooth law could order its plans, and
whether its times are sums of parts.
"""

import argparse
import importlib.util
import platform
import statistics
import sys
import time
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ceilings import LARGE, composition, order_of_pairs, smooth_laws
from headway.errors import FieldError, InputError
from headway.predict.published import PublishedRow, SkippedRow, read_rows
from headway.predict.validation import Predicted, Prophet, Validation, is_fitted, validate
from headway.report.validation import validation_tables, write_scatter
from record import new_record, save_record

HERE = Path(__file__).parent


def counted_seconds(row: PublishedRow) -> float:
    """FLOP of the step, recomputation included, at the peak of all devices, stretched by the pipeline's bubble."""
    graph, plan = row.workload.graph, row.plan
    again = sum(graph.layers[at].forward_flop.at(1) for stage in plan.stages for at in stage.recompute)
    flop = plan.global_batch * (graph.forward_flop.at(1) + graph.backward_flop.at(1) + again)
    peak = row.cluster.accelerator_of(0).flop_rate(plan.precision) * len(plan.devices)
    bubble = 1 + (plan.pipeline - 1) / (plan.virtual_stages * plan.micro_batches)
    return flop / peak * bubble


class FlopCount:
    """`counted_seconds` divided by one share of the peak: the median of the fitted rows."""

    def __init__(self, rows: list[PublishedRow]) -> None:
        shares = [counted_seconds(row) / row.step_seconds for row in rows if is_fitted(row) and row.step_seconds]
        self.share = statistics.median(shares) if shares else 1.0

    def __call__(self, row: PublishedRow) -> Predicted:
        return Predicted(counted_seconds(row) / self.share)


class LlmAnalysis:
    """llm-analysis (Cheng Li, 2023) with its default efficiencies, told the sizes of the model and of the machine."""

    def __init__(self) -> None:
        from llm_analysis import analysis, config  # type: ignore[import-not-found]

        self.analysis, self.config = analysis, config
        analysis.logger.setLevel("ERROR")

    def __call__(self, row: PublishedRow) -> Predicted:
        shape, plan = row.shape, row.plan
        if plan.context > 1 or shape.experts:
            raise InputError("llm-analysis knows neither context parallelism nor this mixture of experts")
        kind = row.cluster.accelerator_of(0)
        links = [link for link in row.cluster.links if link.source == plan.devices[0]]
        outside = {switch.name for switch in row.cluster.switches if not switch.node}
        inside = {switch.name for switch in row.cluster.switches if switch.node == row.cluster.devices[0].node}
        network = [link for link in row.cluster.links if link.source in inside and link.target in outside]
        recomputation = self.analysis.ActivationRecomputation
        full = any(stage.recompute for stage in plan.stages)
        selective = any(stage.recompute_attention for stage in plan.stages)
        core = getattr(recomputation, "ATTN_COMPUTE", None) or recomputation.SELECTIVE
        try:
            gpu = self.config.GPUConfig(
                name=kind.name,
                mem_per_GPU_in_GB=kind.memory_bytes / 2**30,
                hbm_bandwidth_in_GB_per_sec=kind.memory_bytes_per_second / 1e9,
                intra_node_bandwidth_in_GB_per_sec=max(link.bytes_per_second for link in links) / 1e9,
                intra_node_min_message_latency=max(link.latency_seconds for link in links),
                # It takes its 16-bit rate for whatever precision it is told: the rate of the row's own is given.
                peak_fp16_TFLOPS=kind.flop_rate(plan.precision) / 1e12,
                inter_node_bandwidth_in_GB_per_sec=sum(link.bytes_per_second for link in network) / 1e9 or 1.0,
            )
            model = self.config.ModelConfig(
                name=row.model,
                num_layers=shape.layers,
                n_head=shape.heads,
                hidden_dim=shape.hidden,
                vocab_size=shape.vocabulary,
                max_seq_len=shape.sequence,
                num_key_value_heads=shape.kv_heads,
                # It counts two matrices in every MLP.
                ffn_embed_dim=shape.ffn * 3 // 2 if shape.gated else shape.ffn,
            )
            parallelism = self.config.ParallelismConfig(
                tp_size=plan.tensor,
                pp_size=plan.pipeline,
                dp_size=plan.data,
                sp_size=plan.tensor if plan.sequence_parallel else 1,
            )
            said = self.analysis.LLMAnalysis(model, gpu, parallelism_config=parallelism).training(
                batch_size_per_gpu=plan.micro_batch,
                gradient_accumulation_steps=plan.micro_batches,
                seq_len=shape.sequence,
                activation_recomputation=(recomputation.FULL if full else core if selective else recomputation.NONE),
                ds_zero=self.analysis.DSZeRO(plan.zero_stage),
                flash_attn=shape.attention == "flash",
                softmax_dropout=shape.dropout,
            )
        except (AssertionError, ZeroDivisionError, TypeError) as error:
            raise InputError(f"llm-analysis refuses this row: {error}") from None
        memory = said["(weight+op_state+grad)_memory_per_gpu"] + said["activation_memory_per_gpu"]
        return Predicted(said["latency_per_iter"], memory, memory <= kind.memory_bytes)


def read_folder(folder: Path) -> dict[str, tuple[list[PublishedRow], list[SkippedRow]]]:
    found = {}
    for path in sorted(folder.glob("*.csv")):
        try:
            found[path.name] = read_rows(path)
        except FieldError as error:
            print(f"left out: {error.place}: {error.message}", file=sys.stderr)
    return found


def methods(rows: list[PublishedRow]) -> dict:
    found = {"Headway": Prophet(), "FLOP count": FlopCount(rows)}
    if importlib.util.find_spec("llm_analysis") is None:
        print(
            "llm-analysis is not installed: pip install --no-deps llm-analysis fire (it asks for an old transformers)",
            file=sys.stderr,
        )
    else:
        found["llm-analysis"] = LlmAnalysis()
    return found


def summary(validation: Validation, fitted: bool) -> dict:
    failed, recognised, ran, refused = validation.out_of_memory(fitted)
    return {
        "rows": len(validation.part(fitted)),
        "not predicted": sum(bool(row.failed) for row in validation.part(fitted)),
        "step": [one.to_builtins() for one in validation.errors("step", "all", fitted)],
        "step by scope": [one.to_builtins() for one in validation.errors("step", "scope", fitted)],
        "memory": [one.to_builtins() for one in validation.errors("memory", "all", fitted)],
        "out of memory": failed,
        "out of memory recognised": recognised,
        "ran": ran,
        "ran and predicted not to fit": refused,
        "mean regret": validation.mean_regret(fitted),
        "mean rank correlation": validation.mean_rank_correlation(fitted),
    }


def allowed(name: str, rows: list[PublishedRow], validation: Validation, folder: Path) -> dict:
    """What this table allows any prediction; see `ceilings`."""
    timed = [(row, found.predicted_seconds) for row, found in zip(rows, validation.rows, strict=True)
             if row.step_seconds and found.predicted_seconds]  # fmt: skip
    record: dict = {"pairs of held-out plans": order_of_pairs(rows, validation)}
    if timed:
        record["smooth laws"] = smooth_laws([row for row, _ in timed], [seconds for _, seconds in timed])
    if name.startswith("vtrain"):
        record["composition"] = composition(rows, folder / "vtrain_allreduce_lut.csv")
    return record


def print_allowed(console: Console, record: dict) -> None:
    pairs = record["pairs of held-out plans"]
    if pairs["pairs"]:
        console.print(
            f"Pairs of held-out plans of one job that differ by more than 3 %: {pairs['pairs']}, "
            f"{pairs['right']:.1%} in the right order ({pairs['within 3 %']} pairs differ by less)"
        )
    if record.get("smooth laws"):
        table = Table(
            box=SIMPLE_HEAD, title=f"Held-out rows of searches of {LARGE} plans and more", title_justify="left"
        )
        for column in ("law", "rows", "step time", "regret", "rank"):
            table.add_column(column, justify="left" if column == "law" else "right")
        for one in record["smooth laws"]:
            rank = one["rank"]
            table.add_row(one["law"], str(one["held out rows"]), percent(one["step"]), percent(one["regret"]),
                          "" if rank is None else f"{rank:.2f}")  # fmt: skip
        console.print(table)
    for what, value in record.get("composition", {}).items():
        console.print(f"  {what}: {value:.6g}" if value is not None else f"  {what}: -")


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder with tables of published measurements")
    parser.add_argument("--worst", type=int, default=10, help="rows to list of each table")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "prediction.json")
    arguments = parser.parse_args()
    console = Console(width=100 if not sys.stdout.isatty() else None, highlight=False)
    tables = read_folder(arguments.data)
    if not tables:
        sys.exit(f"{arguments.data}: no table of published measurements")
    head = new_record(0, python=platform.python_version())
    # Wherever the tables lie on the machine that reads them.
    head["command"] = f"python bench/prediction.py --data {arguments.data.name} --worst {arguments.worst}"
    record: dict = {}
    overview = Table(box=SIMPLE_HEAD, title="Mean errors of held-out rows", title_justify="left")
    for column in ("table", "method", "rows", "step time", "memory", "regret", "rank", "a row"):
        overview.add_column(column, justify="left" if column in ("table", "method") else "right")
    for name, (rows, skipped) in tables.items():
        for method_name, method in methods(rows).items():
            start = time.perf_counter()
            validation = validate(rows, method, skipped)
            each = (time.perf_counter() - start) / max(1, len(rows))
            if method_name == "Headway":
                console.rule(name)
                for table in validation_tables(validation, worst=arguments.worst):
                    console.print(table)
                quantity = "step" if validation.errors("step") else "memory"
                write_scatter(validation, arguments.output.with_name(f"prediction_{Path(name).stem}.svg"), quantity)
                ceilings = allowed(name, rows, validation, arguments.data)
                print_allowed(console, ceilings)
                record.setdefault(name, {})["what the table allows"] = ceilings
            held = summary(validation, False)
            said = len(validation.part(False)) - held["not predicted"]
            rank = held["mean rank correlation"]
            overview.add_row(
                name, method_name, str(said), percent(held["step"][0]["mean"] if held["step"] else None),
                percent(held["memory"][0]["mean"] if held["memory"] else None), percent(held["mean regret"]),
                "" if rank is None else f"{rank:.2f}", f"{each * 1e3:.1f} ms",
            )  # fmt: skip
            record.setdefault(name, {})[method_name] = {
                "fitted": summary(validation, True),
                "held out": held,
                "skipped": len(skipped),
                "seconds for each row": each,
            }
    console.print(overview)
    save_record(head | {"tables": record}, arguments.output)


if __name__ == "__main__":
    main()
