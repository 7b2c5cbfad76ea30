"""The update on the host against torch's own optimizers, bit for bit, and narrow moments against their definitions."""

from __future__ import annotations

import copy
import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import InputError
from headway.memory.optimizer import BLOCK_ELEMENTS, HostOptimizer, _mkl_root, _torch_root
from headway.memory.update_kernels import EXACT_ROOT, HAS_ESTIMATES, NEWTON_ROOT, dynamic_codes, newton_roots

ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
CHUNK = 4 * BLOCK_ELEMENTS

rates = st.floats(1e-5, 1.0)
decays = st.sampled_from([0.0, 0.01, 0.3])
adam_options = st.fixed_dictionaries(
    {
        "lr": rates,
        "betas": st.tuples(st.sampled_from([0.0, 0.3, 0.5, 0.9, 0.95]), st.sampled_from([0.5, 0.95, 0.999])),
        "eps": st.sampled_from([1e-8, 1e-6, 1e-3]),
        "weight_decay": decays,
        "maximize": st.booleans(),
    }
)
sgd_options = st.fixed_dictionaries(
    {
        "lr": rates,
        "momentum": st.sampled_from([0.0, 0.5, 0.9]),
        "dampening": st.sampled_from([0.0, 0.1]),
        "weight_decay": decays,
        "maximize": st.booleans(),
    }
)


def check_against(
    kind, options: dict, *, elements: int, steps: int, seed: int, gradient_dtype=torch.float32, is_fused: bool = False
) -> None:
    """Train a parameter with torch and with ours, in chunks, on the same gradients; every bit must agree."""
    generator = torch.Generator().manual_seed(seed)
    parameter = torch.nn.Parameter(torch.randn(elements, generator=generator))
    master = parameter.detach().clone()
    implementation = {"fused": True} if is_fused else {"foreach": False, "fused": False}
    theirs = kind([parameter], **options, **implementation)
    ours = HostOptimizer.for_torch(theirs, theirs.param_groups[0], threads=2)
    states = ours.new_states(elements)
    out = torch.empty(elements, dtype=torch.bfloat16)
    schedule = torch.optim.lr_scheduler.ExponentialLR(theirs, 0.7)
    for number in range(1, steps + 1):
        scale = 10.0 ** torch.randint(-6, 3, (), generator=generator).item()
        gradient = torch.randn(elements, generator=generator).mul_(scale).to(gradient_dtype)
        parameter.grad = gradient.float()
        theirs.step()
        for a in range(0, elements, CHUNK):
            part = slice(a, a + CHUNK)
            ours.step(number, gradient[part], master[part], [each[part] for each in states], out[part], start=a)
        schedule.step()
        assert torch.equal(master, parameter.detach())
        assert torch.equal(out, parameter.detach().bfloat16())
    for name in ours.moment_names:
        moment = torch.empty(elements)
        ours.read_moment(states, name, moment)
        assert torch.equal(moment, theirs.state[parameter][name])
    ours.close()


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from([torch.optim.AdamW, torch.optim.Adam]),
    options=adam_options,
    elements=st.integers(1, 5000),
    steps=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    gradient_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    is_fused=st.booleans(),
)
def test_adam_is_torchs_bit_for_bit(kind, options, elements, steps, seed, gradient_dtype, is_fused):
    if is_fused:
        elements = -(-elements // 16) * 16  # whole vectors: torch's own fused code differs from itself beyond them
    check_against(
        kind, options, elements=elements, steps=steps, seed=seed, gradient_dtype=gradient_dtype, is_fused=is_fused
    )


@settings(max_examples=30, deadline=None)
@given(
    options=sgd_options,
    nesterov=st.booleans(),
    elements=st.integers(1, 5000),
    steps=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    gradient_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    is_fused=st.booleans(),
)
def test_sgd_is_torchs_bit_for_bit(options, nesterov, elements, steps, seed, gradient_dtype, is_fused):
    if is_fused:
        elements = -(-elements // 16) * 16
    if nesterov and options["momentum"]:
        options = {**options, "dampening": 0.0, "nesterov": True}
    check_against(
        torch.optim.SGD,
        options,
        elements=elements,
        steps=steps,
        seed=seed,
        gradient_dtype=gradient_dtype,
        is_fused=is_fused,
    )


def test_many_pieces_on_several_threads_give_the_same_bits():
    check_against(torch.optim.AdamW, ADAM, elements=CHUNK * 3 + 17, steps=2, seed=3)
    elements = 700_001  # more pieces than threads
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(elements, generator=generator).bfloat16()
    results = []
    for threads in (1, 3):
        ours = HostOptimizer("adamw", ADAM, threads=threads)
        master, states = torch.ones(elements), ours.new_states(elements)
        ours.step(1, gradient, master, states)
        ours.close()
        results.append([master, *states])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_not_a_number_and_infinity_come_through_as_in_torch():
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, 3.0, 1e30])
    parameter = torch.nn.Parameter(torch.ones(8))
    theirs = torch.optim.AdamW([parameter], **ADAM, foreach=False)
    parameter.grad = special.clone()
    theirs.step()
    ours = HostOptimizer.for_torch(theirs, theirs.param_groups[0])
    master, out = torch.ones(8), torch.empty(8, dtype=torch.bfloat16)
    ours.step(1, special, master, ours.new_states(8), out)
    assert torch.equal(master.isnan(), parameter.isnan())
    assert torch.equal(master.nan_to_num(), parameter.detach().nan_to_num())
    assert torch.equal(out.isnan(), master.isnan())


