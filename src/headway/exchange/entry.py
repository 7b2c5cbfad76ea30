"""Makes `backend="headway"` known to torch without an import: the installed package names `announce` as a backend.

`import torch` calls every entry point of the group `torch.backends` when it is done (TORCH_DEVICE_BACKEND_AUTOLOAD=0
turns that off). Nothing is loaded here before a process group is made.
"""

from __future__ import annotations

from typing import Any

__all__ = ["announce"]


def announce() -> None:
    """Register the backend with torch.distributed, if this build has it."""
    import torch.distributed as dist

    if not dist.is_available() or "HEADWAY" in dist.Backend._plugins:
        return
    dist.Backend.register_backend("headway", _create, extended_api=True, devices=["cpu", "cuda"])


def _create(*arguments: Any) -> Any:
    from headway.exchange import process_group

    return process_group._create(*arguments)
