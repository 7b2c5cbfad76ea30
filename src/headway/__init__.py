"""Headway plans, predicts, simulates, runs and shares distributed deep-learning training.

What a training script needs is here: `start`, the `Session` that it returns, and `load_checkpoint`. They are imported
on first use, so that `import headway` alone does not load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headway.train.checkpoint import load_full as load_checkpoint
    from headway.train.session import Session, start

__all__ = ["Session", "load_checkpoint", "start"]

_HOMES = {
    "Session": ("headway.train.session", "Session"),
    "start": ("headway.train.session", "start"),
    "load_checkpoint": ("headway.train.checkpoint", "load_full"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'headway' has no attribute {name!r}")
    import importlib

    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