def test_the_gradient_scale_multiplies_gradients_before_all_else():
    gradient = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    for rule, group in (("adam", {**ADAM, "maximize": True}), ("adamw", ADAM)):
        ours = HostOptimizer(rule, group)
        scaled, plain = torch.ones(1000), torch.ones(1000)
        ours.step(1, gradient, scaled, ours.new_states(1000), gradient_scale=0.37)
        ours.step(1, gradient * 0.37, plain, ours.new_states(1000))
        assert torch.equal(scaled, plain)


# Narrow moments


@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
@pytest.mark.parametrize(
    ("rule", "group"), [("adamw", ADAM), ("sgd", {**ADAM, "momentum": 0.9, "dampening": 0.0, "nesterov": False})]
)
def test_chunks_of_whole_blocks_change_nothing(moments, rule, group):
    elements = 5 * BLOCK_ELEMENTS + 3
    gradient = torch.randn(elements, generator=torch.Generator().manual_seed(2))
    ours = HostOptimizer(rule, group, moments=moments)
    whole, parts = torch.ones(elements), torch.ones(elements)
    whole_states, part_states = ours.new_states(elements), ours.new_states(elements)
    for number in (1, 2, 3):
        ours.step(number, gradient, whole, whole_states)
        for a in range(0, elements, 2 * BLOCK_ELEMENTS):
            part = slice(a, a + 2 * BLOCK_ELEMENTS)
            states = [
                each[a // kept.elements : -(-min(part.stop, elements) // kept.elements)]
                for kept, each in zip(ours.states, part_states, strict=True)
            ]
            ours.step(number, gradient[part], parts[part], states, start=a)
    assert torch.equal(whole, parts)
    assert all(torch.equal(a, b) for a, b in zip(whole_states, part_states, strict=True))


def test_bytes_of_states_are_those_of_their_tensors():
    for moments, expected in (("float32", 8.0), ("bfloat16", 4.0), ("int8", 2.0 + 8 / 256)):
        ours = HostOptimizer("adamw", ADAM, moments=moments)
        held = sum(state.nbytes for state in ours.new_states(1024))
        assert ours.state_bytes_per_element == expected == held / 1024


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), exponent=st.integers(-20, 10), signed=st.booleans(), count=st.integers(1, 700))
def test_eight_bit_moments_are_the_nearest_codes_of_their_block(seed, exponent, signed, count):
    name = "exp_avg" if signed else "exp_avg_sq"
    codes = dynamic_codes(signed=signed)
    random = np.random.default_rng(seed)
    values = (random.standard_normal(count) * 10.0 ** random.uniform(-8, 0, count) * 10.0**exponent).astype(np.float32)
    values = values if signed else abs(values)
    ours = HostOptimizer("adamw", ADAM, moments="int8")
    states = ours.new_states(count)
    ours.write_moment(states, name, torch.from_numpy(values))
    read = torch.empty(count)
    ours.read_moment(states, name, read)
    for a in range(0, count, BLOCK_ELEMENTS):
        block, found = values[a : a + BLOCK_ELEMENTS], read.numpy()[a : a + BLOCK_ELEMENTS]
        largest = abs(block).max()
        shares = block.astype(np.float64) / largest
        distances = abs(shares[:, None] - codes.astype(np.float64)).min(axis=1)
        np.testing.assert_allclose(abs(found.astype(np.float64) / largest - shares), distances, atol=3e-7)


