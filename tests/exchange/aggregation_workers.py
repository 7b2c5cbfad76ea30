"""Real processes that take part in in-network aggregation, for tests: each writes what it saw into a folder.

python aggregation_workers.py CASE PORT RANK WORKERS FOLDER
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import select
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headway.errors import HeadwayError
from headway.exchange.aggregation import AggregationClient

TOKEN = b"open sesame"
SIZES = (0, 1, 700, 2001)


class BadNetwork:
    """Loses, repeats and holds back datagrams in both directions, by a seed."""

    def __init__(self, seed: int, chance: float = 0.2) -> None:
        self.random = random.Random(seed)
        self.chance = chance
        self.held: dict[bool, list[bytes]] = {True: [], False: []}

    def __call__(self, outgoing: bool, datagram: bytes) -> list[bytes]:
        delivered = []
        for _ in range(2 if self.random.random() < self.chance else 1):
            draw = self.random.random()
            if draw < self.chance:
                continue
            if draw < 2 * self.chance:
                self.held[outgoing].append(datagram)
            else:
                delivered.append(datagram)
        held = self.held[outgoing]
        while len(held) > 3 or (held and self.random.random() < 0.3):
            delivered.append(held.pop(self.random.randrange(len(held))))
        self.random.shuffle(delivered)
        return delivered


class Relay(threading.Thread):
    """Stands between a client and the server, with sockets of its own, and lets a bad network have what passes.

    What it lets through may have a bit flipped. So the client needs no `disturb`, and takes its usual path.
    """

    def __init__(self, port: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.network, self.server = BadNetwork(seed), ("127.0.0.1", port)
        self.near, self.far = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
        self.near.bind(("127.0.0.1", 0))
        self.far.connect(self.server)
        self.start()

    def run(self) -> None:
        client: Any = None
        while True:
            for ready in select.select((self.near, self.far), (), ())[0]:
                datagram, source = ready.recvfrom(1 << 16)
                client = source if ready is self.near else client
                for passed in self.network(ready is self.near, datagram):
                    data = bytearray(passed)
                    if self.network.random.random() < 0.02:
                        data[self.network.random.randrange(len(data))] ^= 1 << self.network.random.randrange(8)
                    self.far.send(data) if ready is self.near else self.near.sendto(data, client)


class DiesAfter:
    """Lets so many datagrams out, and dies with the next."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, outgoing: bool, datagram: bytes) -> list[bytes]:
        self.count -= outgoing
        if self.count < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return [datagram]


def vector(rank: int, size: int, seed: int) -> np.ndarray:
    source = np.random.default_rng([rank, size, seed])
    return (source.standard_normal(size) * 10.0 ** source.integers(-20, 20, size)).astype(np.float32)


def sum_of_integers(vectors: list[np.ndarray], width: int, factor: float) -> np.ndarray:
    """What summing with block exponents should give, by another road: a block and a number at a time."""
    bits = 30 - len(vectors).bit_length()
    found = []
    for start in range(0, len(vectors[0]), width):
        blocks = [block[start : start + width] for block in vectors]
        largest = max(abs(float(x)) for block in blocks for x in block)
        exponent = max(math.frexp(largest)[1], -125) if largest else 0
        for column in zip(*blocks, strict=True):
            total = sum(round(math.ldexp(float(x), bits - exponent)) for x in column)
            found.append(np.float32(math.ldexp(total, exponent - bits) * factor))
    return np.array(found, dtype=np.float32)


def everything(client: AggregationClient, rank: int, workers: int) -> dict:
    """All ways, types and sizes; what is wrong, and a digest of all results."""
    wrong, digest = [], hashlib.sha256()
    order = torch.zeros(workers, dtype=torch.int32)
    order[client.number] = rank
    client.all_reduce(order)
    ranks = order.tolist()
    width = client.payload_bytes // 4
    for seed, size in enumerate(SIZES):
        vectors = [vector(each, size, seed) for each in ranks]
        mine = vectors[client.number]
        for operation in ("sum", "average"):
            factor = 1.0 if operation == "sum" else 1.0 / workers
            for how in ("integer", "ordered"):
                tensor = torch.from_numpy(mine.copy())
                outcome = client.all_reduce(tensor, operation=operation, how=how)
                if how == "integer":
                    right = sum_of_integers(vectors, width, factor)
                else:
                    right = vectors[0].copy()
                    for other in vectors[1:]:
                        right += other
                    if operation == "average":
                        right /= np.float32(workers)
                if tensor.numpy().tobytes() != right.tobytes() or outcome != (workers, workers, False, False):
                    wrong.append([operation, how, size, list(outcome)])
                digest.update(tensor.numpy().tobytes())
        whole = torch.from_numpy((mine.view(np.int32) >> 3).copy())
        client.all_reduce(whole)
        right = np.sum([(other.view(np.int32) >> 3).astype(np.int64) for other in vectors], axis=0)
        if whole.tolist() != right.tolist():
            wrong.append(["int32", size])
        digest.update(whole.numpy().tobytes())
    return {"wrong": wrong, "digest": digest.hexdigest(), "asked": client.machine.asked}


def main(case: str, port: int, rank: int, workers: int, folder: Path) -> None:
    torch.set_num_threads(1)
    is_bad = case in ("bad_network", "bad_relays")
    network = BadNetwork(rank) if is_bad and (case == "bad_network" or rank == 0) else None
    if case == "bad_relays" and rank:
        port = Relay(port, rank).near.getsockname()[1]
    found: dict = {}
    try:
        client = AggregationClient(
            ("127.0.0.1", port), job=3, workers=workers, token=TOKEN, disturb=network,
            payload_bytes=512 if is_bad else 65_000, patience_seconds=0.002,
            timeout_seconds=60.0,
        )  # fmt: skip
        with client:
            found["number"] = client.number
            if is_bad:
                found |= everything(client, rank, workers)
            else:
                tensor = torch.ones(200_000)
                client.all_reduce(tensor)
                (folder / f"ready{rank}").touch()
                client.machine.timeout_seconds = 5.0 if case == "killed" else 60.0
                if case == "killed" and rank == 1:
                    (folder / "number").write_text(str(client.number))
                    client._disturb = DiesAfter(2)
                while True:
                    client.all_reduce(tensor)
    except HeadwayError as error:
        found |= {"error": type(error).__name__, "message": error.message}
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
