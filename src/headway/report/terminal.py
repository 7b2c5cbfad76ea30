"""Tables and progress for the terminal: nothing wider than 100 columns, quantities with units.

Tables go to standard output (they are the answer); progress and notices go to standard error.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from headway.errors import HeadwayError
from headway.hardware.cluster import Cluster
from headway.hardware.probe import Probe
from headway.plan.plan import Plan
from headway.predict.prediction import Memory, Prediction
from headway.search.find import Ranking
from headway.units import format_bytes, format_count, format_energy, format_flop, format_rate, format_seconds
from headway.workload.graph import Layer, Workload

if TYPE_CHECKING:
    # It compiles: verbs that simulate nothing need not wait for that.
    from headway.simulate.compare import Comparison

__all__ = [
    "Terminal",
    "algorithms_table",
    "cluster_table",
    "comparison_table",
    "format_quantity",
    "memory_table",
    "new_table",
    "prediction_table",
    "probe_tables",
    "ranking_tables",
    "what_if_table",
    "workload_table",
]


def new_table(title: str, *columns: str, right: Sequence[int] = ()) -> Table:
    """A table as all of ours look; `right`: the columns that are set flush right."""
    table = Table(
        title=title, box=SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False, show_header=any(columns)
    )
    for position, column in enumerate(columns):
        table.add_column(column, justify="right" if position in right else "left", overflow="fold")
    return table


def workload_table(workload: Workload) -> list[Table]:
    """What the model is: its totals, and its layers with repeated ones on one line. FLOP are for one sample."""
    graph = workload.graph
    totals = new_table(f"{graph.name}", "", "")
    totals.add_row("parameters", f"{graph.parameter_count:,} in {format_bytes(graph.parameter_bytes)}")
    forward, backward = graph.forward_flop.at(1), graph.backward_flop.at(1)
    totals.add_row("FLOP per sample", f"{format_flop(forward)} forward, {format_flop(backward)} backward")
    totals.add_row("saved for backward", f"{format_bytes(graph.saved.per_sample)} per sample")
    optimizer = workload.optimizer
    totals.add_row(
        "optimizer", f"{optimizer.name}, {format_bytes(optimizer.state_bytes_per_element)} of state per parameter"
    )
    tokens = f", {graph.tokens_per_sample:,} tokens each" if graph.tokens_per_sample else ""
    totals.add_row("global batch", f"{workload.global_batch:,} samples{tokens}")
    for note in graph.notes:
        totals.add_row("note", note)
    layers = new_table("Layers", "layer", "parameters", "FLOP forward", "saved", "output", right=(1, 2, 3, 4))
    for first, count in _repeated(graph.layers):
        parameters = sum(graph.parameter_by_name[name].elements for name in first.parameters)
        layers.add_row(
            f"{first.name} and {count - 1} alike" if count > 1 else first.name,
            format_count(parameters),
            format_flop(first.forward_flop.at(1)),
            format_bytes(first.saved.at(1)),
            format_bytes(first.output.bytes(1)),
        )
    return [totals, layers]


def _repeated(layers: Sequence[Layer]) -> list[tuple[Layer, int]]:
    """Runs of layers that compute the same thing, each as its first layer and its length."""
    runs: list[tuple[Layer, int]] = []
    for layer in layers:
        if runs and layer.signature and runs[-1][0].signature == layer.signature:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((layer, 1))
    return runs


def cluster_table(cluster: Cluster) -> Table:
    """What the machines are: one line for each kind of device, one for each kind of link."""
    table = new_table(
        f"{cluster.name}: {_counted(len(cluster), 'device')} in {_counted(len(cluster.nodes), 'node')}", "", ""
    )
    for kind in cluster.accelerators.values():
        count = sum(device.accelerator == kind.name for device in cluster.devices)
        rates = ", ".join(
            f"{dtype} {format_flop(rate, per_second=True)}" for dtype, rate in kind.flop_per_second.items()
        )
        table.add_row(f"{count} x {kind.name}", rates)
        table.add_row("", f"{format_bytes(kind.memory_bytes)} of memory at {format_rate(kind.memory_bytes_per_second)}")
    links: dict[tuple[str, float, float], int] = {}
    for link in cluster.links:
        key = (link.kind, link.bytes_per_second, link.latency_seconds)
        links[key] = links.get(key, 0) + 1
    for (kind_name, bandwidth, latency), count in sorted(links.items()):
        table.add_row(
            f"{count} x {kind_name or 'link'}", f"{format_rate(bandwidth)} one way, {format_seconds(latency)} latency"
        )
    return table


def probe_tables(probe: Probe) -> list[Table]:
    """What was measured on this machine: its cores and memory, and communication beside the line fitted to it."""
    machine = new_table("This machine", "", "")
    machine.add_row("processor", f"{probe.processor}, {_counted(probe.cores, 'core')}")
    machine.add_row("memory", format_bytes(probe.memory_bytes))
    machine.add_row("ranks", f"{len(probe.cluster)}, each with {_counted(probe.threads, 'thread')}")
    if probe.flop_per_second_together:
        rate = format_flop(probe.flop_per_second_together, per_second=True)
        stream = format_rate(probe.memory_bytes_per_second_together)
        machine.add_row("each, while all compute", f"float32 {rate}, memory {stream}")
    machine.add_row("measured", f"{probe.date}, in {format_seconds(probe.took_seconds)}, torch {probe.torch_version}")
    if probe.busy_processes > probe.cores:
        machine.add_row("note", "the machine was busy: repeat with --refresh when it is idle")
    if not probe.points:
        return [machine, cluster_table(probe.cluster)]
    points = new_table("Communication", "operation", "ranks", "bytes", "measured", "bandwidth", right=(1, 2, 3, 4))
    for point in probe.points:
        points.add_row(
            point.operation,
            str(point.ranks),
            format_bytes(point.bytes),
            format_seconds(point.seconds),
            format_rate(point.bytes / point.seconds),
        )
    return [machine, cluster_table(probe.cluster), points]


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def ranking_tables(ranking: Ranking, *, rejected: int = 6) -> list[Table]:
    """The best plans, and why others were left out."""
    best = new_table(
        f"Best plans of {ranking.considered:,} considered, in {format_seconds(ranking.seconds)}",
        "", "plan", "step", "memory", "samples/s", "bound by", right=(0, 2, 3, 4),
    )  # fmt: skip
    for place, candidate in enumerate(ranking.best, start=1):
        prediction = candidate.prediction
        best.add_row(
            str(place),
            candidate.plan.describe(),
            format_seconds(prediction.time.step_seconds),
            format_bytes(prediction.peak_bytes),
            format_count(prediction.samples_per_second),
            prediction.bound,
        )
    left_out = new_table("Left out, for instance", "plan", "because", right=())
    for item in ranking.rejected[:rejected]:
        left_out.add_row(item.summary, item.reason)
    return [best, left_out] if ranking.rejected else [best]


def what_if_table(now: Ranking, then: Ranking, machines: str, changes: str) -> Table:
    """The best plan on the machines as they are beside the best one if they were otherwise."""
    table = new_table(f"What if {changes}?", "", "plan", "step", "memory", "bound by", right=(2, 3))
    for name, ranking in ((machines, now), ("what if", then)):
        best = ranking.best[0]
        table.add_row(
            name,
            best.plan.describe(),
            format_seconds(best.prediction.time.step_seconds),
            format_bytes(best.prediction.peak_bytes),
            best.prediction.bound,
        )
    factor = now.best[0].prediction.time.step_seconds / then.best[0].prediction.time.step_seconds
    table.add_row("", f"{factor:.2f}x as fast", "", "", "")
    return table


def prediction_table(plan: Plan, prediction: Prediction) -> Table:
    """One plan's predicted cost, in parts."""
    time_ = prediction.time
    table = new_table(plan.describe(), "", "", "share", right=(1, 2))

    def part(name: str, seconds: float) -> None:
        share = seconds / time_.step_seconds if time_.step_seconds else 0.0
        table.add_row(name, format_seconds(seconds), f"{share:.0%}")

    part("step", time_.step_seconds)
    part("  compute", time_.compute_seconds)
    part("  communication not hidden", time_.communication_seconds)
    part("  pipeline bubble", time_.bubble_seconds)
    part("  optimizer", time_.optimizer_seconds)
    table.add_row("samples/s", format_count(prediction.samples_per_second), "")
    if prediction.tokens_per_second:
        table.add_row("tokens/s", format_count(prediction.tokens_per_second), "")
    table.add_row("model FLOP utilisation", f"{prediction.mfu:.1%}", "")
    if prediction.energy_joules:
        table.add_row("energy of a step", format_energy(prediction.energy_joules), "")
    if prediction.dollars:
        table.add_row("cost of a step", f"${prediction.dollars:.6f}", "")
    table.add_row("bound by", prediction.bound, "")
    return table


