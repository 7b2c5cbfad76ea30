"""Where the time of steps with an optimizer off the device goes."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["OffloadTimes"]


@dataclass
class OffloadTimes:
    """Where the time of steps went, in seconds added up since the last `clear`.

    `gradients_out_seconds` and `parameters_back_seconds`: copies between device and host (on the roads themselves, on a
    GPU). `update_seconds`: the host's arithmetic; `kept_seconds`: the device's, as far as the host waited for it.
    `states_seconds`: waiting for states from disk or remote memory. `stalled_seconds`: backward waiting for a free
    buffer. `exposed_seconds`: what was left to wait for after backward. `gathered_seconds`: the all-gather.
    """

    gradients_out_seconds: float = 0.0
    update_seconds: float = 0.0
    kept_seconds: float = 0.0
    states_seconds: float = 0.0
    parameters_back_seconds: float = 0.0
    stalled_seconds: float = 0.0
    exposed_seconds: float = 0.0
    gathered_seconds: float = 0.0
    gradients_out_bytes: int = 0
    parameters_back_bytes: int = 0
