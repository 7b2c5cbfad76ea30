"""One collective through its four readers: proven, predicted, simulated, and carried out by real processes.

    python examples/collective.py                     # three GPUs of a DGX-1V, played by three local processes

See docs/collectives.md, which follows this example step by step.
"""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from headway.collective.algorithms import generate
from headway.collective.program import Program
from headway.collective.verify import verify
from headway.exchange.executor import Communicator
from headway.hardware.catalog import load_cluster
from headway.predict.collective import predict_program
from headway.simulate.communication import simulate

SIZE_BYTES = 100e6


def carry_out(rank: int, text: str, meeting: str) -> None:
    """What each process does: the program is a value, so it travels as JSON."""
    torch.set_num_threads(1)
    program = Program.from_json(text)
    store = dist.FileStore(meeting, program.size)
    communicator = Communicator(rank=rank, size=program.size, store=store)
    generator = torch.Generator().manual_seed(rank)
    vector = torch.randn(1_000_003, generator=generator, dtype=torch.float64)
    communicator.run(program, vector)
    # The sum of all ranks' numbers, made here once more by hand.
    right = sum(
        torch.randn(1_000_003, generator=torch.Generator().manual_seed(other), dtype=torch.float64)
        for other in range(program.size)
    )
    error = float((vector - right).abs().max())
    print(f"  rank {rank}: largest difference to the sum made by hand {error:.1e}", flush=True)
    if error > 1e-12:
        raise SystemExit(f"rank {rank} got another sum")
    communicator.close()


def main() -> None:
    cluster = load_cluster("dgx-1v")
    program = generate("packed", cluster, "all_reduce", cluster.select("0,1,4"))
    print(f"the program: {len(program.chunks)} chunks, {len(program.transfers)} transfers")
    for transfer in program.transfers:
        how = "added to" if transfer.reduce else "copied to"
        after = f" after {', '.join(map(str, transfer.after))}" if transfer.after else ""
        print(f"  chunk {transfer.chunk}: rank {transfer.source} {how} rank {transfer.target}{after}")
    report = verify(program)
    print(f"proven: {report.steps} steps, each rank sends {', '.join(f'{sent:g}' for sent in report.sent)} vectors")
    predicted = predict_program(program, cluster, SIZE_BYTES)
    print(f"predicted: {predicted.seconds * 1e3:.3f} ms in {predicted.pieces} pieces")
    simulated = simulate(program, cluster, SIZE_BYTES, pieces=predicted.pieces)
    print(f"simulated: {simulated.seconds * 1e3:.3f} ms, {simulated.events} events")
    print("carried out by real processes:")
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(carry_out, (program.to_json(), f"{folder}/meeting"), nprocs=program.size)


if __name__ == "__main__":
    main()
