"""What of an optimizer off the device stays on it: a float32 master there, updated by torch's own optimizer."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from headway.train.offload_shares import Share

__all__ = ["Kept"]


class Kept:
    """The elements of a share that stay on the device: a float32 master there, updated by torch's own optimizer."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, group: dict[str, Any], share: Share, values: torch.Tensor | None
    ) -> None:
        self._is_own = share.dtype == torch.float32 and share.home is None
        mine = share.read(0, share.kept) if values is None or self._is_own else values
        self.master = nn.Parameter(mine if self._is_own else mine.to(share.parameter.device, torch.float32, copy=True))
        kind = type(optimizer)
        accepted = inspect.signature(kind.__init__).parameters
        options = {key: value for key, value in group.items() if key in accepted and key != "params"}
        if self.master.is_cuda and "fused" in accepted and not options.get("foreach"):
            options["fused"] = True  # no temporary tensors, and one kernel
        self._optimizer = kind([self.master], **options)
        self._options = options

    @property
    def state(self) -> dict[str, Any]:
        """What torch's optimizer keeps for the master."""
        return self._optimizer.state[self.master]

    def step(self, share: Share, gradient: torch.Tensor, group: dict[str, Any], factor: float | None) -> None:
        """Update by the gradient of these elements, times `factor`, and show the parameter what came of it."""
        if self._is_own:
            self.master.data = share.flat()[: share.kept]  # fully_shard may have moved it
        self.master.grad = gradient.to(self.master.dtype)
        if factor is not None:
            self.master.grad.mul_(factor)
        mine = self._optimizer.param_groups[0]
        mine.update({key: value for key, value in group.items() if key in mine and key not in ("params", "fused")})
        self._optimizer.step()
        self.master.grad = None
        self._show(share)

    def put(self, share: Share, master: torch.Tensor, moments: dict[str, torch.Tensor], steps: int) -> None:
        """Go on from these float32 values of the whole share."""
        with torch.no_grad():
            if self._is_own:
                self.master.data = share.flat()[: share.kept]
            self.master.copy_(master[: share.kept])
        self._show(share)
        if not steps:
            return
        device = self.master.device
        state: dict[str, Any] = {name: whole[: share.kept].to(device, copy=True) for name, whole in moments.items()}
        if "betas" in self._options:
            on = device if self._options.get("fused") else "cpu"
            state["step"] = torch.tensor(float(steps), device=on)
        self._optimizer.state[self.master] = state

    def _show(self, share: Share) -> None:
        if self._is_own:
            return
        if share.home is None:
            share.flat()[: share.kept].copy_(self.master.detach())
        else:
            values = self.master.detach().to("cpu", share.dtype)
            if (pending := share.home.write(0, share.kept, values)) is not None:
                pending.wait()
