"""The wire format of in-network aggregation: what goes in comes out, and nothing that was changed does."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from headway.collective.packets import (
    HEADER_BYTES,
    LARGEST_PAYLOAD_BYTES,
    Kind,
    Operation,
    Packet,
    decode,
    encode,
    encode_header,
    payload_checksum,
)

packets = st.builds(
    Packet,
    kind=st.sampled_from(Kind),
    job=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 2**32 - 1),
    worker=st.integers(0, 2**16 - 1),
    segment=st.integers(0, 2**64 - 1),
    round_end=st.integers(0, 2**64 - 1),
    count=st.integers(0, 2**32 - 1),
    operation=st.sampled_from(Operation),
    partial=st.booleans(),
    overflow=st.booleans(),
    payload=st.binary(max_size=100),
)


def same(one: Packet, other: Packet) -> bool:
    return one._replace(payload=bytes(one.payload)) == other._replace(payload=bytes(other.payload))


@settings(deadline=None)
@given(packets)
def test_what_is_encoded_is_decoded(packet):
    data = encode(packet)
    found = decode(data)
    assert found is not None
    assert same(found, packet)
    assert data == encode_header(packet, payload_checksum(packet.payload)) + packet.payload


@settings(deadline=None, max_examples=300)
@given(packets, st.data())
def test_a_packet_with_flipped_bits_is_refused(packet, data):
    wire = bytearray(encode(packet))
    for _ in range(data.draw(st.integers(1, 3))):
        wire[data.draw(st.integers(0, len(wire) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert decode(bytes(wire)) is None or bytes(wire) == encode(packet)


@settings(deadline=None)
@given(st.binary(min_size=32, max_size=200), st.data())
def test_swapped_words_and_a_cut_or_longer_payload_are_refused(payload, data):
    packet = Packet(Kind.DATA, 1, payload=payload)
    wire = encode(packet)
    one, other = (8 * data.draw(st.integers(0, len(payload) // 8 - 1)) for _ in range(2))
    words = bytearray(payload)
    words[one : one + 8], words[other : other + 8] = payload[other : other + 8], payload[one : one + 8]
    if bytes(words) != payload:
        assert decode(wire[:HEADER_BYTES] + bytes(words)) is None
    assert decode(wire[:-1]) is None
    assert decode(wire + b"\0") is None


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=300))
def test_noise_is_no_packet(noise):
    assert decode(noise) is None


def test_the_largest_payload_makes_the_largest_datagram():
    assert 65_507 - 8 < len(encode(Packet(Kind.DATA, 1, payload=bytes(LARGEST_PAYLOAD_BYTES)))) <= 65_507
