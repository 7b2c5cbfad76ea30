"""Verbs on the database of measured times."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from headway.cli.application import group, print_json, verb
from headway.cli.options import JSON
from headway.errors import InputError

__all__: list[str] = []

profiles = group("profile", "Measured times of operators and collectives: others' and this machine's.")

DeviceName = Annotated[
    str | None, typer.Option("--device", help="The kind of device, as the catalog names it: `V100-SXM2-16GB`.")
]
Source = Annotated[str | None, typer.Option("--source", help="Who measured it: by default the file's name.")]


@profiles.command("import")
@verb
def import_profile(
    file: Annotated[Path, typer.Argument(help="Alpa's or vTrain's tables, or what `profile export` wrote.")],
    device: DeviceName = None,
    source: Source = None,
    json: JSON = False,
) -> None:
    """Take measured times of others into the database; nothing is taken in if one line is wrong.

    Example: `headway profile import alpa_prof_database.csv --device V100-SXM2-16GB`
    """
    from headway.predict.alpa import import_profile as take_in
    from headway.report.profiles import import_table
    from headway.report.terminal import Terminal

    report = take_in(file, device=device, source=source)
    if json:
        print_json(report)
    else:
        Terminal().show(import_table(report))


@profiles.command("list")
@verb
def list_profile(device: DeviceName = None, json: JSON = False) -> None:
    """Say what was measured, on which devices.

    Example: `headway profile list --device V100-SXM2-16GB`
    """
    from headway.predict.inspection import list_profile as entries
    from headway.report.profiles import profile_tables
    from headway.report.terminal import Terminal

    found = entries(device=device)
    if json:
        print_json(found)
    elif found:
        Terminal().show(*profile_tables(found))
    else:
        Terminal().out.print("Nothing was measured yet: see headway profile import and headway probe --profile")


@profiles.command("show")
@verb
def show_profile(
    operation: Annotated[str, typer.Argument(help="A collective (`all_reduce`), or `dot` for matrix products.")],
    device: Annotated[str, typer.Option("--device", help="The kind of device.")],
    dtype: Annotated[str, typer.Option("--dtype", help="Of the tensor.")] = "float32",
    mesh: Annotated[str, typer.Option("--mesh", help="Nodes x devices in each: `2x8`.")] = "1x1",
    group_size: Annotated[int, typer.Option("--group", min=1, help="Devices of one group.")] = 1,
    groups: Annotated[int, typer.Option("--groups", min=1, help="Groups at work at once.")] = 1,
    stride: Annotated[int, typer.Option("--stride", min=1, help="From one member of a group to the next.")] = 1,
    source: Source = None,
    picture: Annotated[Path | None, typer.Option("--picture", help="Also draw it into this .png or .svg file.")] = None,
    json: JSON = False,
) -> None:
    """Show the measured points of one key, and what is fitted to them.

    Example: `headway profile show all_reduce --device V100-SXM2-16GB --mesh 1x8 --group 8 --picture fit.svg`
    """
    from headway.predict.inspection import show_profile as show
    from headway.report.measured import write_measured_picture
    from headway.report.profiles import curve_table
    from headway.report.terminal import Terminal

    match = re.fullmatch(r"(\d+)x(\d+)", mesh)
    if match is None:
        raise InputError(f"{mesh!r} is no mesh", place="--mesh", remedy="nodes x devices in each, like 2x8")
    curve = show(
        operation, device=device, dtype=dtype, mesh=(int(match[1]), int(match[2])), group_size=group_size,
        groups=groups, stride=stride, source=source,
    )  # fmt: skip
    if picture is not None:
        write_measured_picture(curve, picture)
    if json:
        print_json(curve)
    else:
        Terminal().show(curve_table(curve))


@profiles.command("export")
@verb
def export_profile(
    file: Annotated[Path, typer.Argument(help="A .csv or .json file to write.")],
    device: DeviceName = None,
    source: Source = None,
    json: JSON = False,
) -> None:
    """Write measured times to a file that `profile import` reads.

    Example: `headway profile export ours.csv`
    """
    from headway.predict.inspection import export_profile as write
    from headway.report.terminal import Terminal

    count = write(file, device=device, source=source)
    if json:
        print_json({"file": str(file), "measurements": count})
    else:
        Terminal().out.print(f"{count:,} measurements in {file}", soft_wrap=True)
