"""Devices in the order in which a mesh takes them, looked up once: thousands of plans share a few orders.

A plan names the device of each rank. To hash sixteen thousand names takes longer than to predict a plan, so an order is
known again by the identity of its tuple, and by its content only where that fails.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from headway.hardware.cluster import Cluster

__all__ = ["Order", "Orders"]

_KEPT_IDENTITIES = 1024


class Order(NamedTuple):
    """One order of devices.

    `number`: equal orders have equal ones. `positions`: each rank's device among the cluster's. `kinds`: the names of
    the accelerators, rank by rank; `kind`: the only one, or "" if there are several.
    """

    number: int
    positions: np.ndarray
    kinds: tuple[str, ...]
    kind: str


class Orders:
    """The orders of one cluster's devices that were asked for."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._position = {device.name: position for position, device in enumerate(cluster.devices)}
        self._kinds = [device.accelerator for device in cluster.devices]
        self._by_content: dict[tuple[str, ...], Order] = {}
        self._by_identity: dict[int, tuple[tuple[str, ...], Order]] = {}

    def of(self, devices: tuple[str, ...]) -> Order:
        """The order of these devices, given by name. Raises KeyError for a device that the cluster does not have."""
        known = self._by_identity.get(id(devices))
        if known is not None and known[0] is devices:
            return known[1]
        found = self._by_content.get(devices)
        if found is None:
            found = self._by_content[devices] = self._look_up(devices)
        if len(self._by_identity) >= _KEPT_IDENTITIES:
            self._by_identity.clear()
        self._by_identity[id(devices)] = (devices, found)
        return found

    def _look_up(self, devices: tuple[str, ...]) -> Order:
        positions = np.fromiter(map(self._position.__getitem__, devices), dtype=np.int64, count=len(devices))
        kinds = tuple([self._kinds[position] for position in positions.tolist()])
        different = set(kinds)
        return Order(len(self._by_content), positions, kinds, kinds[0] if len(different) == 1 else "")
