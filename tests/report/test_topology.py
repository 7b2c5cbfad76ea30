"""The picture of a cluster with the load of its links: everything that is used is in it, and nothing is hidden."""

from __future__ import annotations

import itertools
import math
import xml.etree.ElementTree as ElementTree

import pytest

from headway.errors import InputError
from headway.hardware.catalog import preset
from headway.report.topology import MOST_DEVICES, _places, topology_figure, write_topology


def routes(cluster, devices):
    """Every link on the way from each device to the next, in a circle, half busy."""
    busy = {}
    for source, target in itertools.pairwise((*devices, devices[0])):
        for link in cluster.route(source, target):
            busy[cluster.links[link].source, cluster.links[link].target] = 0.5
    return busy


@pytest.mark.parametrize("name", ["dgx-1v", "dgx-a100", "dgx-a100:2", "dgx-h100:4", "dgx-a100:1+dgx-1v:1", "mi300x-8"])
def test_no_two_things_are_drawn_on_each_other(name):
    cluster = preset(name)
    devices = [device.name for device in cluster.devices]
    busy = routes(cluster, devices)
    place = _places(cluster, devices, set(devices) | {end for link in busy for end in link})
    assert set(place) >= set(devices)
    for (one, at), (other, there) in itertools.combinations(place.items(), 2):
        assert math.dist(at, there) > 0.3, (one, other)


def test_the_picture_names_ranks_devices_switches_and_title(tmp_path):
    cluster = preset("dgx-1v")
    devices = ["node0/gpu3", "node0/gpu4"]  # joined only by PCIe and the CPUs
    path = write_topology(tmp_path / "x.svg", cluster, devices, routes(cluster, devices), title="a <title> & $more$")
    text = "".join(ElementTree.parse(path).getroot().itertext())
    for word in ("gpu3", "gpu4", "root0", "root1", "a <title> & ", "idle to always busy"):
        assert word in text
    assert "gpu7" not in text


def test_a_busy_link_is_wider_than_an_idle_one():
    cluster = preset("dgx-a100")
    devices = [device.name for device in cluster.devices]
    busy = {("node0/gpu0", "node0/nvswitch"): 1.0, ("node0/gpu1", "node0/nvswitch"): 0.1}
    figure = topology_figure(cluster, devices, busy)
    widths = sorted(patch.get_linewidth() for patch in figure.axes[0].patches if hasattr(patch, "get_arrowstyle"))
    assert widths[-1] > 2 * widths[-2]


def test_too_many_devices_and_other_files_are_refused(tmp_path):
    cluster = preset("dgx-a100:16")
    devices = [device.name for device in cluster.devices]
    assert len(devices) > MOST_DEVICES
    with pytest.raises(InputError, match="too many to draw"):
        topology_figure(cluster, devices, {})
    with pytest.raises(InputError, match="no kind of picture"):
        write_topology(tmp_path / "x.pdf", cluster, devices[:2], {})