_KINDS = ("parameters", "gradients", "optimizer", "activations", "communication", "workspace")


def algorithms_table(comparison: Comparison) -> Table:
    """Algorithms for one collective, the fastest first: times, bandwidths, share of the best possible rate."""
    table = new_table(
        f"{comparison.collective} of {format_bytes(comparison.size_bytes)} among "
        f"{_counted(len(comparison.devices), 'device')} of {comparison.cluster}",
        "algorithm", "simulated", "predicted", "bandwidth", "bus bandwidth", "optimum", "bottleneck",
        right=(1, 2, 3, 4, 5),
    )  # fmt: skip
    table.columns[0].no_wrap = True
    for entry in comparison.entries:
        if entry.left_out:
            continue
        table.add_row(
            entry.algorithm,
            format_seconds(entry.simulated_seconds),
            format_seconds(entry.predicted_seconds),
            format_rate(entry.bytes_per_second),
            format_rate(entry.bus_bytes_per_second),
            f"{entry.optimum_share:.0%}" if entry.optimum_share else "",
            " > ".join(name.rsplit("/", 1)[-1] for name in entry.bottleneck) if entry.bottleneck else "",
        )
    left = [entry for entry in comparison.entries if entry.left_out]
    if left:
        table.caption = "Left out: " + "; ".join(f"{entry.algorithm} ({entry.left_out})" for entry in left)
        table.caption_justify = "left"
    return table


