"""What a GPU's memory and links ask of a rank, shown where there is none: on the meta device, or with fake tensors."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from headway.train import activations, parallel, stages
from headway.train.checkpoint import load, save
from headway.train.checkpoint_state import put_states
from headway.train.infinity import Infinity
from headway.train.parallel import Parallel, parallelise

sys.path.insert(0, str(Path(__file__).parent))
from ranks import cross_entropy, make_batch, make_model, make_optimizer
from test_activations import prepare
from test_offload import graph_of, make_plan

META = torch.device("meta")


def one_rank(**fields: Any) -> Parallel:
    model = make_model("gpt", torch.float32)
    plan = make_plan("gpt", micro_batch=8, **fields)
    return parallelise(model, make_optimizer("adamw", model), plan, graph_of("gpt"), loss=cross_entropy)


def test_ranks_agree_by_way_of_the_device_that_their_links_join(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[torch.device] = []
    monkeypatch.setattr(parallel.dist, "broadcast", lambda tensor, source: sent.append(tensor.device))
    with FakeTensorMode():
        model = nn.BatchNorm1d(3)
        parallel._agree(model, torch.device("cuda", 0))
    assert sent == [torch.device("cuda", 0)] * 5
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}


def test_what_rests_off_the_device_never_goes_there_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[torch.Size] = []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: moved.append(tensor.shape) or tensor)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    resting = SimpleNamespace(groups=[SimpleNamespace(members=[SimpleNamespace(parameter=model[0].weight)])])
    piece: Any = SimpleNamespace(module=SimpleNamespace(model=model), infinity=resting)
    parallel._bring_to(META, piece)
    assert sorted(moved) == sorted(tensor.shape for name, tensor in model.state_dict().items() if name != "0.weight")


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("optimizer_on", ["device", "disk"])
@pytest.mark.parametrize("tiles", [{}, {"blocks.0.up": 2}])
def test_a_checkpoint_never_has_all_resting_parameters_in_memory_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tier: str, optimizer_on: str, tiles: dict[str, int]
) -> None:
    monkeypatch.setenv("HEADWAY_TIER_DIRECTORY", str(tmp_path / "tiers"))
    fields = {"parameters_on": tier, "optimizer_on": optimizer_on, "tiles": tiles}
    going_on, resumed = one_rank(**fields), one_rank(**fields)
    whole = sum(each.part.numel() * 4 for each in going_on.infinities[0].groups)
    peaks: list[int] = []
    bring = Infinity.bring

    def watched(self: Infinity, group: Any) -> None:
        bring(self, group)
        peaks.append(self.held_bytes())

    going_on.step([make_batch("gpt", 8, 0)])
    monkeypatch.setattr(Infinity, "bring", watched)
    path = save(tmp_path / "kept", going_on, step=1)
    assert not peaks
    load(path, resumed)
    assert max(peaks) < whole / 2
    monkeypatch.undo()
    for step in (1, 2):
        ours, theirs = (each.step([make_batch("gpt", 8, step)]) for each in (going_on, resumed))
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs)
    for each in (going_on, resumed):
        each.close()


def test_recomputing_repeats_the_random_numbers_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    # `checkpoint` looks at its positional arguments for whose generators to keep.
    seen: list[Any] = []

    def kept(function: Any, *given: Any, **options: Any) -> Any:
        seen.append(tree_leaves(given))
        return function(*given)

    monkeypatch.setattr(stages, "checkpoint", kept)
    monkeypatch.setattr(activations, "checkpoint", kept)
    x = torch.ones(2, requires_grad=True)
    assert torch.equal(stages._again(lambda *, x: x + 1)(x=x), x + 1)
    assert any(leaf is x for leaf in seen.pop())
    swapping = prepare("gpt", activations_on="host", recompute=(1, 2))
    swapping.step([make_batch("gpt", 8, 0)])
    swapping.close()
    assert seen
    assert all(any(isinstance(leaf, torch.Tensor) for leaf in leaves) for leaves in seen)


def test_a_restored_step_lies_where_a_fused_optimizer_reads_it() -> None:
    there, here = nn.Parameter(torch.empty(2, device=META)), nn.Parameter(torch.empty(2, device=META))
    groups = [{"fused": True, "params": [there]}, {"params": [here]}]
    states: dict[Any, dict[str, Any]] = defaultdict(dict)
    rank: Any = SimpleNamespace(optimizer=SimpleNamespace(param_groups=groups, state=states), zero=None)
    rooms = {name: (each, "step", torch.tensor(3.0)) for name, each in (("a", there), ("b", here))}
    put_states(rank, {}, rooms)
    assert (states[there]["step"].device, states[here]["step"].device.type) == (META, "cpu")
