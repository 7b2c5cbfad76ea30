"""A process that replays a graph over and over, so that another one measures under the load of a real run.

`python -m headway.predict.crowd` reads its request from stdin: eight bytes of length, little-endian, then a
`CrowdRequest` as JSON. It writes one byte when it is at work, and works until it is killed or its parent has ended.
"""

from __future__ import annotations

import os
import sys

import msgspec
import torch

from headway.hardware.host import keep_freed_memory
from headway.predict.profile import CrowdRequest
from headway.predict.replay import Replay

__all__ = ["main"]


def main() -> None:
    """Replay what stdin asks for until the parent process ends."""
    parent = os.getppid()
    keep_freed_memory()
    size = int.from_bytes(sys.stdin.buffer.read(8), "little")
    request = msgspec.json.decode(sys.stdin.buffer.read(size), type=CrowdRequest)
    if request.threads:
        torch.set_num_threads(request.threads)
    replay = Replay(request.graph, request.samples, request.degree, request.precision, "cpu")
    replay.run()
    sys.stdout.buffer.write(b".")
    sys.stdout.buffer.flush()
    while os.getppid() == parent:
        replay.run()


if __name__ == "__main__":
    main()
