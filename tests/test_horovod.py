"""`headway.horovod` on real processes, compared with plain torch.distributed arithmetic, and Horovod-style scripts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

import headway.horovod as hvd
import horovod_ranks
from headway.errors import FieldError, InputError
from headway.horovod.ranks import Context, options_from

EXAMPLE = Path(__file__).parents[1] / "examples" / "mnist_horovod.py"


pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("horovod")]

SCENARIOS = [
    "all_reduce_of_every_operation_and_dtype",
    "tensors_in_another_order_on_each_rank_are_fused_and_matched_by_name",
    "in_place_also_where_memory_is_not_contiguous",
    "all_gather_of_different_numbers_of_rows",
    "broadcast_all_to_all_and_reduce_scatter",
    "gradients_flow_through",
    "adasum_is_that_of_the_paper",
    "sparse_tensors_are_summed",
    "process_sets_exchange_among_themselves",
    "ranks_with_less_data_join",
    "objects_travel_and_what_could_run_code_does_not",
    "parameters_and_optimizer_state_become_those_of_the_root",
    "training_is_that_of_one_process_with_the_whole_batch",
    "gradients_can_be_clipped_between_synchronize_and_step",
    "the_optimizer_stays_of_its_kind_and_refuses_misuse",
    "sparse_gradients_are_exchanged",
    "adasum_combines_the_steps",
    "all_of_it_works_on_gloo_too",
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return horovod_ranks.run(tmp_path_factory.mktemp("horovod"), (3, SCENARIOS))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_on_three_ranks(outcomes, scenario):
    assert outcomes[scenario] == ["", "", ""]


def test_a_horovod_script_learns_on_two_ranks_under_torchrun_which_end_with_identical_parameters():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--train-size", "3000", "--fp16-allreduce", "--expect-accuracy", "0.85"]
    done = subprocess.run(
        [*torchrun, str(EXAMPLE), *options],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "parameters on 2 ranks: identical" in done.stdout
    accuracies = [float(found) for found in re.findall(r"accuracy ([\d.]+)%", done.stdout)]
    assert len(accuracies) == 3
    assert accuracies[-1] >= 85


@pytest.fixture
def alone(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("RANK", "WORLD_SIZE", "OMPI_", "PMI_", "SLURM_", "HEADWAY_", "HOROVOD_")):
            monkeypatch.delenv(name)
    yield monkeypatch
    hvd.shutdown()


def test_alone_a_process_is_its_own_only_rank(alone):
    with pytest.raises(InputError, match=r"hvd\.init"):
        hvd.rank()
    hvd.init()
    hvd.init()  # a second time does nothing
    assert (hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size(), hvd.cross_size()) == (0, 1, 0, 1, 1)
    x = torch.arange(4.0)
    assert hvd.allreduce(x, op=hvd.Sum, postscale_factor=2.0).tolist() == [0, 2, 4, 6]
    assert hvd.alltoall(x, splits=[4])[0].tolist() == hvd.allgather(x).tolist() == hvd.broadcast(x, 0).tolist()
    assert hvd.reducescatter(x).tolist() == hvd.allreduce(x, op=hvd.Adasum).tolist() == x.tolist()
    assert hvd.allgather_object({"a": 1}) == [{"a": 1}]
    assert hvd.join() == 0
    layer = torch.nn.Linear(2, 2)
    before = layer.bias.detach().clone()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(layer.parameters(), lr=1.0), layer.named_parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(layer.bias.detach(), before - 1)
    hvd.barrier()
    hvd.shutdown()
    assert not any(thread.name == "headway-exchange" for thread in threading.enumerate())


def test_what_is_not_there_says_so(alone):
    assert not hvd.mpi_built()
    assert hvd.gloo_built()
    with pytest.raises(InputError, match=r"hvd\.elastic\.run: elastic training"):
        _ = hvd.elastic.run
    with pytest.raises(InputError, match="comm is for MPI"):
        hvd.init(comm=[0])
    alone.setenv("HEADWAY_TASK", "trace")
    with pytest.raises(InputError, match="torchrun --nproc-per-node N SCRIPT"):
        hvd.init()


def test_horovods_variables_are_read_and_nonsense_is_refused():
    options = options_from(
        {
            "HOROVOD_FUSION_THRESHOLD": "1048576",
            "HOROVOD_CYCLE_TIME": "3.5",
            "HOROVOD_CACHE_CAPACITY": "0",
            "HOROVOD_TIMELINE": "t.json",
            "HOROVOD_TIMELINE_MARK_CYCLES": "1",
            "HOROVOD_AUTOTUNE": "0",
            "HOROVOD_STALL_CHECK_TIME_SECONDS": "5",
            "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "9",
        }
    )
    assert (options.threshold_bytes, options.cycle_seconds, options.cache_capacity) == (2**20, 0.0035, 0)
    assert (options.timeline, options.mark_cycles, options.autotune) == ("t.json", True, False)
    assert (options.stall_seconds, options.stall_error_seconds) == (5, 9)
    assert options_from({"HOROVOD_STALL_CHECK_DISABLE": "1"}).stall_seconds == 0
    for name in ("HOROVOD_CYCLE_TIME", "HOROVOD_FUSION_THRESHOLD", "HEADWAY_EXCHANGE_BACKEND"):
        with pytest.raises(FieldError, match=name):
            options_from({name: "soon"})


@given(machines=st.lists(st.sampled_from("abc"), min_size=1, max_size=8))
def test_local_and_cross_ranks_number_the_ranks_of_a_machine_and_the_machines(machines):
    places = []
    for rank in range(len(machines)):
        here = Context(rank, len(machines), None, owns_distributed=False)  # type: ignore[arg-type]
        here.locate(machines, [-1] * len(machines))
        places.append((machines[rank], here.local_rank, here.cross_rank))
        assert here.local_size == machines.count(machines[rank])
        assert here.cross_size == sum(machines.count(name) > here.local_rank for name in set(machines))
        assert here.is_homogeneous == (len({machines.count(name) for name in machines}) == 1)
    assert len(set(places)) == len(machines)
    for name in set(machines):
        assert sorted(local for machine, local, _ in places if machine == name) == list(range(machines.count(name)))
    assert len({(local, cross) for _, local, cross in places}) == len(machines)


def test_every_public_name_of_the_interface_exists_and_is_documented():
    assert len(hvd.__all__) == len(set(hvd.__all__))
    for name in hvd.__all__:
        thing = getattr(hvd, name)
        assert thing.__doc__, name
