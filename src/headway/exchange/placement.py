"""Which rank this process is, by what started it: torchrun, Headway, Slurm, Open MPI, MPICH, or nobody.

Launchers say it in environment variables, each in its own. `place_of` reads them, and says where ranks meet if the
launcher did not.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping

import msgspec

from headway.errors import FieldError, InputError

__all__ = ["Place", "place_of", "whole_number"]

_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


class Place(msgspec.Struct, frozen=True):
    """Rank `rank` of `size`; `local_rank` among those on its machine, -1 if the launcher does not say.

    `variables`: MASTER_ADDR and MASTER_PORT, for what the launcher left out.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = -1
    variables: dict[str, str] = {}


def place_of(environment: Mapping[str, str]) -> Place:
    """The place of the process with this environment; that of a single rank if nothing started it.

    Raises InputError where ranks could not find each other, FieldError for a variable that is no number.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, size = whole_number(environment, "RANK"), whole_number(environment, "WORLD_SIZE")
        return Place(rank, size, whole_number(environment, "LOCAL_RANK"))
    if "SLURM_STEP_ID" in environment and whole_number(environment, "SLURM_NTASKS") > 1:
        rank, size = whole_number(environment, "SLURM_PROCID"), whole_number(environment, "SLURM_NTASKS")
        hosts = environment.get("SLURM_NODELIST", "")
        host = _first_host(hosts) or environment.get("SLURM_LAUNCH_NODE_IPADDR") or "127.0.0.1"
        local_rank = whole_number(environment, "SLURM_LOCALID")
        return Place(rank, size, local_rank, _meeting(environment, host, whole_number(environment, "SLURM_JOB_ID", 0)))
    for names in _MPI:
        rank, size, local_rank, local_size = (whole_number(environment, name) for name in names)
        if rank < 0 or size < 1:
            continue
        if size > 1 and local_size != size and not {"MASTER_ADDR", "HEADWAY_INIT_METHOD"} & set(environment):
            raise InputError(
                "MPI started ranks on several machines, and nothing says where rank 0 is",
                place=f"{names[1]}={size}",
                remedy="mpirun -x MASTER_ADDR=HOST_OF_RANK_0 -x MASTER_PORT=29500 …",
            )
        job = environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_ess_base_jobid") or ""
        return Place(rank, size, local_rank, _meeting(environment, "127.0.0.1", zlib.crc32(job.encode())))
    return Place()


def whole_number(environment: Mapping[str, str], name: str, usual: int = -1) -> int:
    """The number in a variable, `usual` if it is not set or empty. Raises FieldError naming the variable."""
    text = environment.get(name, "")
    try:
        return int(text) if text else usual
    except ValueError:
        raise FieldError(f"{text!r} is not a whole number", place=name) from None


def _meeting(environment: Mapping[str, str], host: str, job: int) -> dict[str, str]:
    """Where to meet; the port is the same on all ranks of a job, and most likely another for the next job."""
    usual = {"MASTER_ADDR": host, "MASTER_PORT": str(29500 + job % 1000)}
    return {name: value for name, value in usual.items() if name not in environment}


def _first_host(hosts: str) -> str:
    """The first of Slurm's compressed list: `gpu[03-05,7],login1` → `gpu03`."""
    found = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", hosts)
    return "" if found is None else found[1] + (found[2] or "") + (found[3] or "")
