"""What `headway simulate step` shows: the step as predicted beside the step as played, and its pictures in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from headway.plan.plan import Plan
from headway.predict.prediction import Prediction
from headway.predict.step import Predictor
from headway.report import gantt
from headway.report.charts import TIME_PARTS
from headway.report.saving import save
from headway.report.terminal import new_table
from headway.simulate.faults import Faults, parse_fault, parse_straggler
from headway.simulate.played import StepSimulation
from headway.simulate.step import simulate_step
from headway.units import format_seconds

__all__ = ["Row", "compared", "play", "step_table", "write_step"]


class Row(NamedTuple):
    """One part of a step, in seconds, on the rank that waits least."""

    part: str
    predicted_seconds: float
    simulated_seconds: float


def play(
    predictor: Predictor,
    plan: Plan,
    *,
    stragglers: Sequence[str] = (),
    jitter: float = 0.0,
    faults: Sequence[str] = (),
    faults_file: str | Path | None = None,
    steps: int = 1,
    checkpoint_steps: int = 1,
    seed: int = 0,
) -> tuple[Prediction, StepSimulation]:
    """The step predicted and played, with options as the command line gives them (`5=2.0`, `lost=DEVICE@1.5s`).

    Raises InputError for an option that cannot be read or cannot be, FileError and FieldError for the file.
    """
    plan.validate(predictor.workload.graph, predictor.cluster)
    found = [parse_fault(text) for text in faults]
    if faults_file is not None:
        found += Faults.load(faults_file).faults
    simulation = simulate_step(
        predictor,
        plan,
        steps=steps,
        stragglers=dict(parse_straggler(text) for text in stragglers),
        jitter=jitter,
        faults=found,
        checkpoint_steps=checkpoint_steps,
        seed=seed,
    )
    return predictor.predict(plan), simulation


def compared(prediction: Prediction, simulation: StepSimulation) -> tuple[Row, ...]:
    """Predicted beside simulated: the whole step first, then its parts."""
    predicted, simulated = prediction.time, simulation.time
    rows = [Row("step", predicted.step_seconds, simulated.step_seconds)]
    rows += [Row(name, getattr(predicted, field), getattr(simulated, field)) for field, (_, name) in TIME_PARTS.items()]
    return tuple(rows)


def step_table(prediction: Prediction, simulation: StepSimulation) -> Table:
    """`compared` for the terminal."""
    caption = f"{simulation.bubble_share:.1%} of all ranks' time is waiting"
    if simulation.restarts:
        again = "once" if simulation.restarts == 1 else f"{simulation.restarts} times"
        caption += f"; begun again {again}, {format_seconds(simulation.seconds)} in all"
    table = new_table(simulation.plan.describe(), "part", "predicted", "simulated", "difference", right=(1, 2, 3))
    table.caption, table.caption_justify, table.caption_style = caption, "left", ""
    least = 1e-9 * simulation.step_seconds  # below is what additions round away
    for row in compared(prediction, simulation):
        change = row.simulated_seconds / row.predicted_seconds - 1 if row.predicted_seconds else 0.0
        table.add_row(
            row.part,
            format_seconds(row.predicted_seconds if row.predicted_seconds > least else 0.0),
            format_seconds(row.simulated_seconds if row.simulated_seconds > least else 0.0),
            f"{change:+.1%}" if row.predicted_seconds else "",
        )
    return table


def write_step(
    folder: str | Path, prediction: Prediction, simulation: StepSimulation, capacity_bytes: float = 0.0
) -> tuple[Path, ...]:
    """Write `gantt.svg` (unless there are too many kinds of ranks to draw), `memory.svg`, and `timeline.json`.

    The timeline is in the Trace Event Format, which Perfetto opens. Returns the files. Raises FileError.
    """
    folder = Path(folder)
    files = []
    if len(simulation.kinds) <= gantt.MOST_ROWS:
        files.append(save(gantt.gantt_figure(simulation), folder / "gantt.svg"))
    files.append(save(gantt.memory_figure(simulation, prediction.memory, capacity_bytes), folder / "memory.svg"))
    path = folder / "timeline.json"
    simulation.timeline.save_chrome(str(path))
    return (*files, path)
