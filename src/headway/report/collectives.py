"""What `headway simulate collective` leaves in a folder: the picture of the links, the timeline, the program."""

from __future__ import annotations

from pathlib import Path

from headway.collective.msccl import to_msccl
from headway.errors import ProgramError
from headway.report.topology import MOST_DEVICES, write_topology
from headway.simulate.compare import Compared
from headway.units import format_bytes, format_seconds
from headway.value import write_atomically

__all__ = ["write_collective"]


def write_collective(folder: str | Path, compared: Compared) -> tuple[Path, ...]:
    """Write, for each algorithm that was simulated, `ALGORITHM.svg` (the topology with the load of every link),
    `ALGORITHM.timeline.json` (Trace Event Format) and `ALGORITHM.json` (the program), and for the fastest one
    `ALGORITHM.xml` (MSCCL) where that format can say it.

    Returns the files of the fastest algorithm. There is no picture of more than `MOST_DEVICES` devices.
    Raises FileError.
    """
    folder = Path(folder)
    comparison = compared.comparison
    files: list[Path] = []
    for name, program in compared.programs.items():
        played = compared.simulated[name]
        written: list[Path] = []
        if len(comparison.devices) <= MOST_DEVICES:
            title = (
                f"{name}: {comparison.collective} of {format_bytes(comparison.size_bytes)} on {comparison.cluster}, "
                f"{format_seconds(played.seconds)}"
            )
            written.append(
                write_topology(
                    folder / f"{name}.svg", compared.cluster, comparison.devices, compared.busy(name), title=title
                )
            )
        path = folder / f"{name}.timeline.json"
        played.timeline.save_chrome(str(path))
        written.append(path)
        path = folder / f"{name}.json"
        program.save(path)
        written.append(path)
        if name == compared.best:
            try:
                text = to_msccl(program)
            except ProgramError:
                pass  # more thread blocks or steps than the format has room for
            else:
                path = folder / f"{name}.xml"
                write_atomically(path, text)
                written.append(path)
            files = written
    return tuple(files)
