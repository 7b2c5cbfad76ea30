"""The process of a passive memory node: it registers a region, says where it is, and does nothing ever after.

Run by path, with the bytes as its argument, so that nothing but the standard library is loaded. The region is an
anonymous file (memfd): it has no name that could be left behind, and the kernel frees it when the node and all who
attached to it are gone, however they went.

It prints one line of JSON, the fields of `remote_shared.NodeAddress`. Then it sleeps in a read of its standard input
until that ends, which it does when the process that started the node is gone, even by kill -9; with `--stay` it
sleeps until it is told to end (SIGTERM).
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys

__all__ = ["main"]


def main(arguments: list[str]) -> int:
    """Make a region of `arguments[0]` bytes, print its address, sleep; "--stay" after it: until SIGTERM. The exit code.

    Memory is reserved here, page by page, as a network card would pin it: what is missing is missing now.
    """
    size, stays = int(arguments[0]), "--stay" in arguments
    try:
        descriptor = os.memfd_create("headway-memory-node", os.MFD_CLOEXEC)
        os.posix_fallocate(descriptor, 0, size)
    except (OSError, MemoryError) as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 1
    token = secrets.randbits(62)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the clients; they end, and then so does this
    address = {"pid": os.getpid(), "descriptor": descriptor, "bytes": size, "token": token}
    # The token is the region's last word, which clients do not see: whoever opens another file by this pid notices.
    os.pwrite(descriptor, token.to_bytes(8, "little"), size - 8)
    print(json.dumps(address), flush=True)
    if stays:
        while True:
            signal.pause()
    sys.stdin.buffer.read()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
