"""Figures to and from scripts: 64 bits each, and nothing that cannot be sent."""

import struct

import pytest
from redis import Redis

from accounting.contract.figures import pack_figures, unpack_figures
from tests.contract.store import MAX


def test_figures_are_read_as_they_were_packed() -> None:
    figures = (0, 1, -1, MAX, 2**63 - 1, -(2**63) + 1)
    assert unpack_figures(pack_figures(*figures)) == figures
    assert pack_figures() == b""


def test_redis_reads_and_writes_the_same_figures(redis_url: str) -> None:
    script = "return struct.pack('<i8i8i8', struct.unpack('<I8I8I8', ARGV[1]))"
    with Redis.from_url(redis_url) as client:
        reply = client.eval(script, 0, pack_figures(1, MAX, 1_763_697_375_000_001))
    assert unpack_figures(reply) == (1, MAX, 1_763_697_375_000_001)


@pytest.mark.parametrize("figure", [2**63, 2**64, 10**30, -(10**30)])
def test_what_64_bits_do_not_hold_is_sent_as_what_every_script_refuses(figure: int) -> None:
    assert unpack_figures(pack_figures(7, figure, 8)) == (7, -1, 8)


@pytest.mark.parametrize("length", [1, 7, 9])
def test_half_a_figure_is_refused(length: int) -> None:
    with pytest.raises(struct.error):
        unpack_figures(b"x" * length)