def memory_table(memory: Sequence[Memory]) -> Table:
    """Predicted memory by kind, ranks with equal figures on one line; workspace with what no allocator holds."""
    table = new_table("Memory of each rank", "ranks", *_KINDS, "total", right=range(1, 8))
    groups: dict[Memory, list[int]] = {}
    for rank, item in enumerate(memory):
        groups.setdefault(item, []).append(rank)
    for item, ranks in groups.items():
        table.add_row(
            _ranges(ranks),
            *(format_bytes(getattr(item, f"{kind}_bytes")) for kind in _KINDS[:-1]),
            format_bytes(item.workspace_bytes + item.outside_bytes),
            format_bytes(item.total_bytes),
        )
    return table


def _ranges(numbers: Sequence[int]) -> str:
    """`[0, 1, 2, 5]` → `"0-2, 5"`, shortened if there are many pieces."""
    pieces: list[list[int]] = []
    for number in numbers:
        if pieces and number == pieces[-1][1] + 1:
            pieces[-1][1] = number
        else:
            pieces.append([number, number])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in pieces]
    return ", ".join(texts) if len(texts) <= 4 else f"{', '.join(texts[:3])}, … ({len(numbers)} ranks)"


def format_quantity(value: float, unit: str) -> str:
    """A value in "seconds" or "bytes", with a prefix that suits it."""
    return format_seconds(value) if unit == "seconds" else format_bytes(value)


