"""What does it cost to stay within a memory budget, by which policy?

    python bench/swapping.py --graphs lstm --budgets 1 0.6 --seconds 2        a minute
    python bench/swapping.py --parts operators --link 0                       recomputation alone
    python bench/swapping.py --output bench/results/swapping.json --picture docs/images/swapping.png    ten minutes

Two parts. "operators": the traced graph of a training step at its real size, operator by operator; "groups": the same
step in few groups of operators, small enough for the integer program with all stages. `optimal` has a bound below every
policy in both (but for gist and flashneuron, which encode, and swapadvisor, which may change the order); the second
table of each says how far above it each policy is, in percent of the step. Budgets are shares of the peak of keeping
everything. An operator takes what its roofline on `--device` says; transfers go over `--link` bytes per
second to the host, and `--disk` to the disk. All schedules are checked by the interpreter. An overhead is the time over
that of the step that keeps everything, minus one.

"torch" is torch's own: the partitioner of its compiler with `activation_memory_budget` at 0, 0.1, … 1, of which the
fastest that fits is taken. Its graphs are priced as ours are, operator by operator, without fusion; each result of an
operator is a tensor of its own, and ReLU works in place. What is kept of torch ("torch_whole") shows that the step is
the same: peak and time of keeping everything, beside ours.
"""

import argparse
import copy
import operator
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional

from headway.hardware.catalog import load_cluster
from headway.hardware.cluster import Accelerator
from headway.memory.swapping.building import graph_problem, kind_of, with_encodings
from headway.memory.swapping.decisions import program
from headway.memory.swapping.planning import POLICIES, Row, problem_table
from headway.memory.swapping.policies.grouping import grouped
from headway.memory.swapping.pricing import price
from headway.memory.swapping.problem import Operation, Problem, Tensor
from headway.memory.swapping.problem import Path as Way
from headway.workload.trace import trace
from headway.workload.zoo.vision import ResNet

sys.path.insert(0, str(Path(__file__).parent))
from record import new_record, save_record

Made = tuple[nn.Module, tuple[torch.Tensor, ...], torch.Tensor, Callable[..., torch.Tensor], int]
BUDGETS = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2)
TRAVELLING = ("vdnn-conv", "vdnn-all", "superneurons", "flashneuron", "swapadvisor")  # policies that need a way
SHARES = tuple(tenth / 10 for tenth in range(11))  # of torch's budget


