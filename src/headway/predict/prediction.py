"""What a plan is predicted to cost, and what a run was measured to cost: the same fields, side by side."""

from __future__ import annotations

from headway.value import Value

__all__ = ["Memory", "Prediction", "StepTime"]


class Memory(Value):
    """Peak bytes on one device, by kind.

    `workspace_bytes` counts temporaries, with the allocator's rounding and what it holds in pieces too small to use.
    `outside_bytes` are held by no allocator: the CUDA context with its kernels, and NCCL's buffers. nvidia-smi shows
    them, torch.cuda.max_memory_reserved does not: that is `allocator_bytes`.
    `host_bytes`, `remote_bytes` and `disk_bytes` are what the rank has beyond its device, buffers included (`tiers`);
    of the host's, `pinned_bytes` are page-locked. They are not in `total_bytes`.
    """

    parameters_bytes: float = 0.0
    gradients_bytes: float = 0.0
    optimizer_bytes: float = 0.0
    activations_bytes: float = 0.0
    communication_bytes: float = 0.0
    workspace_bytes: float = 0.0
    outside_bytes: float = 0.0
    host_bytes: float = 0.0
    remote_bytes: float = 0.0
    disk_bytes: float = 0.0
    pinned_bytes: float = 0.0

    @property
    def tiers(self) -> dict[str, float]:
        """Bytes off the device, by tier; tiers that hold nothing are left out."""
        held = {"host": self.host_bytes, "remote": self.remote_bytes, "disk": self.disk_bytes}
        return {tier: size for tier, size in held.items() if size}

    @property
    def allocator_bytes(self) -> float:
        """All but what lies outside of torch's allocator."""
        return self.total_bytes - self.outside_bytes

    @property
    def total_bytes(self) -> float:
        return (
            self.parameters_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.activations_bytes
            + self.communication_bytes
            + self.workspace_bytes
            + self.outside_bytes
        )


class StepTime(Value):
    """Seconds of one training step on the rank that bounds it; the parts add up to `step_seconds`.

    `compute_seconds`: forward, backward and recomputation. `communication_seconds`: only what is not hidden behind
    compute. `bubble_seconds`: waiting for other pipeline stages. `optimizer_seconds`: the update.
    """

    step_seconds: float
    compute_seconds: float
    communication_seconds: float
    bubble_seconds: float
    optimizer_seconds: float


class Prediction(Value):
    """A plan's cost: time of a step, memory of each rank, throughput, and what follows from them."""

    time: StepTime
    memory: tuple[Memory, ...]  # one for each rank
    samples_per_second: float
    tokens_per_second: float = 0.0  # 0: the model does not read tokens
    mfu: float = 0.0  # model FLOP of a step / (step time x peak FLOP/s of all devices); recomputation not counted
    energy_joules: float = 0.0  # of one step; 0: the devices' power is not known
    dollars: float = 0.0  # of one step; 0: the devices' price is not known
    bound: str = ""  # what bounds the step, in one line

    @property
    def peak_bytes(self) -> float:
        """Memory of the fullest rank."""
        return max(memory.total_bytes for memory in self.memory)
