"""Calls between processes: what was refused is said to the caller, and so is a server that is gone."""

from __future__ import annotations

import threading

import pytest

from headway.errors import InputError, RunError
from headway.memory.remote import Blocking, Call
from headway.memory.remote_calls import CallClient, CallServer
from headway.memory.remote_shared import SharedVerbs, is_supported

pytestmark = pytest.mark.skipif(not is_supported(), reason="abstract sockets need Linux")


def handle(client, request):
    if request[0] == "long":
        return bytes(1 << 22)
    if request[0] == "bad":
        raise InputError("a bad request", remedy="ask better")
    return [*request, "answered"]
    yield


@pytest.fixture(scope="module")
def address():
    server = CallServer(SharedVerbs([]), handle)
    threading.Thread(target=server.serve_for_ever, daemon=True).start()
    return server.address


def test_requests_are_answered_and_refusals_reach_the_caller(address):
    calls = CallClient({"server": address})

    def program(*request):
        return (yield Call("server", request))

    runner = Blocking(SharedVerbs([]), calls)
    assert runner.carry_out(program("read", 5, b"\0")) == ["read", 5, b"\0", "answered"]
    with pytest.raises(InputError, match="a bad request"):
        runner.carry_out(program("bad"))
    assert runner.carry_out(program("read")) == ["read", "answered"]
    calls.close()


def test_what_is_larger_than_a_packet_is_refused_on_both_ways_and_the_connection_stays(address):
    calls = CallClient({"server": address})
    with pytest.raises(InputError, match="request of 41943"):
        calls("server", (bytes(1 << 22),))
    with pytest.raises(InputError, match="reply of 41943"):
        calls("server", ("long",))
    assert calls("server", (1,)) == [1, "answered"]
    calls.close()


def test_a_client_that_leaves_does_not_disturb_the_others(address):
    first, second = CallClient({"server": address}), CallClient({"server": address})
    assert first("server", (1,)) == [1, "answered"]
    assert second("server", (2,)) == [2, "answered"]
    first.close()
    assert second("server", (3,)) == [3, "answered"]
    second.close()


def test_a_server_that_is_unknown_or_gone_is_named():
    with pytest.raises(InputError, match="metadata"):
        CallClient({})("metadata", ())
    calls = CallClient({"metadata": "headway-calls-nobody"})
    with pytest.raises(RunError, match="metadata"):
        calls("metadata", ())
    calls.close()
