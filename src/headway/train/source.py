"""What the user wants planned: a script, a model of the zoo, a function, or a workload traced before."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from headway.errors import FileError, InputError, TraceError
from headway.train.launch import trace_script
from headway.workload import trace as tracing
from headway.workload import zoo
from headway.workload.graph import OptimizerKind, Workload

__all__ = ["find_workload"]


def find_workload(
    target: str,
    arguments: Sequence[str] = (),
    *,
    global_batch: int | None = None,
    sequence: int | None = None,
    precision: str | None = None,
    on_output: Callable[[int, str, str], None] = lambda rank, stream, line: None,
    scratch: Path,
) -> Workload:
    """The workload that `target` names.

    - `script.py`: the script runs until its first step, with the model never allocated;
    - `workload.json`: a workload that `headway trace --output` or a run wrote;
    - `gpt2`, `llama3.1-8b`, …: a model of the zoo;
    - `package.module:function`: a function that returns `(model, inputs)`, or `(model, inputs, targets, loss)`.

    `global_batch` and `precision` replace what the target says (defaults for models without a script: 32 samples, in
    float32). `scratch` is a folder for the traced workload of a script.
    Raises FileError, TraceError or InputError.
    """
    if target.endswith(".py"):
        workload = trace_script(Path(target), arguments, scratch / "workload.json", on_output=on_output)
    elif target.endswith((".json", ".yaml", ".yml")):
        workload = Workload.load(target)
    elif ":" in target:
        workload = _from_function(target)
    elif target in zoo.names():
        workload = Workload(graph=zoo.trace(target, sequence=sequence), optimizer=OptimizerKind(), global_batch=32)
    elif os.sep in target:
        raise FileError(
            "no such file", place=target, remedy="give a script (.py), a workload (.json) or a model's name"
        )
    else:
        zoo.entry(target)  # raises, naming the closest models
        raise AssertionError(target)
    changes: dict[str, object] = {}
    if global_batch is not None:
        changes["global_batch"] = global_batch
    if precision is not None:
        changes["precision"] = precision
    return msgspec.structs.replace(workload, **changes)


def _from_function(target: str) -> Workload:
    module_name, function_name = target.split(":", 1)
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(
            f"cannot be imported: {error}", place=target, remedy="name it package.module:function"
        ) from None
    finally:
        sys.path.pop(0)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(
            f"has no function {function_name!r}", place=module_name, remedy="name it package.module:function"
        )
    with tracing.meta_construction():
        made = function()
    if not isinstance(made, tuple) or len(made) not in (2, 4):
        raise TraceError(
            f"returned {type(made).__name__}",
            place=target,
            remedy="return (model, inputs) or (model, inputs, targets, loss)",
        )
    targets, loss = made[2:] if len(made) == 4 else (None, None)
    graph = tracing.trace(made[0], made[1], name=function_name, target=targets, loss=loss)
    return Workload(graph=graph, global_batch=32)