def test_dynamic_codes_are_256_distinct_numbers_that_keep_seven_magnitudes():
    for signed in (True, False):
        codes = dynamic_codes(signed=signed)
        assert len(codes) == len(set(codes.tolist())) == 256
        assert 0.0 in codes
        assert codes.max() == 1.0
        assert codes[codes > 0].min() < 1e-6
    # One code in [-1, 1] is spare: 0 and 1 have no negative (8-bit Optimizers, section 2.2).
    assert dynamic_codes(signed=True).min() > -1.0


def test_bfloat16_moments_are_neighbours_and_right_on_average():
    elements = 200_000
    ours = HostOptimizer("sgd", {**ADAM, "momentum": 0.9, "dampening": 0.0, "nesterov": False}, moments="bfloat16")
    value = torch.full((elements,), 1.0 + 2**-9)  # a quarter of the way from 1 to the next bfloat16
    states = ours.new_states(elements)
    ours.step(1, value, torch.zeros(elements), states)
    kept = states[0].float()
    assert set(kept.tolist()) == {1.0, 1.0 + 2**-7}
    assert kept.mean().item() == pytest.approx(1.0 + 2**-9, abs=6 * 2**-7 * (0.25 * 0.75 / elements) ** 0.5)


def test_a_second_moment_in_bfloat16_decays_though_each_step_is_below_its_resolution():
    elements = 4096
    ours = HostOptimizer("adamw", ADAM, moments="bfloat16")
    states, master = ours.new_states(elements), torch.zeros(elements)
    ours.step(1, torch.ones(elements), master, states)
    before = states[1].float().mean().item()
    for number in range(2, 502):
        ours.step(number, torch.zeros(elements), master, states)
    expected = before * 0.999**500
    assert states[1].float().mean().item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_narrow_moments_train_nearly_as_well(moments):
    def trained(moments) -> float:
        generator = torch.Generator().manual_seed(5)
        inputs = torch.randn(256, 20, generator=generator)
        targets = inputs @ torch.randn(20, 8, generator=generator)
        weight = torch.zeros(8, 20, requires_grad=True)
        ours = HostOptimizer("adamw", {**ADAM, "lr": 0.05, "weight_decay": 0.0}, moments=moments)
        states = ours.new_states(weight.numel())
        for number in range(1, 301):
            loss = torch.nn.functional.mse_loss(inputs @ weight.T, targets)
            (gradient,) = torch.autograd.grad(loss, weight)
            ours.step(number, gradient.contiguous().view(-1), weight.data.view(-1), states)
        return torch.nn.functional.mse_loss(inputs @ weight.T, targets).item()

    start = 20.0
    assert trained("float32") < 1e-3
    assert trained(moments) < 1e-3 * start


# The square root


def test_a_square_root_that_is_called_gives_torchs_bits_and_leaves_the_threads_of_the_caller():
    """MKL is told to work in one thread; what torch does afterwards is not. (Where MKL's root can be made, it is not
    called: here it is.)"""
    called = _mkl_root()
    if called is None or _torch_root()[0] == EXACT_ROOT:
        pytest.skip("torch takes the processor's own square root here")
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    generator = torch.Generator().manual_seed(6)
    before = library.MKL_Set_Num_Threads_Local(3)
    try:
        made, by_call = (HostOptimizer("adamw", ADAM, threads=2) for _ in range(2))
        by_call._root, by_call._called = called.address, called
        masters = [torch.ones(5000), torch.ones(5000)]
        states = [made.new_states(5000), by_call.new_states(5000)]
        for number in (1, 2, 3):
            gradient = torch.randn(5000, generator=generator).bfloat16()
            for ours, master, its in zip((made, by_call), masters, states, strict=True):
                ours.step(number, gradient, master, its, torch.empty(5000, dtype=torch.bfloat16))
        assert torch.equal(*masters)
        with called.alone():
            assert library.MKL_Get_Max_Threads() == 1
    finally:
        assert library.MKL_Set_Num_Threads_Local(before) == 3
    made.close()
    by_call.close()


@pytest.mark.skipif(not HAS_ESTIMATES, reason="this processor estimates no square roots, or numba may not use it")
@given(exponent=st.integers(1, 254), seed=st.integers(0, 2**32 - 1), count=st.integers(1, 100))
@settings(deadline=None)
def test_an_estimate_refined_is_within_three_quarters_of_the_last_place(exponent, seed, count):
    drawn = np.random.default_rng(seed).integers(0, 1 << 23, count, np.uint32) | np.uint32(exponent << 23)
    values, made = drawn.view(np.float32), np.empty(count, np.float32)
    newton_roots(values, made)
    wanted = np.sqrt(values.astype(np.float64))
    assert (np.abs(made - wanted) <= 0.7501 * np.spacing(np.nextafter(made, np.float32(0)))).all()