def comparison_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Predicted beside measured (rows of `train.run.compare`)."""
    table = new_table("Predicted and measured", "", "predicted", "measured", "error", right=(1, 2, 3))
    for row in rows:
        error = "" if row["error"] is None else f"{row['error']:+.1%}"
        table.add_row(
            row["quantity"],
            format_quantity(row["predicted"], row["unit"]),
            format_quantity(row["measured"], row["unit"]),
            error,
        )
    return table


class Terminal:
    """Shows a run as it goes on: phases, tables, a progress bar with loss, tokens per second and time left."""

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        width = None if sys.stdout.isatty() else 100
        self.out = Console(width=width, highlight=False, soft_wrap=False)
        self.err = Console(stderr=True, width=None if sys.stderr.isatty() else 100, highlight=False)
        self.quiet = quiet
        self.verbose = verbose
        self._progress: Progress | None = None
        self._task: Any = None
        self._last_line = 0.0
        self._in_traceback: set[int] = set()

    # What follows is train.run.Watcher.

    def stage(self, text: str) -> None:
        self.err.print(Text("› ", style="cyan") + Text(text))

    def traced(self, workload: Workload) -> None:
        self.show(*workload_table(workload))

    def probed(self, cluster: Cluster) -> None:
        self.show(cluster_table(cluster))

    def planned(self, plan: Plan, prediction: Prediction, ranking: Ranking | None) -> None:
        if ranking is not None:
            self.show(*ranking_tables(ranking))
        self.show(prediction_table(plan, prediction), memory_table(prediction.memory))

    def event(self, event: dict[str, Any]) -> None:
        kind = event.get("event")
        if kind == "step":
            self._in_traceback.clear()
            self._step(event)
        elif kind == "checkpoint" and self.verbose:
            self.err.print(f"checkpoint of step {event.get('step')}: {event.get('path')}")
        elif kind == "expectation":
            self.close()
            holds = "is below" if event["is_met"] else "is not below"
            what = f" ({event['what']})" if event.get("what") else ""
            self.err.print(f"mean loss of the last steps, {event['loss']:.4f}, {holds} {event['below']:.4f}{what}")
        elif kind == "restart":
            self.err.print(f"started again ({event['attempt']}): {str(event['message']).partition(chr(10))[0]}")
        elif kind == "stopped" and event.get("rank", 0) == 0:
            self.err.print(f"stopped after step {event.get('step')}")

    def output(self, rank: int, stream: str, line: str) -> None:
        # Tracebacks of ranks are in their logs; here the error that is shown in the end says what happened.
        if line.startswith("Traceback (most recent call last)"):
            self._in_traceback.add(rank)
        if rank in self._in_traceback and not self.verbose:
            return
        prefix = "" if rank < 0 else f"[rank {rank}] "
        self.err.print(Text(prefix, style="dim") + Text(line))

    def show(self, *tables: Table) -> None:
        if not self.quiet:
            for table in tables:
                self.out.print(table)

    def error(self, error: HeadwayError) -> None:
        """What was wrong, where, and what to do: one screen."""
        self.close()
        text = Text("error: ", style="bold red")
        if error.place:
            text += Text(f"{error.place}: ", style="bold")
        text += Text(error.message)
        self.err.print(text)
        if error.remedy:
            self.err.print(Text("hint: ", style="bold green") + Text(error.remedy))
        for note in getattr(error, "__notes__", ()):
            self.err.print(Text("note: ", style="bold") + Text(note))

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _step(self, event: dict[str, Any]) -> None:
        step, steps = event["step"], event.get("steps") or None
        rate = event.get("tokens", 0) or event.get("samples", 0)
        speed = rate / event["seconds"] if event.get("seconds") else 0.0
        unit = "tokens/s" if event.get("tokens") else "samples/s"
        loss = f"loss {event['loss']:.4f}"
        if not self.err.is_terminal:
            # A log is read later: a line every few seconds instead of a bar.
            now = time.monotonic()
            if now - self._last_line >= 5 or step == steps:
                self._last_line = now
                self.err.print(f"step {step}/{steps or '?'}  {loss}  {format_count(speed)} {unit}")
            return
        if self._progress is None:
            self._progress = Progress(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"),
                TextColumn("{task.fields[speed]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
                console=self.err,
            )  # fmt: skip
            self._progress.start()
            self._task = self._progress.add_task("training", total=steps, loss="", speed="", completed=step - 1)
        self._progress.update(self._task, completed=step, loss=loss, speed=f"{format_count(speed)} {unit}")