class UNet(nn.Module):
    """Ronneberger et al., MICCAI 2015, with padding and batch normalization: four levels down and up, joined."""

    def __init__(self, width: int = 64, classes: int = 2) -> None:
        super().__init__()
        sizes = [width * 2**level for level in range(5)]
        self.down = nn.ModuleList(self._two(source, target) for source, target in zip([3, *sizes], sizes))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * size, size, 2, 2) for size in reversed(sizes[:-1]))
        self.join = nn.ModuleList(self._two(2 * size, size) for size in reversed(sizes[:-1]))
        self.head = nn.Conv2d(width, classes, 1)

    @staticmethod
    def _two(source: int, target: int) -> nn.Module:
        layers: list[nn.Module] = []
        for channels in (source, target):
            layers += [nn.Conv2d(channels, target, 3, padding=1), nn.BatchNorm2d(target), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        passed: list[torch.Tensor] = []
        for level, block in enumerate(self.down):
            x = block(functional.max_pool2d(x, 2) if level else x)
            passed.append(x)
        passed.pop()
        for up, join in zip(self.up, self.join):
            x = join(torch.cat([passed.pop(), up(x)], dim=1))
        return self.head(x)


class DenseNet(nn.Module):
    """DenseNet-121 (Huang et al., CVPR 2017, table 1): each layer reads what all layers of its block before it made."""

    def __init__(self, growth: int = 32, blocks: tuple[int, ...] = (6, 12, 24, 16), classes: int = 1000) -> None:
        super().__init__()
        channels = 2 * growth
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels, 7, 2, 3, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )  # fmt: skip
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for at, count in enumerate(blocks):
            layers = nn.ModuleList()
            for _ in range(count):
                layers.append(
                    nn.Sequential(
                        nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.Conv2d(channels, 4 * growth, 1, bias=False),
                        nn.BatchNorm2d(4 * growth), nn.ReLU(inplace=True),
                        nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
                    )
                )  # fmt: skip
                channels += growth
            self.blocks.append(layers)
            ends: list[nn.Module] = [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
            if at < len(blocks) - 1:
                ends += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
                channels //= 2
            self.transitions.append(nn.Sequential(*ends))
        self.head = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for layers, transition in zip(self.blocks, self.transitions):
            made = [x]
            for layer in layers.children():
                made.append(layer(torch.cat(made, dim=1)))
            x = transition(torch.cat(made, dim=1))
        return self.head(x.mean(dim=(2, 3)))


class Block(nn.Module):
    """A block of GPT-2: attention and a fourfold MLP, each after a normalization."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape  # (B, T, D)
        parts = self.attention(self.first(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(self.second(x))


class Transformer(nn.Module):
    """GPT-2 small without its vocabulary: 12 blocks of width 768."""

    def __init__(self, layers: int = 12, width: int = 768, heads: int = 12) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


class Recurrent(nn.Module):
    """Two layers of an LSTM, unrolled over time by its cells."""

    def __init__(self, width: int = 1024, steps: int = 25) -> None:
        super().__init__()
        self.cells = nn.ModuleList(nn.LSTMCell(width, width) for _ in range(2))
        self.width, self.steps = width, steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states = [(x.new_zeros(x.size(0), self.width), x.new_zeros(x.size(0), self.width)) for _ in self.cells]
        outputs: list[torch.Tensor] = []
        for at in range(self.steps):
            value = x[:, at]
            for layer, cell in enumerate(self.cells):
                states[layer] = cell(value, states[layer])
                value = states[layer][0]
            outputs.append(value)
        return torch.stack(outputs, dim=1)


def _square(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return functional.mse_loss(output, target)


def _image(model: nn.Module, size: int, samples: int) -> Made:
    return model, (torch.empty(2, 3, size, size),), torch.empty(2, dtype=torch.int64), functional.cross_entropy, samples


GRAPHS: dict[str, Callable[[], Made]] = {
    "resnet": lambda: _image(ResNet(), 224, 64),
    "unet": lambda: (
        UNet(), (torch.empty(2, 3, 256, 256),), torch.empty(2, 256, 256, dtype=torch.int64), functional.cross_entropy,
        8,
    ),
    "densenet": lambda: _image(DenseNet(), 224, 64),
    "transformer": lambda: (Transformer(), (torch.empty(2, 1024, 768),), torch.empty(2, 1024, 768), _square, 8),
    "lstm": lambda: (Recurrent(), (torch.empty(2, 25, 1024),), torch.empty(2, 25, 1024), _square, 64),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- torch's own


def partitioned(made: Made, accelerator: Accelerator, shares: Sequence[float | None]) -> list[Problem]:
    """One step as torch's compiler cuts it in two at each `activation_memory_budget` (None: saving everything).

    Its forward and backward graphs one after the other, as a problem that leaves nothing to decide.
    """
    from torch._functorch import config
    from torch._functorch.aot_autograd import aot_function, make_boxed_func
    from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import flop_registry

    # torch counts no operations of its attention for CPUs, which fake tensors get: without that its solver would take
    # the repetition of attention for free.
    aten = torch.ops.aten
    flop_registry[aten._scaled_dot_product_flash_attention_for_cpu] = flop_registry[
        aten._scaled_dot_product_flash_attention
    ]
    flop_registry[aten._scaled_dot_product_flash_attention_for_cpu_backward] = flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ]
    model, inputs, target, loss, samples = made
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # the cut graphs may not write to buffers that backward reads
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    cut: list[tuple[torch.fx.GraphModule, torch.fx.GraphModule]] = []

    def partition(joint: torch.fx.GraphModule, *given: Any, **options: Any) -> tuple[torch.fx.GraphModule, ...]:
        # Tracing takes longer than cutting: the joint graph is traced once and cut for every share.
        for share in shares:
            way = default_partition if share is None else min_cut_rematerialization_partition
            with config.patch(activation_memory_budget=1.0 if share is None else share):
                cut.append(way(copy.deepcopy(joint), *given, **options))
        return default_partition(joint, *given, **options)

    def keep(gm: torch.fx.GraphModule, example_inputs: object) -> Callable[..., object]:
        return make_boxed_func(gm)

    with FakeTensorMode(allow_non_fake_inputs=True):
        state = {name: torch.empty_like(each, device="cpu") for name, each in model.state_dict().items()}
        wanted = {name for name, _ in model.named_parameters()}
        parameters = {name: each.requires_grad_() if name in wanted else each for name, each in state.items()}
        sized = [torch.empty(samples, *each.shape[1:], dtype=each.dtype, device="cpu") for each in (*inputs, target)]

        def step(parameters: dict[str, torch.Tensor], *arguments: torch.Tensor) -> torch.Tensor:
            return loss(torch.func.functional_call(model, parameters, arguments[:-1]), arguments[-1])

        compiled = aot_function(step, fw_compiler=keep, bw_compiler=keep, partition_fn=partition)
        compiled(parameters, *sized).backward()
    return [_of_graphs(forward, backward, accelerator) for forward, backward in cut]


def _of_graphs(forward: torch.fx.GraphModule, backward: torch.fx.GraphModule, accelerator: Accelerator) -> Problem:
    from torch.utils.flop_counter import flop_registry

    operations: list[Operation] = []
    tensors = [Tensor(name="given", bytes=0.0, maker=-1)]
    rate = accelerator.flop_rate("float32") * accelerator.efficiency
    stream = accelerator.memory_bytes_per_second * accelerator.memory_efficiency

    def size(value: object) -> float:
        values = value if isinstance(value, tuple | list) else (value,)
        return float(sum(each.numel() * each.element_size() for each in values if isinstance(each, torch.Tensor)))

    saved: dict[str, int] = {}
    for graph, is_backward in ((forward.graph, False), (backward.graph, True)):
        shown: dict[torch.fx.Node, tuple[int, ...]] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                shown[node] = (saved[node.name],) if is_backward and node.name in saved else ()
                continue
            if node.target is operator.getitem:  # one of several results, each a tensor of its own
                whole, slot = node.args
                made = shown[whole]  # type: ignore[index]
                several = isinstance(whole.meta["val"], tuple | list) and len(made) > 1  # type: ignore[union-attr]
                shown[node] = made[slot : slot + 1] if several else made  # type: ignore[operator]
                continue
            read = tuple(dict.fromkeys(tensor for source in node.all_input_nodes for tensor in shown[source]))
            if node.op == "output":
                continue
            func = node.target
            schema = getattr(func, "_schema", None)
            view = schema is None or any(each.alias_info is not None for each in schema.returns)
            if view or "view" in str(func):
                shown[node] = read
                continue
            packet = getattr(func, "_overloadpacket", None)
            flop = 0
            if packet in flop_registry:
                arguments = torch.fx.map_arg(node.args, lambda each: each.meta["val"])
                flop = flop_registry[packet](*arguments, **node.kwargs, out_val=node.meta["val"])
            values = node.meta["val"] if isinstance(node.meta["val"], tuple | list) else (node.meta["val"],)
            moved = size(values) + sum(size(source.meta.get("val")) for source in node.all_input_nodes)
            at = len(operations)
            shown[node] = tuple(range(len(tensors), len(tensors) + len(values)))
            tensors += [Tensor(name=node.name, bytes=size(each), maker=at) for each in values]
            if not is_backward and len(values) == 1:
                saved[node.name] = shown[node][0]
            # The traced models' ReLU works in place; torch's graphs have none that does, but its compiler reuses room.
            in_place = packet is torch.ops.aten.relu and len(read) == 1
            operations.append(
                Operation(
                    name=node.name,
                    seconds=max(flop / rate, moved / stream) + accelerator.launch_seconds,
                    inputs=read,
                    outputs=shown[node],
                    backward=is_backward,
                    overwrites=read[0] if in_place else -1,
                    repeatable=not is_backward,
                    kind=kind_of(re.sub(r"_\d+$", "", node.name)),
                )
            )
        if not is_backward:
            # Saved tensors go by the names of the forward graph's outputs, also where those are views.
            saved.update({node.name: tensors_[0] for node, tensors_ in shown.items() if tensors_})
    read = {at for operation in operations for at in operation.inputs}
    tensors = [
        Tensor(name=each.name, bytes=0.0, maker=each.maker)
        if each.maker >= 0 and at not in read and operations[each.maker].backward
        else each
        for at, each in enumerate(tensors)
    ]
    return Problem(name="torch", operations=tuple(operations), tensors=tuple(tensors)).validate()


def torch_rows(made: Made, accelerator: Accelerator, budgets: list[float]) -> tuple[list[Row], dict[str, float]]:
    """For each budget the fastest of torch's partitions that fits; overheads are over the fastest of them all."""
    begin = time.perf_counter()
    problems = partitioned(made, accelerator, (None, *SHARES))
    spent = (time.perf_counter() - begin) / len(problems)
    whole, *found = [price(problem, program(problem, ())) for problem in problems]
    least_seconds = min(cost.seconds for cost in (whole, *found))
    rows: list[Row] = []
    for budget in budgets:
        fitting = [cost for cost in found if cost.peak_bytes <= budget * whole.peak_bytes]
        if not fitting:
            least = min(cost.peak_bytes for cost in found)
            failure = f"torch needs {least / whole.peak_bytes:.0%} of the peak"
            rows.append(
                Row(policy="torch", budget_bytes=budget * whole.peak_bytes, budget_share=budget, failure=failure)
            )
            continue
        best = min(fitting, key=lambda cost: cost.seconds)
        rows.append(
            Row(
                policy="torch",
                budget_bytes=budget * whole.peak_bytes,
                budget_share=budget,
                overhead=best.seconds / least_seconds - 1,
                price=best,
                solve_seconds=spent,
            )
        )
    return rows, {"peak_bytes": whole.peak_bytes, "seconds": least_seconds}


# ------------------------------------------------------------------------------------------------------------ output


def table(title: str, rows: list[Row], budgets: list[float]) -> Table:
    shown = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    shown.add_column("policy")
    for budget in budgets:
        shown.add_column(f"{budget:.0%}", justify="right")
    for policy in dict.fromkeys(row.policy for row in rows):
        cells = {row.budget_share: row for row in rows if row.policy == policy}
        of = [next((cells[share] for share in cells if abs(share - budget) < 1e-9), None) for budget in budgets]
        shown.add_row(policy, *["-" if row is None or row.failure else f"{100 * row.overhead:.1f} %" for row in of])
        if policy == "optimal":
            shown.add_row(
                "  bound",
                *["-" if row is None or row.failure else f"{100 * row.bound_overhead:.1f} %" for row in of],
            )
    return shown


def gaps(rows: list[Row], budgets: list[float]) -> Table:
    """How far each policy is above the bound of `optimal`, in percent of the step that keeps everything."""
    shown = Table(title="above the bound", box=SIMPLE_HEAD, title_justify="left")
    shown.add_column("policy")
    for budget in budgets:
        shown.add_column(f"{budget:.0%}", justify="right")
    bounds = {row.budget_share: row.bound_overhead for row in rows if row.policy == "optimal" and not row.failure}
    for policy in dict.fromkeys(row.policy for row in rows):
        cells: list[str] = []
        for budget in budgets:
            row = next(
                (each for each in rows if each.policy == policy and abs(each.budget_share - budget) < 1e-9), None
            )
            bound = next((value for share, value in bounds.items() if abs(share - budget) < 1e-9), None)
            has_gap = row is not None and not row.failure and bound is not None
            cells.append(f"{100 * (row.overhead - bound):.1f}" if has_gap else "-")
        shown.add_row(policy, *cells)
    return shown


def picture(results: dict[str, list[Row]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg" if path.suffix == ".svg" else "agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(4 * len(results), 3.4), sharey=True, squeeze=False)
    for axis, (name, rows) in zip(axes[0], results.items()):
        for at, policy in enumerate(dict.fromkeys(row.policy for row in rows)):
            points = [(row.budget_share, row.overhead) for row in rows if row.policy == policy and not row.failure]
            if points:
                style = ("-", "--", ":")[at // 10 % 3]
                axis.plot([100 * x for x, _ in points], [100 * y for _, y in points], style, marker=".", label=policy)
        bounds = [(row.budget_share, row.bound_overhead) for row in rows if row.policy == "optimal" and not row.failure]
        if bounds:
            shares, overheads = zip(*bounds)
            axis.fill_between([100 * x for x in shares], [100 * y for y in overheads], color="0.85", label="bound")
        axis.set(title=name, xlabel="budget (% of the peak)", yscale="symlog")
        axis.invert_xaxis()
    axes[0][0].set_ylabel("overhead (%)")
    axes[0][-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", nargs="+", choices=[*GRAPHS], default=[*GRAPHS])
    parser.add_argument("--budgets", nargs="+", type=float, default=[*BUDGETS])
    parser.add_argument("--policies", nargs="+", choices=[*POLICIES, "torch"], default=[*POLICIES, "torch"])
    parser.add_argument("--parts", nargs="+", choices=["operators", "groups"], default=["operators", "groups"])
    parser.add_argument("--device", default="dgx-1v", help="a machine of the catalogue, for its accelerator")
    parser.add_argument("--link", type=float, default=12e9, help="bytes per second to the host, each way; 0: no way")
    parser.add_argument("--disk", type=float, default=2e9, help="bytes per second to the disk, each way")
    parser.add_argument("--groups", type=int, default=24, help="groups of operations for the integer program")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each search of swapadvisor")
    parser.add_argument("--optimal-seconds", type=float, default=7.0, help="for each answer of optimal, and its bound")
    parser.add_argument("--group-seconds", type=float, default=3.0, help="the same, of groups")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    console = Console(width=100)
    record = new_record(options.seed, torch=torch.__version__)
    accelerator = load_cluster(options.device).accelerator_of(0)
    ways: tuple[Way, ...] = (
        Way(tier="host", write_bytes_per_second=options.link, read_bytes_per_second=options.link),
        Way(tier="disk", write_bytes_per_second=options.disk, read_bytes_per_second=options.disk),
    )
    if not options.link:  # recomputation alone
        ways = ()
        options.policies = [policy for policy in options.policies if policy not in TRAVELLING]
    record["device"], record["graphs"] = accelerator.name, {}
    results: dict[str, list[Row]] = {}
    for name in options.graphs:
        with torch.device("meta"):
            made = GRAPHS[name]()
        model, inputs, target, loss, samples = made
        graph = trace(model, inputs, name=name, loss=loss, target=target)
        problem = graph_problem(graph, samples, accelerator, paths=ways)
        whole = price(problem, program(problem, ()))
        kept = {
            "samples": samples,
            "operations": len(problem.operations),
            "peak_bytes": whole.peak_bytes,
            "seconds": whole.seconds,
        }
        record["graphs"][name] = kept
        described = f"{name}: {samples} samples, {whole.peak_bytes / 1e9:.2f} GB, {1e3 * whole.seconds:.0f} ms"
        if "operators" in options.parts:
            able = [policy for policy in options.policies if policy not in ("optimal", "torch")]
            rows = list(problem_table(problem, options.budgets, able, seed=options.seed, seconds=options.seconds))
            if "optimal" in options.policies:
                rows += problem_table(problem, options.budgets, ["optimal"], seconds=options.optimal_seconds)
            if "torch" in options.policies:
                found, kept["torch_whole"] = torch_rows(made, accelerator, options.budgets)
                rows += found
            kept["operators"] = [row.to_builtins() for row in rows]
            results[name] = rows
            console.print(table(f"{described}, {len(problem.operations)} operations", rows, options.budgets))
            if "optimal" in options.policies:
                console.print(gaps(rows, options.budgets))
        if "groups" in options.parts:
            coarse = with_encodings(grouped(problem, options.groups)[0], accelerator.memory_bytes_per_second)
            able = [policy for policy in options.policies if policy not in ("gist", "flashneuron", "torch")]
            quick = [policy for policy in able if policy != "optimal"]
            rows = list(problem_table(coarse, options.budgets, quick, seed=options.seed, seconds=options.seconds))
            if "optimal" in able:
                rows += problem_table(coarse, options.budgets, ["optimal"], seconds=options.group_seconds)
            kept["groups"] = [row.to_builtins() for row in rows]
            console.print(table(f"{name} in {len(coarse.operations)} groups", rows, options.budgets))
            if "optimal" in able:
                console.print(gaps(rows, options.budgets))
        if options.output:  # what is there so far: the next graph may take minutes
            save_record(record, options.output)
    if options.picture and results:
        picture(results, options.picture)


if __name__ == "__main__":
    main()
