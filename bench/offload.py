"""Tokens a second with the optimizer off the device, beside torch's own way: `fully_shard` with `CPUOffloadPolicy`.

    python bench/offload.py --parameters 2e6                                    a smoke run, on the CPU
    python bench/offload.py --device cuda --parameters 5e9                      both, on the same model
    python bench/offload.py --device cuda --parameters 14e9 --sides headway     the largest model

Each side runs in a process of its own, so that neither inherits the other's memory. The model is a GPT made on the meta
device, and given values one parameter at a time. Written down: seconds of each phase, bytes moved, and what the roads
and the host's memory gave in the same run when nothing else used them, so that the distance to the bound can be told.
AdamW in full: 16 bytes a parameter (bfloat16 parameters and gradients; float32 masters and two moments).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parent))
from record import new_record, save_record

VOCABULARY = 32768


class Block(nn.Module):
    """Pre-norm transformer block: 12 channels² parameters. Shapes: B samples, T tokens, C channels, H heads."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x_BTC: Tensor) -> Tensor:
        batch, tokens, channels = x_BTC.shape
        q, k, v = self.qkv(self.norm1(x_BTC)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        a_BHTD = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTC = x_BTC + self.out(a_BHTD.transpose(1, 2).reshape(batch, tokens, channels))
        return x_BTC + self.down(F.gelu(self.up(self.norm2(x_BTC))))


class GPT(nn.Module):
    """Tokens in, the loss of the next token out; every block recomputed in backward."""

    def __init__(self, vocabulary: int, channels: int, heads: int, depth: int, context: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, channels), nn.Embedding(context, channels)
        self.blocks = nn.ModuleList(Block(channels, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(channels)

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTC = self.tokens(ids_BT[:, :-1]) + self.positions.weight[: ids_BT.shape[1] - 1]
        for block in self.blocks:
            x_BTC = checkpoint(block, x_BTC, use_reentrant=False)
        logits_BTV = F.linear(self.norm(x_BTC), self.tokens.weight)
        return F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())


def make_model(arguments: argparse.Namespace) -> GPT:
    """On the meta device, with about as many parameters as asked for."""
    wanted = arguments.parameters
    channels = next((c for least, c in ((1e10, 5120), (1.5e9, 4096), (2e8, 2048), (2e7, 768)) if wanted >= least), 128)
    vocabulary = VOCABULARY if wanted >= 2e7 else 512
    depth = max(1, round((wanted - vocabulary * channels) / (12 * channels**2)))
    with torch.device("meta"):
        return GPT(vocabulary, channels, channels // (128 if channels > 768 else 64), depth, arguments.tokens)


def first_value(name: str, shape: torch.Size, number: int, device: torch.device) -> Tensor:
    """What a parameter begins with, in float32, the same on both sides."""
    if name.endswith("bias"):
        return torch.zeros(shape, device=device)
    if "norm" in name:
        return torch.ones(shape, device=device)
    generator = torch.Generator(device).manual_seed(number)
    return torch.randn(shape, device=device, generator=generator).mul_(0.02)


def batches(arguments: argparse.Namespace, vocabulary: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(arguments.seed)
    shape = (arguments.batch, arguments.tokens + 1)
    return [torch.randint(vocabulary, shape, generator=generator).to(device) for _ in range(arguments.steps)]


class Clock:
    """Seconds between marks, on the host, after the device has caught up."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.last = self.now()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def lap(self) -> float:
        now = self.now()
        seconds, self.last = now - self.last, now
        return seconds


def train_headway(arguments: argparse.Namespace) -> dict[str, Any]:
    """Our optimizer off the device, one rank."""
    from headway.memory.tiers import Store
    from headway.plan.plan import single_device_plan
    from headway.train.offload import OffloadedOptimizer, Share

    device = torch.device(arguments.device)
    model = make_model(arguments).to(torch.bfloat16)
    count = sum(parameter.numel() for parameter in model.parameters())
    roads = measure_roads(device)
    kept = kept_fraction(arguments, count, device)
    model.to_empty(device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    named = list(model.named_parameters())
    shares = [Share(name, parameter, 0, parameter.numel()) for name, parameter in named]
    numbers = {name: number for number, (name, _) in enumerate(named)}

    def initial(share: Share) -> Tensor:
        value = first_value(share.name, share.parameter.shape, numbers[share.name], device)
        share.parameter.detach().copy_(value)
        return value.reshape(-1)

    plan = single_device_plan(
        "gpt", 1, arguments.batch, optimizer_on=arguments.tier, optimizer_kept=kept, precision="bfloat16"
    )
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        store = Store(device=device, directory=directory if arguments.tier == "disk" else None)
        offload = OffloadedOptimizer(optimizer, shares, plan, store, device=device, initial=initial)
        offload.watch()
        setup = time.perf_counter() - started
        steps, losses = [], []
        clock = Clock(device)
        for number, ids in enumerate(batches(arguments, model.tokens.num_embeddings, device)):
            if number == arguments.warmup:
                offload.clear_times()
            clock.lap()
            offload.begin(1, hooked=True)
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(ids)
            forward = clock.lap()
            loss.backward()
            backward = clock.lap()
            offload.step()
            exposed = clock.lap()
            losses.append(loss.item())
            steps.append({"forward": forward, "backward": backward, "exposed": exposed})
        counted = len(steps) - arguments.warmup
        phases = {key: value / counted for key, value in dataclasses.asdict(offload.times).items()}
        offload.close()
        store.close()
    updated = count * (1 - kept)
    return {
        "parameters": count, "kept": kept, "setup_seconds": setup, "losses": losses,
        **timings(steps[arguments.warmup :], arguments), "phases_per_step": phases, "roads": roads,
        "update_bytes_per_second": 28 * updated / phases["update_seconds"] if phases["update_seconds"] else None,
        "host_update_bound_seconds": 28 * updated / roads["host_copy_bytes_per_second"],
        **peaks(device),
    }  # fmt: skip


def train_torch(arguments: argparse.Namespace) -> dict[str, Any]:
    """`fully_shard` with `CPUOffloadPolicy`: float32 parameters, gradients and states on the host, computed in bf16."""
    import torch.distributed as dist
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    device = torch.device(arguments.device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    mesh = dist.init_device_mesh(device.type, (1,))
    model = make_model(arguments)
    count = sum(parameter.numel() for parameter in model.parameters())
    options: dict[str, Any] = {
        "mesh": mesh,
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda"),
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16),
    }
    started = time.perf_counter()
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            local = parameter.to_local()  # type: ignore[attr-defined]
            local.copy_(first_value(name, parameter.shape, number, device).view(local.shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    setup = time.perf_counter() - started
    steps, losses = [], []
    clock = Clock(device)
    for ids in batches(arguments, model.tokens.num_embeddings, device):
        clock.lap()
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(ids)
        forward = clock.lap()
        loss.backward()
        backward = clock.lap()
        optimizer.step()
        optimizer.zero_grad()
        exposed = clock.lap()
        losses.append(loss.item())
        steps.append({"forward": forward, "backward": backward, "exposed": exposed})
    dist.destroy_process_group()
    return {
        "parameters": count, "setup_seconds": setup, "losses": losses,
        **timings(steps[arguments.warmup :], arguments), **peaks(device),
    }  # fmt: skip


def timings(steps: list[dict[str, float]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians of the steps that count. "exposed": what of the optimizer nothing hid."""
    seconds = {f"{key}_seconds": statistics.median(step[key] for step in steps) for key in steps[0]}
    total = statistics.median(sum(step.values()) for step in steps)
    return {**seconds, "step_seconds": total, "tokens_per_second": arguments.batch * arguments.tokens / total}


def peaks(device: torch.device) -> dict[str, float]:
    lines = Path("/proc/self/status").read_text().splitlines()
    host = next((float(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0.0)
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {"peak_host_bytes": host, "peak_device_bytes": float(on_device)}


def measure_roads(device: torch.device) -> dict[str, float]:
    """Bytes a second of each road when it is alone: device to host, host to device, and the host's memory (read plus
    written, as the update's 28 bytes a parameter are counted)."""
    elements = 64 * 2**20 if device.type == "cuda" else 4 * 2**20
    source, target = torch.ones(4 * elements), torch.empty(4 * elements)
    found = {"host_copy_bytes_per_second": 2 * 16 * elements / best(lambda: target.copy_(source), Clock(device))}
    if device.type == "cuda":
        pinned, there = torch.ones(elements, pin_memory=True), torch.empty(elements, device=device)
        found["to_host_bytes_per_second"] = 4 * elements / best(lambda: pinned.copy_(there), Clock(device))
        found["to_device_bytes_per_second"] = 4 * elements / best(lambda: there.copy_(pinned), Clock(device))
    return found


def best(act: Any, clock: Clock) -> float:
    times = []
    for _ in range(4):
        clock.lap()
        act()
        times.append(clock.lap())
    return min(times)


def kept_fraction(arguments: argparse.Namespace, count: int, device: torch.device) -> float:
    """What part of the optimizer fills the device, after parameters and `reserve`, unless it was given."""
    if arguments.kept >= 0:
        return arguments.kept
    if device.type != "cuda":
        return 0.25
    free, _ = torch.cuda.mem_get_info(device)
    fraction = min(1.0, max(0.0, (free - 2 * count - arguments.reserve) / (12 * count)))
    left = (1 - fraction) * 12 * count
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if left > available and arguments.tier == "host":
        raise SystemExit(f"{left / 1e9:.0f} GB of states are left for the host, which has {available / 1e9:.0f} GB")
    return fraction


SIDES = {"headway": train_headway, "torch": train_torch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parameters", type=float, default=2e6)
    parser.add_argument("--batch", type=int, default=4, help="samples in a step")
    parser.add_argument("--tokens", type=int, default=0, help="in a sample; by default 1024 on a GPU, 64 on the CPU")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=2, help="steps that do not count")
    parser.add_argument("--tier", default="host", choices=["host", "disk"])
    parser.add_argument("--kept", type=float, default=-1, help="optimizer_kept; by default what fills the device")
    parser.add_argument("--reserve", type=float, default=16e9, help="device bytes for all but parameters and states")
    parser.add_argument("--directory", default=None, help="where the disk tier lies")
    parser.add_argument("--sides", default="headway,torch")
    parser.add_argument("--timeout", type=float, default=560.0, help="seconds for each side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/bench/offload.json")
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.tokens = arguments.tokens or (1024 if arguments.device == "cuda" else 64)
    if arguments.side:
        try:
            result = SIDES[arguments.side](arguments)
        except Exception as error:  # noqa: BLE001 - what a side cannot do is a result, too
            traceback.print_exc()
            result = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        print("RESULT " + json.dumps(result), flush=True)
        return
    on_gpu = arguments.device == "cuda"
    record = new_record(
        arguments.seed, torch=torch.__version__, cores=os.cpu_count(),
        device=torch.cuda.get_device_name() if on_gpu else "cpu",
    )  # fmt: skip
    for side in arguments.sides.split(","):
        record[side] = run_side(side, arguments.timeout)
        print(f"{side}: {json.dumps(record[side], indent=1)}", flush=True)
    speeds = [record[side].get("tokens_per_second") for side in SIDES if side in record]
    if len(speeds) == 2 and all(speeds):
        record["ratio"] = speeds[0] / speeds[1]
        print(f"headway / torch: {record['ratio']:.2f}")
    path = Path(arguments.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_record(record, path)


def run_side(side: str, timeout: float) -> dict[str, Any]:
    """What one side measured, in a process of its own; or how it failed."""
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
    # Segments that grow: parameters, kept states and gradients of many sizes would leave gaps in fixed ones.
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}
    try:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {timeout:.0f} seconds"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    # A process that the kernel killed for memory says nothing more.
    return json.loads(lines[-1].removeprefix("RESULT ")) if lines else {"failed": f"ended with {done.returncode}"}


if __name__ == "__main__":
    main()
