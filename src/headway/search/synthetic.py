"""Drawn stage problems: instances of any size whose tables have the shape of real ones, for benchmarks and tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headway.search.problem import Option, StageProblem

__all__ = ["synthetic_problem"]


def synthetic_problem(
    seed: int,
    *,
    layers: int = 6,
    pools: Sequence[int] = (4,),
    micro_batches: int = 8,
    memory: float = 1.5,
    rugged: float = 0.05,
    exactly: bool = True,
) -> StageProblem:
    """A problem with unequal layers, and options of every power of two of devices of each pool.

    Options of d devices run layers d times as fast, less what they lose to communication; each comes plain, and with
    recomputation (a third slower, a fifth of the activations). Devices of later pools are slower and have more memory.
    `memory`: what devices have beside what an even division of the model would need; `rugged`: by which share the
    seconds of each run of layers differ from the sum of its layers.
    """
    rng = np.random.default_rng([seed, layers, *pools])
    work = rng.lognormal(0.0, 0.5, layers)
    weights = rng.lognormal(0.0, 0.5, layers)
    activations = rng.lognormal(0.0, 0.5, layers)
    work[0] *= rng.uniform(0.1, 1.0)
    weights[[0, -1]] *= rng.uniform(1.0, 3.0, 2)
    options: list[Option] = []
    for pool, devices in enumerate(pools):
        size = 1
        while size <= devices:
            for recompute in (0.0, 1.0):
                options.append(Option(pool, size, data=size, recompute=recompute))
            size *= 2
    positions = np.arange(layers + 1)
    possible = positions[:, None] < positions[None, :]
    speed = np.array([0.6**pool for pool in range(len(pools))])
    total = weights.sum() + 0.5 * activations.sum()
    shape = (len(options), layers + 1, layers + 1)
    seconds, fixed, kept = np.full(shape, np.inf), np.zeros(shape), np.zeros(shape)
    capacity = np.zeros(len(options))
    for at, option in enumerate(options):
        d = option.devices
        lost = 1 + rng.uniform(0.02, 0.15) * np.log2(d)
        again = 4 / 3 if option.recompute else 1.0
        rate = speed[option.pool] * d / lost / again
        noise = 1 + rugged * rng.uniform(-1, 1, (layers + 1, layers + 1))
        runs = np.array([np.concatenate(([0.0], np.cumsum(values))) for values in (work, weights, activations)])
        work_of, weights_of, activations_of = (run[None, :] - run[:, None] for run in runs)
        seconds[at][possible] = (work_of / rate * noise + 0.02)[possible]
        fixed[at] = np.where(possible, weights_of / (1 + 0.5 * (d - 1)), 0.0)
        kept[at] = np.where(possible, activations_of * (0.2 if option.recompute else 1.0) / d * 0.3, 0.0)
        capacity[at] = memory * total / min(sum(pools), layers) * (1 + 0.5 * option.pool) + 0.5 * weights.max()
    return StageProblem(
        layers=layers,
        options=tuple(options),
        pools=tuple(pools),
        micro_batches=micro_batches,
        seconds=seconds,
        fixed_bytes=fixed,
        kept_bytes=kept,
        capacity_bytes=capacity,
        send_seconds=np.concatenate(([0.0], rng.uniform(0.005, 0.05, layers - 1), [0.0])),
        exactly=exactly,
    )