def test_the_root_that_is_made_as_mkls_has_torchs_bits_for_every_significand():
    if _torch_root()[0] != NEWTON_ROOT:
        pytest.skip("torch takes another square root here")
    for start in range(126 << 23, 128 << 23, 1 << 20):
        values = np.arange(start, start + (1 << 20), dtype=np.uint32).view(np.float32)
        made = np.empty_like(values)
        newton_roots(values, made)
        assert np.array_equal(made, torch.from_numpy(values).sqrt().numpy())


def test_where_no_estimate_serves_the_root_is_exact():
    bits = np.array([0, 1, 2, 5000, 0x007FFFFF, 0x00800000, 0x7F7FF001, 0x7F7FFFFF, 0x7F800000, 0x7FC00000], np.uint32)
    values, made = bits.view(np.float32), np.empty(len(bits), np.float32)
    newton_roots(values, made)
    assert np.array_equal(np.delete(made, 5), np.delete(np.sqrt(values), 5), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_that_are_zero_tiny_or_huge_are_updated_as_by_torch(dtype):
    """Their roots are no matter of an estimate: some such numbers among others, and blocks without any."""
    elements, generator = 6000, torch.Generator().manual_seed(5)
    theirs = torch.nn.Parameter(torch.ones(elements))
    optimizer = torch.optim.AdamW([theirs], **ADAM, foreach=False, fused=False)
    ours, master = HostOptimizer.for_torch(optimizer, optimizer.param_groups[0], threads=1), torch.ones(elements)
    states = ours.new_states(elements)
    out = torch.empty(elements, dtype=torch.bfloat16)
    for number in range(1, 4):
        gradient = torch.randn(elements, generator=generator)
        gradient[:3000:3] = 0.0
        gradient[100:200] *= 1e-20
        gradient[4000:4003] = torch.tensor([1e20, 5.8e20, -1e19])
        gradient = gradient.to(dtype)
        theirs.grad = gradient.float()
        optimizer.step()
        ours.step(number, gradient, master, states, out)
        assert torch.equal(master, theirs.detach())
        assert torch.equal(out, theirs.detach().bfloat16())


def test_off_the_cpu_the_arithmetic_is_that_of_a_square_root_rounded_correctly():
    """So torch's kernels for CUDA take it, fused or not (a parameter on the device "meta" stands for one there)."""
    elements = 4096
    gradient = torch.randn(elements, generator=torch.Generator().manual_seed(4))
    elsewhere = torch.optim.AdamW([torch.nn.Parameter(torch.empty(elements, device="meta"))], **ADAM)
    here = torch.nn.Parameter(torch.ones(elements))
    fused = torch.optim.AdamW([here], **ADAM, fused=True)
    here.grad = gradient
    fused.step()
    ours, master = HostOptimizer.for_torch(elsewhere, elsewhere.param_groups[0]), torch.ones(elements)
    ours.step(1, gradient, master, ours.new_states(elements))
    assert torch.equal(master, here.detach())


# What is refused


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, amsgrad=True),
        lambda p: torch.optim.Adam(p, capturable=True),
        lambda p: torch.optim.Adam(p, betas=(torch.tensor(0.9), torch.tensor(0.999)), foreach=False),
        lambda p: torch.optim.Adagrad(p),
    ],
)
def test_what_would_not_be_exact_is_refused(make):
    theirs = make([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(InputError):
        HostOptimizer.for_torch(theirs, theirs.param_groups[0])


@pytest.mark.parametrize(
    "change",
    [
        {"gradient": torch.ones(4, dtype=torch.float16)},
        {"gradient": torch.ones(5)},
        {"master": torch.ones(4, dtype=torch.bfloat16)},
        {"states": [torch.zeros(4)]},
        {"states": [torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16)]},
        {"out": torch.ones(8)[::2]},
        {"number": 0},
        {"start": 3},
    ],
)
def test_tensors_that_do_not_fit_are_refused_and_nothing_changes(change):
    ours = HostOptimizer("adamw", ADAM)
    given = {"number": 1, "gradient": torch.ones(4), "master": torch.ones(4), "states": ours.new_states(4), **change}
    before = copy.deepcopy(given)
    with pytest.raises(InputError):
        ours.step(**given)
    assert torch.equal(given["master"], before["master"])
