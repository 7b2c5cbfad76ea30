"""Orders of devices: known again by identity, and by content."""

from __future__ import annotations

import pytest

from headway.predict import orders
from headway.predict.orders import Orders


def test_equal_orders_have_one_number_and_others_another(make):
    known = Orders(make.cluster(2, 2))
    names = tuple(device.name for device in known.cluster.devices)
    again = tuple(iter(names))
    assert known.of(names) is known.of(names)
    assert known.of(again) is known.of(names)
    backwards = known.of(names[::-1])
    assert backwards.number != known.of(names).number
    assert backwards.positions.tolist() == [3, 2, 1, 0]


def test_the_kind_is_named_where_there_is_only_one(make):
    fast, slow = make.accelerator(name="fast"), make.accelerator(name="slow")
    cluster = make.cluster(1, 4, accelerators=(fast, slow))
    names = tuple(device.name for device in cluster.devices)
    known = Orders(cluster)
    assert (known.of(names).kind, known.of(names).kinds) == ("", ("fast", "slow", "fast", "slow"))
    assert known.of(names[::2]).kind == "fast"


def test_what_is_known_by_identity_is_bounded_and_right_after_it_was_forgotten(make, monkeypatch):
    monkeypatch.setattr(orders, "_KEPT_IDENTITIES", 4)
    known = Orders(make.cluster(1, 4))
    names = tuple(device.name for device in known.cluster.devices)
    first = known.of(names)
    for _ in range(20):
        known.of(tuple(iter(names[:2])))
        assert len(known._by_identity) <= 4
    assert known.of(names) is first


def test_a_device_that_is_not_there_is_an_error(make):
    with pytest.raises(KeyError):
        Orders(make.cluster(1, 2)).of(("nobody",))
