"""What a module offers is said on purpose: `__all__` names what exists, and everything in it is documented."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import headway

modules = [
    found.name
    for found in pkgutil.walk_packages(headway.__path__, "headway.")
    if not found.ispkg and not any(part.startswith("_") for part in found.name.split("."))
]


@pytest.mark.parametrize("name", modules)
def test_every_public_name_is_exported_exists_and_is_documented(name):
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} does not say what lives in it"
    assert isinstance(getattr(module, "__all__", None), list), f"{name} has no __all__"
    assert len(module.__all__) == len(set(module.__all__)), f"{name}.__all__ names something twice"
    for public in module.__all__:
        thing = getattr(module, public)  # AttributeError: exported, and not there
        if inspect.isclass(thing):
            assert vars(thing).get("__doc__"), f"{name}.{public} is not documented"
        elif inspect.isroutine(thing):
            assert thing.__doc__, f"{name}.{public} is not documented"


@pytest.mark.parametrize("name", modules)
def test_annotations_are_not_evaluated(name):
    source = Path(importlib.import_module(name).__file__ or "").read_text(encoding="utf-8")
    assert "from __future__ import annotations" in source
