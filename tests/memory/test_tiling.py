"""Memory-centric tiling (ZeRO-Infinity, SC 2021, section 5.1.3): the same function in tiles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from headway.errors import PlanError
from headway.memory.tiling import TiledLinear, tile


@settings(deadline=None, max_examples=40)
@given(
    inputs=st.integers(1, 20),
    outputs=st.integers(2, 30),
    data=st.data(),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_outputs_and_gradients_are_those_of_the_layer(
    inputs: int, outputs: int, data: st.DataObject, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    count = data.draw(st.integers(2, outputs))
    linear = nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64)
    tiled = TiledLinear(linear, count)
    x = torch.randn(3, 4, inputs, dtype=torch.float64, requires_grad=True)
    again = x.detach().clone().requires_grad_()
    weights = torch.randn(3, 4, outputs, dtype=torch.float64)
    whole, parts = linear(x), tiled(again)
    (whole * weights).sum().backward()
    (parts * weights).sum().backward()
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(again.grad, x.grad, rtol=1e-12, atol=1e-12)
    joined = torch.cat([part.weight.grad for part in tiled.tiles])
    torch.testing.assert_close(joined, linear.weight.grad, rtol=1e-12, atol=1e-12)
    if bias:
        assert torch.equal(torch.cat([part.bias for part in tiled.tiles]), linear.bias)


@pytest.mark.parametrize("shape", [(64, 256, 4), (128, 96, 3)])
def test_sums_of_whole_numbers_are_bit_for_bit_the_same(shape: tuple[int, int, int]) -> None:
    # Where no sum is rounded, its order cannot matter: what differs in general is rounding alone.
    inputs, outputs, count = shape
    linear = nn.Linear(inputs, outputs)
    with torch.no_grad():
        linear.weight.copy_(torch.randint(-8, 8, linear.weight.shape))
        linear.bias.copy_(torch.randint(-8, 8, linear.bias.shape))
    x = torch.randint(-8, 8, (5, inputs)).float().requires_grad_()
    again = x.detach().clone().requires_grad_()
    tiled = TiledLinear(linear, count)
    whole, parts = linear(x), tiled(again)
    whole.sum().backward()
    parts.sum().backward()
    assert torch.equal(whole, parts)
    assert x.grad is not None
    assert again.grad is not None
    assert torch.equal(x.grad, again.grad)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(4, 6), nn.Linear(6, 4), nn.LayerNorm(4)
        self.tied = nn.Linear(6, 4)
        self.tied.weight = self.second.weight
        self.second.bias.requires_grad_(False)


def test_new_names_say_which_rows_of_which_old_tensor_they_are() -> None:
    model = Model()
    old = model.first.weight.detach().clone()
    made = tile(model, {"first": 4})
    found = dict(model.named_parameters())
    assert set(made) == {f"first.tiles.{n}.{kind}" for n in range(4) for kind in ("weight", "bias")}
    for name, each in made.items():
        assert found[name].shape[0] == each.rows
        if name.endswith("weight"):
            assert each.name == "first.weight"
            assert each.whole == (6, 4)
            assert torch.equal(found[name], old[each.start : each.start + each.rows])
    assert sum(each.rows for name, each in made.items() if name.endswith("weight")) == 6


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"nowhere": 2}, "no such module"),
        ({"norm": 2}, "LayerNorm"),
        ({"first": 7}, "cannot be run in 7 tiles"),
        ({"second": 2}, "that of tied"),
    ],
)
def test_what_has_no_tiles_is_refused_naming_the_module(counts: dict[str, int], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        tile(Model(), counts)
