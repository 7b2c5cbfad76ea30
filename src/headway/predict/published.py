"""Published measurements as what Headway predicts: tables of training speed and memory, row by row, to workloads,
clusters and plans.

A file is recognised by its header. Two forms are known: one line for each training run with the columns of
`COLUMNS` (speed, memory, or both), and vTrain's table of single-node iteration times (`VTRAIN_COLUMNS`). A row that
lacks what a prediction needs, or contradicts itself, is listed as a `SkippedRow` with the reason, and never guessed.
What a table leaves out but its source states elsewhere (the attention heads in its scripts, the vocabulary of a known
model), and what a source does not state (the network of a single node), is filled in, and `PublishedRow.assumed` says
so.

The columns count as their sources count: `tokens_per_s_per_gpu` for each GPU, `global_batch` in sequences, `dp`
without context parallelism, memory of the fullest GPU in GiB (what torch's allocator and nvidia-smi count in).
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from headway.errors import FieldError, HeadwayError
from headway.hardware.catalog import PRESETS, Machine, Part, assemble, find_accelerator
from headway.hardware.cluster import Cluster
from headway.plan.plan import Plan, Stage
from headway.value import read_text
from headway.workload.graph import Graph, OptimizerKind, Recipe, Workload
from headway.workload.transformer import TransformerShape, transformer

__all__ = ["COLUMNS", "VTRAIN_COLUMNS", "PublishedRow", "SkippedRow", "is_fitted", "read_rows"]

COLUMNS = (
    "source", "model", "params_b", "layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "seq", "global_batch",
    "micro_batch", "gpu", "n_gpus", "gpus_per_node", "interconnect", "tp", "pp", "dp", "cp", "ep", "virtual_stages",
    "zero_stage", "recompute", "precision", "tokens_per_s_per_gpu", "iter_time_s", "tflops_per_gpu", "mfu",
    "memory_gb", "status", "notes",
)  # fmt: skip
_NEEDED = ("source", "model", "layers", "hidden", "seq", "global_batch", "micro_batch", "gpu", "n_gpus", "precision")
VTRAIN_COLUMNS = (
    "# GPUs", "global batch", "micro batch", "hidden size", "attention heads", "# layers", "sequence length",
    "tensor parallelism", "data parallelism", "pipeline parallelism", "iteration time (ms)",
)  # fmt: skip
_VTRAIN_NAMES = ("n_gpus", "global_batch", "micro_batch", "hidden", "heads", "layers", "seq", "tp", "dp", "pp")

_GIB = 2.0**30
# What no training run has had; beyond it a cell is a slip, and what it asks for would take hours to build.
_MOST = {"layers": 10_000, "n_gpus": 131_072, "gpus_per_node": 1024}
_MOST_ELSEWHERE = 10**9
# Cells derived from each other are rounded; beyond this they are two measurements.
_CONSISTENT = 0.03


@dataclass(frozen=True, eq=False)
class PublishedRow:
    """One published training run: what ran (`workload`, `cluster`, `plan`), and what was measured.

    `step_seconds` and `memory_bytes` (on the fullest GPU) are None where they were not published; `out_of_memory` says
    that the run failed for lack of memory. `memory_of` is what was read: "allocator" (torch's reserved memory) or
    "device" (nvidia-smi: with the CUDA context and whatever else is there). `hardware` is the accelerator's name,
    `kind` the kind of plan ("ZeRO-3", "tensor+pipeline+data"), `line` the line of the file.
    """

    workload: Workload
    cluster: Cluster
    plan: Plan
    shape: TransformerShape
    step_seconds: float | None
    memory_bytes: float | None
    out_of_memory: bool
    memory_of: Literal["allocator", "device"]
    source: str
    model: str
    hardware: str
    kind: str
    line: int
    assumed: tuple[str, ...] = ()
    notes: str = ""

    @property
    def tokens_per_second(self) -> float | None:
        """Measured tokens per second of all devices together."""
        if self.step_seconds is None:
            return None
        return self.plan.global_batch * self.shape.sequence / self.step_seconds


class SkippedRow(NamedTuple):
    """A row that cannot be predicted, and why: one reason for each column that is missing or wrong."""

    line: int
    source: str
    reasons: tuple[str, ...]


# The first of "headway 1", "headway 2", ... under which every kind of GPU that has rows of several models has some of
# them on both sides, with a share of 35 to 45 % of the published runs. Chosen before any error was looked at.
_SALT = "headway 140"
_FITTED_SHARE = 0.4


def is_fitted(row: PublishedRow) -> bool:
    """Whether constants may be fitted on this row; all others are for checking alone.

    About 40 % of the models (layers, hidden, feed-forward width), chosen by a hash of these sizes: rows of one model
    are all on one side, whatever their hardware, plan, sequence length or file.
    """
    shape = row.shape
    digest = hashlib.sha256(f"{_SALT}: {shape.layers} {shape.hidden} {shape.ffn}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < _FITTED_SHARE * 2**64


def read_rows(path: str | Path) -> tuple[list[PublishedRow], list[SkippedRow]]:
    """The rows of a table of published measurements, and those that cannot be predicted.

    Raises FileError for a file that cannot be read, and FieldError naming line and column for one that is no such
    table: empty, with unknown or missing columns, or with lines of another length than its header.
    """
    text = read_text(path)
    place = str(path)
    try:
        lines = list(csv.reader(text.splitlines(), strict=True))
    except csv.Error as error:
        raise FieldError(f"not a CSV file: {error}", place=place, remedy=_remedy()) from None
    if not lines or not any(cell.strip() for cell in lines[0]):
        raise FieldError("the file is empty", place=f"{place}: line 1", remedy=_remedy())
    header = [cell.strip() for cell in lines[0]]
    is_vtrain = "# GPUs" in header
    _check_header(header, is_vtrain, place)
    rows: list[PublishedRow] = []
    skipped: list[SkippedRow] = []
    for number, cells in enumerate(lines[1:], start=2):
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise FieldError(
                f"{len(cells)} cells, and the header has {len(header)}", place=f"{place}: line {number}",
                remedy="quote cells that hold commas",
            )  # fmt: skip
        named = dict(zip(header, (cell.strip() for cell in cells), strict=True))
        line = _Line(_from_vtrain(named) if is_vtrain else named)
        try:
            rows.append(_row(line, number))
        except _Unusable:
            skipped.append(SkippedRow(number, line.text("source"), tuple(line.reasons)))
    return rows, skipped


def _remedy() -> str:
    return f"the first line names the columns, at least: {', '.join(_NEEDED)}; or vTrain's: {', '.join(VTRAIN_COLUMNS)}"


def _check_header(header: list[str], is_vtrain: bool, place: str) -> None:
    known, needed = (VTRAIN_COLUMNS, VTRAIN_COLUMNS) if is_vtrain else (COLUMNS, _NEEDED)
    where = f"{place}: line 1"
    if not set(header) & set(known):
        raise FieldError("not a table of published measurements", place=where, remedy=_remedy())
    for column, name in enumerate(header, start=1):
        if name not in known:
            raise FieldError(
                f"unknown column {name!r}", place=f"{where}, column {column}", remedy=f"known are: {', '.join(known)}"
            )
        if header.index(name) != column - 1:
            raise FieldError(f"column {name!r} is there twice", place=f"{where}, column {column}")
    missing = [name for name in needed if name not in header]
    if missing:
        raise FieldError(f"no column {missing[0]!r}", place=where, remedy=_remedy())


def _from_vtrain(cells: dict[str, str]) -> dict[str, str]:
    """A line of vTrain's single-node table in the columns of the other form."""
    named = dict(zip(_VTRAIN_NAMES, (cells[name] for name in VTRAIN_COLUMNS[:-1]), strict=True))
    milliseconds = cells["iteration time (ms)"]
    try:
        seconds = str(float(milliseconds) / 1e3)
    except ValueError:
        seconds = milliseconds
    return {
        **named,
        "source": "VIA-Research/vTrain, single node",
        "model": "GPT",
        "gpu": "A100-SXM",
        "gpus_per_node": "8",
        "interconnect": "one node",
        "recompute": "full",
        "precision": "fp16",
        "zero_stage": "0",
        "iter_time_s": seconds,
        "status": "ok",
    }


class _Unusable(Exception):
    """The row's reasons are complete; it cannot become a prediction."""


class _Line:
    """The cells of one row; collects what is wrong with them, and what had to be assumed."""

    def __init__(self, cells: dict[str, str]) -> None:
        self.cells = cells
        self.reasons: list[str] = []
        self.assumed: list[str] = []

    def text(self, column: str) -> str:
        return self.cells.get(column, "")

    def refuse(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)

    def number(self, column: str, default: int | None = None, said: str = "", least: int = 1) -> int:
        """A whole number. An empty cell is `default`, noted as assumed with the words `said`; without one, missing."""
        text = self.text(column)
        if not text:
            if default is None:
                self.refuse(f"{column}: missing")
                return least
            if said:
                self.assumed.append(f"{column} = {default} ({said})")
            return default
        value = self.real(column)
        most = _MOST.get(column, _MOST_ELSEWHERE)
        if value is not None and (value != int(value) or not least <= value <= most):
            self.refuse(f"{column}: {text!r} is not a whole number from {least} to {most}")
            return least
        return least if value is None else int(value)

    def real(self, column: str) -> float | None:
        """A positive number, None if the cell is empty."""
        text = self.text(column)
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            self.refuse(f"{column}: {text!r} is not a number")
            return None
        return value

    def finish(self) -> None:
        if self.reasons:
            raise _Unusable


# -- frameworks -------------------------------------------------------------------------------------------------------


class _Framework(NamedTuple):
    """How a source's framework runs a model: what of it the tables do not say in columns."""

    recipe: Recipe
    optimizer: OptimizerKind
    dropout: bool = False
    packed: bool = False
    sequence_parallel: bool = False
    overlaps: bool = True  # gradients are reduced while backward goes on
    pads_vocabulary: bool = False  # to a multiple of 128 x tensor (Megatron)


# Mixed precision as Megatron and DeepSpeed keep it: 16-bit parameters, a float32 master copy beside Adam's moments,
# one fused kernel that reads gradient, master and moments and writes master, moments and parameter.
_FUSED_ADAM = OptimizerKind(traffic_bytes_per_element=30.0, temporary_bytes_per_element=0.0)
_FLOAT32_ADAM = OptimizerKind(temporary_bytes_per_element=0.0)


def _megatron(name: Literal["megatron", "megatron-deepspeed"], gradient_bytes: float, modern: bool) -> _Framework:
    attention = "flash" if modern else "unfused"
    recipe = Recipe(
        framework=name, parameter_bytes=2.0, gradient_bytes=gradient_bytes, master_bytes=4.0, attention=attention,
        compiled=True,
    )  # fmt: skip
    return _Framework(
        recipe, _FUSED_ADAM, dropout=not modern, packed=True, sequence_parallel=modern, overlaps=modern,
        pads_vocabulary=True,
    )  # fmt: skip


def _framework(line: _Line) -> _Framework:
    """By the words of the source and of the notes: who measured says with what."""
    source, notes = line.text("source").lower(), line.text("notes").lower()
    words = f"{source} {line.text('model').lower()} {notes}"
    # Gradients of bfloat16 training are added up in float32; DeepSpeed's float16 engine keeps them in 16 bit.
    half = 2.0 if _precision(line.text("precision")) == "float16" else 4.0
    if "torchtitan" in source:
        # Float8 linear layers are of use with torch.compile only, and its documentation measures them so.
        compiled = "compile" in notes or "async" in notes or _precision(line.text("precision")) == "float8"
        recipe = Recipe(framework="torchtitan", compiled=compiled)
        return _Framework(recipe, _FLOAT32_ADAM, sequence_parallel=True)
    if "llm-foundry" in source or "mosaic" in source:
        # MPT's norm and activation are one kernel each, and so is its loss (flash-attn's cross entropy).
        return _Framework(Recipe(framework="fsdp", compiled=True), _FLOAT32_ADAM)
    if "megatron-bridge" in source or "nemo" in source:
        # Its performance recipes set ddp.grad_reduce_in_fp32 to false.
        return _megatron("megatron", 2.0, modern=True)
    if "bigscience" in source:
        if "megatron 3d" in notes:
            return _megatron("megatron", half, modern=False)
        # DeepSpeed's ZeRO 1 keeps gradients in 16 bit, bfloat16 too (the source: as much memory as with float16).
        found = _megatron("megatron-deepspeed", 2.0, modern=False)
        return found._replace(dropout=False) if "tr11" in source else found
    if "vtrain" in source:
        return _megatron("megatron-deepspeed", half, modern=False)
    if "dlperf" in source:
        return _megatron("megatron", half, modern=False)
    if "megatron-lm" in source:
        # The paper's baseline without model parallelism is DeepSpeed's.
        name = "megatron-deepspeed" if "zero-3" in words else "megatron"
        return _megatron(name, half, modern=False)._replace(overlaps="zero-3" in words)
    if "fsdp" in words:
        line.assumed.append("framework = fsdp (from the words of the row)")
        return _Framework(Recipe(framework="fsdp"), _FLOAT32_ADAM)
    modern = "flash" in words or _precision(line.text("precision")) in ("float8", "float4")
    name = "megatron-deepspeed" if "deepspeed" in words else "megatron"
    line.assumed.append(f"framework = {name} (not stated)")
    return _megatron(name, half, modern)


# -- models -----------------------------------------------------------------------------------------------------------


class _Architecture(NamedTuple):
    """What a family of models is known by: facts of its published configuration."""

    pattern: str
    vocabulary: int = 0
    gated: bool = False
    tied: bool = True
    positions: Literal["learned", "rotary", "none"] = "learned"
    kv_heads: dict[int, int] = {}  # by hidden; others: as many as heads
    ffn: dict[int, int] = {}  # by hidden; others: 4 x hidden
    experts: int = 0
    chosen: int = 0
    expert_ffn: int = 0
    head_width: int = 0


_LLAMA_3 = {4096: 14336, 8192: 28672, 16384: 53248}
_ARCHITECTURES = (
    _Architecture(r"llama-?3", 128256, True, False, "rotary", dict.fromkeys(_LLAMA_3, 8), _LLAMA_3),
    _Architecture(
        r"llama", 32000, True, False, "rotary", {8192: 8}, {4096: 11008, 5120: 13824, 6656: 17920, 8192: 28672}
    ),
    _Architecture(r"mpt", 50368),
    _Architecture(r"bloom", 250880, positions="none"),
    _Architecture(r"mixtral.*8x7", 32000, True, False, "rotary", {4096: 8}, {4096: 14336}, 8, 2),
    _Architecture(r"mixtral.*8x22", 32768, True, False, "rotary", {6144: 8}, {6144: 16384}, 8, 2),
    _Architecture(r"qwen3.*30b.*a3b", 151936, True, False, "rotary", {2048: 4}, {2048: 6144}, 128, 8, 768, 128),
    _Architecture(r"qwen3.*235b", 151936, True, False, "rotary", {4096: 4}, {4096: 12288}, 128, 8, 1536, 128),
    _Architecture(r"gpt(?!.*oss)"),
)
# Vocabularies and heads that a source uses throughout, as its scripts say.
_VOCABULARIES = (("bigscience", 50257), ("vtrain", 50257), ("dlperf", 51200), ("sc21", 51200))
_HEADS = (("experiments/gpt2", 32), ("tr11-176b", 64))


def _shape(line: _Line, framework: _Framework, tensor: int) -> TransformerShape | None:
    name, source = line.text("model").lower(), line.text("source").lower()
    known = next((one for one in _ARCHITECTURES if re.search(one.pattern, name)), None)
    if known is None:
        line.refuse(f"model: the architecture of {line.text('model')!r} is not known")
        return None
    hidden = line.number("hidden")
    usual_heads = next((count for word, count in _HEADS if word in source), None)
    heads = line.number("heads", usual_heads, "as in the scripts of the source")
    kv_heads = line.number("kv_heads", known.kv_heads.get(hidden, heads), "of this model")
    ffn = line.number("ffn", known.ffn.get(hidden, 4 * hidden), "of this model")
    usual = known.vocabulary or next((size for word, size in _VOCABULARIES if word in source), 0)
    vocabulary = line.number("vocab", usual or None, "of this model")
    if line.text("ep") not in ("", "1") and not known.experts:
        line.refuse("ep: the experts of this model are not known")
    if framework.pads_vocabulary:
        vocabulary = -(-vocabulary // (128 * tensor)) * 128 * tensor
    shape = TransformerShape(
        layers=line.number("layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_width=known.head_width,
        ffn=ffn,
        vocabulary=vocabulary,
        sequence=line.number("seq"),
        gated=known.gated,
        tied=known.tied,
        biases=not known.gated,
        positions=known.positions,
        norm="rms" if known.gated else "layer",
        dropout=framework.dropout and not known.gated,
        experts=known.experts,
        experts_chosen=known.chosen,
        expert_ffn=known.expert_ffn or (ffn if known.experts else 0),
        attention=framework.recipe.attention,
        fused=framework.recipe.compiled,
        packed=framework.packed,
    )
    try:
        return shape.completed()
    except HeadwayError as error:
        line.refuse(f"{error.place.rpartition(': ')[2]}: {error.message}")
        return None


@lru_cache(maxsize=256)
def _graph(shape: TransformerShape, name: str) -> Graph:
    return transformer(shape, name)


# -- machines ---------------------------------------------------------------------------------------------------------

_GPUS = {
    "a100-sxm": "A100-SXM-80GB", "v100-sxm-32gb": "V100-SXM2-32GB", "v100-sxm-16gb": "V100-SXM2-16GB",
    "h100-sxm-95gb-hbm2e-lowtdp": "H100-SXM-96GB-HBM2e-500W", "h100_80gb": "H100-SXM-80GB",
    "a100_80gb": "A100-SXM-80GB", "a100_40gb": "A100-SXM-40GB",
}  # fmt: skip
# Where a source trained, if the row itself does not say.
_MACHINES = (
    ("experiments/gpt2", "jeanzay-v100"), ("tr11-176b", "jeanzay-a100"), ("dlperf", "oneflow-dlperf-v100"),
    ("vtrain", "vtrain-a100"), ("llama3_h100", "grandteton-h100"),
)  # fmt: skip
_FABRICS = (
    ("omni-path", r"omni|opa"), ("roce", r"roce|rdma"), ("efa", r"efa"), ("infiniband", r"\bib\b|infiniband|[hnex]dr"),
    ("ethernet", r"ethernet|tcp"),
)  # fmt: skip
_RACK = 72  # GPUs that one NVLink domain joins
_RACK_IN_USE = 64  # of which a job of several racks takes these


@lru_cache(maxsize=256)
def _cluster(accelerator: str, machine: Machine, nodes: int) -> Cluster:
    name = f"{nodes} x {machine.size} {accelerator}"
    return assemble(name, [(f"node{at}", machine) for at in range(nodes)])


def _cluster_of(line: _Line, devices: int) -> tuple[str, Cluster] | None:
    text = line.text("gpu")
    try:
        kind = find_accelerator(_GPUS.get(text.lower(), text)).name
    except HeadwayError:
        line.refuse(f"gpu: {text!r} is not in the catalog")
        return None
    network, source = line.text("interconnect").lower(), line.text("source").lower()
    known = [machine for machine in PRESETS.values() if machine.parts[0].accelerator == kind]
    # The machine that the words name, then the one that the source is known to have used, then the usual one.
    known.sort(key=lambda machine: machine is not next(
        (PRESETS[name] for word, name in _MACHINES if word in source and PRESETS[name].parts[0].accelerator == kind),
        None))  # fmt: skip
    known.sort(key=lambda machine: machine not in [one for name, one in PRESETS.items() if name in network])
    if not known:
        line.refuse(f"gpu: no machine with {kind} is in the catalog")
        return None
    size = line.number("gpus_per_node", known[0].size, "of the source's machines, or as usual for this GPU")
    if kind.startswith("GB"):
        return kind, _racks(line, kind, devices)
    fits = [machine for machine in known if machine.size == size]
    machine = _with_network(line, (fits or known)[0], network, size if devices > size else 0)
    if machine.size < size or devices > size != machine.size:
        # Wiring that is drawn for one number of GPUs cannot be stretched to another.
        if machine.wiring == "cube-mesh":
            line.refuse(f"gpus_per_node: {kind} is wired in eights, not {size}")
            return None
        machine = msgspec.structs.replace(machine, parts=(Part(accelerator=kind, count=size),))
    return kind, _cluster(kind, machine, -(-devices // size))


def _racks(line: _Line, kind: str, devices: int) -> Cluster:
    """Racks of one NVLink domain each."""
    usual = [machine for machine in PRESETS.values() if machine.parts[0].accelerator == kind]
    rack = max(usual, key=lambda machine: machine.size)
    nics = rack.nics // rack.size
    if devices <= _RACK:
        return _cluster(kind, msgspec.structs.replace(rack, parts=(Part(accelerator=kind, count=_RACK),)), 1)
    line.assumed.append(f"{_RACK_IN_USE} of {_RACK} GPUs used in each NVLink domain")
    part = (Part(accelerator=kind, count=_RACK_IN_USE),)
    rack = msgspec.structs.replace(rack, parts=part, nics=nics * _RACK_IN_USE)
    return _cluster(kind, rack, -(-devices // _RACK_IN_USE))


def _with_network(line: _Line, machine: Machine, network: str, size: int) -> Machine:
    """`machine` with the NICs that the words say: "8x HDR IB 200Gbps/node", "RoCE 1600Gbps/node", "400Gbps/GPU".

    With a count, the rate is that of each NIC; without one, of the whole node. `size` 0: no network is used.
    """
    if not size:
        return machine
    rate = re.search(r"(\d+(?:\.\d+)?)\s*gbps", network)
    if rate is None:
        line.assumed.append(f"interconnect: {machine.nics} x {machine.nic_bytes_per_second * 8e-9:g} Gb/s (not stated)")
        return machine
    gbit = float(rate[1])
    count = re.search(r"(\d+)\s*x\b", network)
    if count is not None:
        nics = int(count[1])
    elif "/gpu" in network:
        nics = size
    else:
        # As many NICs as the machine is known with, unless they would have to be slower than usual ones.
        nics = machine.nics if machine.nics and gbit / machine.nics >= 100 else max(1, round(gbit / 200))
        nics, gbit = (nics, gbit / nics) if gbit / nics < 400 else (max(1, round(gbit / 200)), 200.0)
    fabric = next((name for name, pattern in _FABRICS if re.search(pattern, network)), None)
    like = next((one for one in PRESETS.values() if fabric and _fabric_latency(one, fabric)), machine)
    return msgspec.structs.replace(
        machine, nics=nics, nic_bytes_per_second=gbit * 1e9 / 8, nic_latency_seconds=like.nic_latency_seconds
    )


_REPRESENTATIVES = {
    "infiniband": "dgx-a100", "omni-path": "jeanzay-a100", "roce": "mosaicml-a100-roce", "efa": "aws-p5.48xlarge",
    "ethernet": "aws-p3.16xlarge",
}  # fmt: skip


def _fabric_latency(machine: Machine, fabric: str) -> bool:
    return PRESETS.get(_REPRESENTATIVES[fabric]) is machine


# -- plans ------------------------------------------------------------------------------------------------------------


def _precision(word: str) -> Literal["float32", "bfloat16", "float16", "float8", "float4"] | None:
    """`"amp_bf16/DEFAULT"` → "bfloat16", `"FP8-CS"` → "float8", `"NVFP4"` → "float4"; None for an unknown word."""
    lower = word.lower()
    if "fp4" in lower:
        return "float4"
    if "fp8" in lower or "float8" in lower:
        return "float8"
    if "bf16" in lower or "bfloat16" in lower:
        return "bfloat16"
    if "fp16" in lower or "float16" in lower:
        return "float16"
    return "float32" if "32" in lower else None


def _cuts(line: _Line, layers: int, chunks: int) -> list[int]:
    """Where the stages begin, in layers of the graph: the embedding, `layers` blocks, the head.

    Equal numbers of blocks where they divide; else equal numbers with the embedding and the head counted as one layer
    each, as Megatron and torchtitan do it; else as equal as can be, the ends of the pipeline lightest.
    """
    if layers % chunks == 0:
        each = layers // chunks
        return [0, *(1 + at * each for at in range(1, chunks)), layers + 2]
    if (layers + 2) % chunks == 0:
        return [at * ((layers + 2) // chunks) for at in range(chunks + 1)]
    if layers + 2 < chunks:
        line.refuse(f"pp: {chunks} stages for {layers} layers")
        return [0, layers + 2]
    line.assumed.append(f"{layers} layers over {chunks} stages as evenly as they go")
    small, more = divmod(layers + 2, chunks)
    first = (chunks - more) // 2
    sizes = [small + (first <= at < first + more) for at in range(chunks)]
    return [sum(sizes[:at]) for at in range(chunks + 1)]


def _recomputed(line: _Line, framework: _Framework, start: int, stop: int, layers: int) -> tuple[tuple[int, ...], ...]:
    """(layers run again, layers of which attention is run again) of a stage; embedding and head never are."""
    word = line.text("recompute").lower()
    blocks = tuple(range(max(start, 1), min(stop, layers + 1)))
    if word in ("full", "true", "yes"):
        return blocks, ()
    if word in ("selective", "selective-op") and framework.recipe.framework != "fsdp":
        # For torchtitan that is its selection by operator: `predict` keeps every other matrix product.
        return (), blocks
    if word in ("selective", "selective-layer", "selective-op"):
        if word != "selective-layer":
            line.assumed.append("selective checkpointing by operator taken as every other layer")
        return tuple(at for at in blocks if at % 2), ()
    if word not in ("none", "false", "no", ""):
        line.refuse(f"recompute: {word!r} is not full, selective, selective-layer or none")
    if not word:
        line.assumed.append("recompute = none (not stated)")
    return (), ()


def _row(line: _Line, number: int) -> PublishedRow:
    """Raises _Unusable when the reasons of `line` are complete."""
    framework = _framework(line)
    degrees = {name: line.number(name, 1) for name in ("tp", "pp", "cp", "ep")}
    tp, pp, cp = degrees["tp"], degrees["pp"], degrees["cp"]
    devices = line.number("n_gpus")
    dp = line.number("dp", devices // (tp * pp * cp) or 1)
    virtual = line.number("virtual_stages", 1)
    zero = line.number("zero_stage", 0, "not stated", least=0)
    batch, micro = line.number("global_batch"), line.number("micro_batch")
    precision = _precision(line.text("precision"))
    if precision is None:
        line.refuse(f"precision: {line.text('precision')!r} is not known" if line.text("precision") else
                    "precision: missing")  # fmt: skip
    if zero > 3:
        line.refuse(f"zero_stage: {zero} is not 0, 1, 2 or 3")
    if tp * pp * cp * dp != devices:
        line.refuse(f"n_gpus: {devices}, and tp x pp x dp x cp = {tp * pp * dp * cp}")
    if batch % (micro * dp):
        line.refuse(f"micro_batch: {micro} on {dp} replicas does not divide global_batch = {batch}")
    shape = _shape(line, framework, tp)
    found = _cluster_of(line, devices)
    step_seconds, memory, failed = _measured(line, batch, devices)
    line.finish()
    assert shape is not None
    assert found is not None
    assert precision is not None
    hardware, cluster = found
    graph = _graph(shape, line.text("model"))
    plan = _plan(line, framework, shape, graph, cluster, precision, (tp, pp, dp, cp, degrees["ep"], virtual, zero))
    line.finish()
    assert plan is not None
    recipe = framework.recipe
    notes = line.text("notes")
    return PublishedRow(
        workload=Workload(
            graph=graph, optimizer=framework.optimizer, global_batch=batch, precision=precision, recipe=recipe
        ),
        cluster=cluster,
        plan=plan,
        shape=shape,
        step_seconds=step_seconds,
        memory_bytes=memory,
        out_of_memory=failed,
        memory_of="allocator" if recipe.framework in ("torchtitan", "fsdp") else "device",
        source=line.text("source"),
        model=line.text("model"),
        hardware=hardware,
        kind=_kind(plan),
        line=number,
        assumed=tuple(dict.fromkeys(line.assumed)),
        notes=notes,
    )


def _measured(line: _Line, batch: int, devices: int) -> tuple[float | None, float | None, bool]:
    """(seconds of a step, bytes, whether memory ran out)."""
    status = line.text("status").lower()
    if status not in ("", "ok", "oom"):
        line.refuse(f"status: {status!r} is neither ok nor OOM")
    seconds, rate, memory = line.real("iter_time_s"), line.real("tokens_per_s_per_gpu"), line.real("memory_gb")
    if rate:
        derived = batch * line.number("seq") / (rate * devices)
        if seconds and abs(derived / seconds - 1) > _CONSISTENT:
            line.refuse(f"iter_time_s: {seconds:g} s, and tokens_per_s_per_gpu makes {derived:g} s")
        seconds = seconds or derived
    if not seconds and not memory and status != "oom":
        line.refuse("iter_time_s: missing, and there is no other measurement")
    return seconds or None, memory * _GIB if memory else None, status == "oom"


def _plan(
    line: _Line, framework: _Framework, shape: TransformerShape, graph: Graph, cluster: Cluster, precision,
    degrees: tuple[int, ...],
) -> Plan | None:  # fmt: skip
    tp, pp, dp, cp, ep, virtual, zero = degrees
    cuts = _cuts(line, shape.layers, pp * virtual)
    stages = []
    for start, stop in itertools.pairwise(cuts):
        again, attention = _recomputed(line, framework, start, stop, shape.layers)
        stages.append(Stage(start=start, stop=stop, recompute=again, recompute_attention=attention))
    sharding: dict[str, Literal["column", "row"]] = {}
    if tp > 1:
        for block in graph.blocks:
            if block.divisor % tp == 0:
                sharding |= dict.fromkeys(block.columns, "column")
                sharding |= dict.fromkeys(block.rows, "row")
            elif block.columns and block.rows:
                line.refuse(f"tp: {tp} ranks cannot share {block.divisor} heads or features")
                return None
    batch, micro = line.number("global_batch"), line.number("micro_batch")
    count = batch // (micro * dp)
    schedule = "none" if pp == 1 else "interleaved" if virtual > 1 else "1f1b" if count >= pp else "gpipe"
    offload = _offload(line, zero)
    plan = Plan(
        model=graph.name,
        devices=tuple(device.name for device in cluster.devices[: tp * pp * dp * cp]),
        global_batch=batch,
        micro_batch=micro,
        stages=tuple(stages),
        data=dp,
        tensor=tp,
        pipeline=pp,
        context=cp,
        expert=ep,
        schedule=schedule,
        zero_stage=zero if dp * cp > 1 else 0,  # type: ignore[arg-type]
        tensor_sharding=sharding,
        precision=precision,
        overlap=framework.overlaps or zero >= 2,
        sequence_parallel=framework.sequence_parallel and tp > 1,
        **offload,
    )
    try:
        return plan.validate(graph)
    except HeadwayError as error:
        line.refuse(f"{error.place.rpartition(': ')[2]}: {error.message}")
        return None


def _offload(line: _Line, zero: int) -> dict:
    """Where states rest, by the words of the notes (and, of one source, of its scripts)."""
    notes, source = line.text("notes").lower(), line.text("source").lower()
    found = {}
    if "cpuoffload=true" in notes.replace(" ", ""):
        found["activations_on"] = "host"
    if "experiments/gpt2" in source and zero == 3 and "megatron" in notes:
        line.assumed.append("activations on host (--checkpoint-in-cpu in the scripts of the source)")
        found["activations_on"] = "host"
    if re.search(r"optim\w* (cpu )?offload", notes):
        found["optimizer_on"] = "host"
    if re.search(r"(full|param\w*) (cpu )?offload", notes):
        found |= {"optimizer_on": "host", "parameters_on": "host"}
    return found


def _kind(plan: Plan) -> str:
    """`"tensor+pipeline+data"`, `"ZeRO-3"`, `"one device"`."""
    zero = f"ZeRO-{plan.zero_stage}" if plan.zero_stage >= 2 else "data"
    names = {"tensor": plan.tensor, "pipeline": plan.pipeline, "context": plan.context, "expert": plan.expert}
    words = [name for name, degree in names.items() if degree > 1]
    return "+".join([*words, zero] if plan.data > 1 else words) or "one device"
