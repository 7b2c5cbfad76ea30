"""What GPUs get out of their peak figures: a few constants for each generation, the same for every model and source.

A machine of the catalogue is known by its datasheet. Between the datasheet and a training step stand a handful of
effects that any kernel of a generation shares, and this table has one number for each. `Accelerator.efficiency` is
the share of the peak that large 16-bit matrix products reach; everything here is relative to such figures.

Found by `bench/fit_efficiency.py`, on the rows that `published.is_fitted` names alone, and rounded to two digits. Not
fitted: `processors` (datasheets), `nvlink` of V100 and A100 (measured all-reduces within a node: vTrain, MICRO 2024),
the line of V100 but for its links (the two sources that have it differ by a fifth; defaults lie between them).
"""

from __future__ import annotations

from typing import NamedTuple

from headway.hardware.cluster import Accelerator

__all__ = [
    "DEEPSPEED_GATHER",
    "DEFAULT",
    "GENERATIONS",
    "PLAIN_HOST",
    "TILE_ELEMENTS",
    "UNALIGNED_LINEAR",
    "Efficiency",
    "efficiency_of",
    "generation_of",
]

# DeepSpeed's ZeRO-3 gathers partitions parameter by parameter; of the rate that one collective over all replicas has it
# reaches this share (Narayanan et al., SC 2021, table 2, and BigScience's records show 0.08 to 0.11).
DEEPSPEED_GATHER = 0.11

# Plain PyTorch costs the host this share of what Megatron's layers do, which wrap each operator in Python and fork
# random states to recompute: about 10 microseconds for an operator. Not fitted: no published row of such programs
# waits for the host.
PLAIN_HOST = 0.15

# A matrix product is computed in tiles of the result, of about this many elements, one for each multiprocessor at once
# (NVIDIA, "Matrix multiplication background user's guide", tile and wave quantisation).
TILE_ELEMENTS = 128 * 128


# A plain product with such rows: nanoGPT became about 25 % faster when its vocabulary grew from 50,257 to 50,304
# entries, and the projection onto it is 31 % of the FLOP of GPT-2's smallest model. Not fitted: no row has one.
UNALIGNED_LINEAR = 0.5


class Efficiency(NamedTuple):
    """Constants of one generation of GPUs.

    - `processors`: streaming multiprocessors, from the datasheet.
    - `depth`: the inner dimension at which a matrix product reaches half of what it does for a very deep one.
    - `unaligned`: what is left of it in batched products whose rows are no multiple of 16 bytes, which tensor cores
      load at once (attention with odd head widths: BLOOM's early layouts). See `UNALIGNED_LINEAR` for plain products.
    - `attention`, `attention_backward`: of the rate of large products, what fused attention kernels reach in their
      forward and backward pass, counting all of the s x s scores though a causal mask leaves half of them out.
    - `attention_tokens`: length of the sequence at which they reach half of it.
    - `attention_vendor`: by how much the vendor's own attention kernels (cuDNN's, which Transformer Engine and so
      Megatron call) are faster than FlashAttention-2.
    - `low_precision`: what products in 8 or 4 bits reach of their higher peak, relative to 16 bits.
    - `memory`: share of the memory's peak bandwidth that streaming kernels reach.
    - `host_seconds`: the host's work for one operator (Python, dispatcher, launch), as Megatron's layers need it (see
      `PLAIN_HOST`). Where it takes longer than the device, the device waits.
    - `host_micro_batch_seconds`: the host's work for one micro-batch besides: its data, its place in the schedule.
    - `host_collective_seconds`: for each member, by how much the last host is later than the others when all have
      to start a collective between two operators.
    - `nvlink`, `network`: shares of the links' nominal rates that large collectives reach.
    - `slowdown`: seconds that compute loses for each second of communication beside it: collectives take
      multiprocessors and memory bandwidth from it.
    """

    processors: int = 108
    depth: float = 256.0
    unaligned: float = 0.2
    attention: float = 0.9
    attention_backward: float = 0.8
    attention_tokens: float = 256.0
    attention_vendor: float = 1.0
    low_precision: float = 0.8
    memory: float = 0.8
    host_seconds: float = 60e-6
    host_micro_batch_seconds: float = 4e-3
    host_collective_seconds: float = 33e-6
    nvlink: float = 0.8
    network: float = 0.8
    slowdown: float = 0.2


DEFAULT = Efficiency()

GENERATIONS: dict[str, Efficiency] = {
    "V100": DEFAULT._replace(processors=80, nvlink=0.9, slowdown=0.3),
    "A100": DEFAULT._replace(
        processors=108, depth=410, unaligned=0.055, attention=0.81, memory=0.85, host_seconds=7e-5,
        host_micro_batch_seconds=4.5e-3, host_collective_seconds=2.2e-5, nvlink=0.77, network=0.9, slowdown=0.35,
    ),
    "H100": DEFAULT._replace(
        processors=132, depth=310, attention=0.66, attention_backward=0.54, attention_tokens=440, attention_vendor=1.6,
        low_precision=1.05, memory=0.88, nvlink=0.92, network=0.92, slowdown=0.16,
    ),
    "B200": DEFAULT._replace(
        processors=148, depth=350, attention=0.77, attention_tokens=420, memory=0.85, slowdown=0.23
    ),
}  # fmt: skip

# Parts of the catalogue by generation; others take the defaults.
_PARTS = {
    "P100": "V100", "V100": "V100", "A100": "A100", "A30": "A100", "H100": "H100", "H200": "H100", "B200": "B200",
    "GB200": "B200", "GB300": "B200",
}  # fmt: skip


def generation_of(accelerator: Accelerator) -> str:
    """The line of the table that an accelerator follows; "" for the defaults."""
    return _PARTS.get(accelerator.name.partition("-")[0], "")


def efficiency_of(accelerator: Accelerator) -> Efficiency | None:
    """The constants of a GPU of the catalogue; None for anything else, whose figures are taken as they are."""
    from headway.hardware.catalog import ACCELERATORS  # imported where used: a cluster from a file needs no catalogue

    if accelerator.torch_device != "cuda" or accelerator.name not in ACCELERATORS:
        return None
    return GENERATIONS.get(generation_of(accelerator), DEFAULT)
