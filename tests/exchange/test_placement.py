"""Who a rank is, by the variables of each launcher."""

from __future__ import annotations

import pytest

from headway.errors import FieldError, InputError
from headway.exchange.placement import Place, place_of


def mpi(rank: int, size: int, local_rank: int, local_size: int) -> dict[str, str]:
    values = {"RANK": rank, "SIZE": size, "LOCAL_RANK": local_rank, "LOCAL_SIZE": local_size}
    return {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in values.items()}


SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "1007"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Place(0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Place(3, 4, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4"} | SLURM, Place(3, 4)),
        (SLURM | {"SLURM_NODELIST": "gpu[03-06],x"}, Place(5, 8, 1, {"MASTER_ADDR": "gpu03", "MASTER_PORT": "29507"})),
        (SLURM | {"SLURM_NODELIST": "a1,a2", "MASTER_PORT": "1"}, Place(5, 8, 1, {"MASTER_ADDR": "a1"})),
        ({**SLURM, "SLURM_NTASKS": "1"}, Place(0, 1)),
        (mpi(2, 4, 2, 4), Place(2, 4, 2, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})),
        (mpi(2, 4, 0, 2) | {"MASTER_ADDR": "h", "MASTER_PORT": "1"}, Place(2, 4, 0)),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "MASTER_PORT": "7"},
            Place(1, 2, 1, {"MASTER_ADDR": "127.0.0.1"}),
        ),
    ],
    ids=["nobody", "torchrun", "torchrun in Slurm", "srun", "srun, port given", "sbatch", "mpirun", "2 nodes", "mpich"],
)
def test_the_launcher_tells_who_a_rank_is(environment, expected):
    assert place_of(environment) == expected


def test_two_jobs_of_mpirun_meet_at_different_ports_and_ranks_of_one_at_the_same():
    ports = {place_of(mpi(1, 2, 1, 2) | {"PMIX_NAMESPACE": f"job-{job}"}).variables["MASTER_PORT"] for job in (1, 2)}
    assert len(ports) == 2


def test_mpi_on_several_machines_must_say_where_rank_0_is():
    with pytest.raises(InputError, match="nothing says where rank 0 is"):
        place_of(mpi(1, 4, 1, 2))


def test_a_variable_that_is_no_number_is_named():
    with pytest.raises(FieldError, match="WORLD_SIZE: 'two'"):
        place_of({"RANK": "0", "WORLD_SIZE": "two"})
