"""Every hot step runs, does what its name says, and has a figure."""

from benchmarks import micro
from benchmarks.micro_upstream import Reader, upstream_calls


async def test_every_step_has_a_cost(tmp_path):
    found = await micro.run(repeats=2, seconds=0.0005)
    assert len({step.name for step in found}) == len(found) > 15
    assert all(0 < step.least_us <= step.median_us for step in found)
    assert micro.table(found).count("\n") == len(found) + 1


async def test_the_scanner_takes_usage_null_out(tmp_path):
    chunk = micro.chunk_bytes(usage_null=False)
    assert b'"usage":null' in micro.chunk_bytes(usage_null=True)
    with micro.steps(tmp_path) as found:
        calls = {step.name: step.call for step in found}
        assert calls["scan chunk"]() == chunk
        assert calls["scan chunk with usage:null"]() == chunk


async def test_whole_answers_and_single_chunks_are_read():
    reader = Reader()
    with upstream_calls(b"{}", b"data: x\n\n", reader) as (answer, chunk):
        assert (reader.heads, reader.ends) == (1, 0)
        answer()
        answer()
        chunk()
    assert (reader.heads, reader.ends, reader.body_bytes) == (3, 2, 2 + 2 + 9)


async def test_an_admission_from_the_lease_sends_nothing(tmp_path):
    pipe, told = micro.NoPipe(), []
    steps = micro.key_and_lease_steps(micro.Typical(), pipe)
    pipe.send = lambda packed, on_reply: told.append(packed)
    (local,) = (step for step in steps if step.name == "lease: admit locally")
    (remote,) = (step for step in steps if step.name == "lease: encode a call")
    local.call()
    assert told == []
    remote.call()
    assert len(told) == 1


def test_a_timed_step_is_divided_by_how_many_it_does():
    calls = []
    one = micro.timed(micro.Step("x", lambda: calls.append(1) or sum(range(200))), 3, 0.002)
    ten = micro.timed(micro.Step("x", lambda: sum(range(200)), 1000), 3, 0.002)
    assert len(calls) > 3
    assert ten.least_us < one.least_us
