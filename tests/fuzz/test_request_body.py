"""Bodies of any JSON: refused, or read as Python's json reads both them and what goes upstream."""

import json
from typing import Any

from hypothesis import event, example, given
from hypothesis import strategies as st
from msgspec import Raw

from accounting.contract.errors import Failure
from proxy.request_head import body_for, input_bound, output_bound, parse
from tests.fuzz.effort import search

CONTEXT, MODEL_MAX = 100_000, 4_096
FIGURES = ("stream", "max_tokens", "max_completion_tokens", "n", "modalities", "service_tier")

_any = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.integers(-2, 200),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=6),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
_counts = st.integers(1, 200) | st.sampled_from([1e2, 5.0, None])
_tools = st.lists(
    st.fixed_dictionaries({}, optional={"type": st.sampled_from(["function", "custom", None])}),
    max_size=2,
)
_options = st.fixed_dictionaries(
    {}, optional={"include_usage": st.sampled_from([True, False, None]), "x": _any}
)
_USUAL: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(["m", "ü", "gpt-4o"]),
    "messages": st.lists(_any, max_size=2),
    "stream": st.sampled_from([True, True, False, None]),
    "stream_options": _options | st.none(),
    "max_tokens": _counts,
    "max_completion_tokens": _counts,
    "n": st.integers(1, 128) | st.none(),
    "modalities": st.lists(st.sampled_from(["text", "audio"]), max_size=2),
    "service_tier": st.sampled_from(["auto", "default", "flex", None]),
    "tools": _tools,
    "web_search_options": st.sampled_from([None, False]),
    "best_of": st.sampled_from([None, False]),
    "": _any,
    "fields": _any,
    "temperature": _any,
}
_ODD = st.one_of(
    _any, st.sampled_from([0, -1, 1.5, "5", True, 10**30, 1e300, "priority", [{"type": "x"}], {}])
)
_LOOK_ALIKES = ["Max_Tokens", "maX_toKens", "Model", "STREAM", "plugins"]
_space = st.sampled_from(["", "", "", " ", "\n\t", "\r\n"])


@st.composite
def _texts(draw: st.DrawFn, value: object) -> str:
    """A value as JSON, its characters escaped or not."""
    text = json.dumps(value, ensure_ascii=draw(st.booleans()))
    return text.replace("model", "\\u006dodel") if draw(st.integers(0, 9)) == 0 else text


@st.composite
def _bodies(draw: st.DrawFn) -> bytes:
    """An object of our fields, in any order, some of them twice; seldom anything else."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=40) | _any.map(lambda value: json.dumps(value).encode()))
    names = ["model", "messages", *draw(st.lists(st.sampled_from(sorted(_USUAL)), max_size=6))]
    names += [draw(st.sampled_from(_LOOK_ALIKES))] if draw(st.integers(0, 19)) == 0 else []
    members = []
    for name in draw(st.permutations(names)):
        usual = name in _USUAL and draw(st.integers(0, 19))
        value = draw(_USUAL[name] if usual else _ODD)
        gap = draw(_space)
        members.append(f"{gap}{draw(_texts(name))}{gap}:{gap}{draw(_texts(value))}{gap}")
    body = "{" + ",".join(members) + "}"
    at = draw(st.integers(0, len(body)))
    if draw(st.integers(0, 9)) == 0:
        junk = ["", "}", '"', "NaN", "\\ud800", ",", "\0", "//", "0", "'"]
        body = body[:at] + draw(st.sampled_from(junk)) + body[at + 1 :]
    return body.encode("utf-8", "surrogatepass")


def strict(text: bytes) -> Any:
    """Python's reading; the last of a name that comes twice counts, as for most. No NaN."""
    return json.loads(text.decode(), parse_constant=_no_number)


def _no_number(name: str) -> object:
    raise ValueError(name)


@search(250)
@given(_bodies())
@example(b'{"model":"a","messages":[],"n":1,"n":128,"max_tokens":5,"max_tokens":7}')
@example(b'{"model":"a","messages":[],"stream":true,"stream_options":{"include_usage":false}}')
def test_a_body_is_refused_or_read_as_it_is_sent(body: bytes) -> None:
    try:
        head = parse(body)
        bound = input_bound(body, head, CONTEXT)
    except Failure as failure:
        event(type(failure).__name__)
        assert failure.status == 400 and json.loads(failure.body())["error"]["code"]
        return
    event("read")
    sent = body_for(head, Raw(b'"at-the-provider"'))
    theirs, upstream = strict(body), strict(sent)

    assert head.model == theirs["model"] and upstream["model"] == "at-the-provider"
    assert len(json.loads(sent, object_pairs_hook=list)) == len(upstream), "a name twice"
    for name in FIGURES:
        read = getattr(head, name)
        assert read == theirs.get(name) == upstream.get(name), name
        assert type(read) is not bool or theirs[name] is read
    if head.stream:
        assert upstream["stream_options"]["include_usage"] is True
        asked = theirs.get("stream_options") or {}
        assert head.wants_usage is (asked.get("include_usage") is True)
        assert upstream["stream_options"] == asked | {"include_usage": True}
    rest = theirs.keys() - {"model", "stream_options"}
    assert rest == upstream.keys() - {"model", "stream_options"}
    assert all(upstream[name] == theirs[name] for name in rest)

    asked = max(theirs.get("max_tokens") or 0, theirs.get("max_completion_tokens") or 0)
    ceiling = min(asked or MODEL_MAX, MODEL_MAX)
    assert output_bound(head, MODEL_MAX) == ceiling * (theirs.get("n") or 1)
    assert bound == CONTEXT or bound >= len(body)
    assert theirs.get("service_tier") in (None, "auto", "default", "flex")
    assert not theirs.get("web_search_options") and not theirs.get("best_of")
    kinds = [tool.get("type") for tool in theirs.get("tools") or ()]
    assert all(kind in (None, "function", "custom") for kind in kinds)
    ours = {"max_tokens", "model", "messages", "stream", "n"}
    assert not {name for name in theirs if name.lower() in ours and name not in ours}
