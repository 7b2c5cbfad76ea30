"""One tiered store (device, host, remote, disk), and what stands on it: optimizers, tiles, swapping, remote memory."""
