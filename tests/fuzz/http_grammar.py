"""Request streams by grammar: valid ones, and valid ones with something done to them."""

from hypothesis import strategies as st


def listed(text: str) -> list[bytes]:
    """What stands between the bars and line ends of a text; `\\a` in it is an LF."""
    words = [word for line in text.split("\n    ") for word in line.split("|")]
    return [word.replace("\a", "\n").encode("latin-1") for word in words]


CHAT = b"/v1/chat/completions"
_TOKEN = st.text("abcdefXYZ-_0159!~", min_size=1, max_size=8).map(str.encode)
_VALUE = st.text('abc XYZ\t,;=:"\\/()ü', max_size=20).map(lambda text: text.encode("latin-1"))
_BODY = st.one_of(
    st.binary(max_size=60), st.just(b"POST /x HTTP/1.1\r\n\r\n"), st.just(b"0\r\n\r\n")
)
_TARGETS = st.sampled_from(
    [CHAT] * 6
    + [CHAT + b"?a=b", b"http://host" + CHAT, b"https://h:1" + CHAT + b"?/x", b"/v1/models"]
)
_OTHER_FIELDS = st.lists(
    st.one_of(
        st.tuples(_TOKEN, _VALUE).map(lambda pair: b": ".join(pair)),
        st.sampled_from(
            listed(
                """Connection: close|Connection: keep-alive|Connection: x, close
    Expect:100-continue|Accept:*/*|Accept: \t a \t|Cookie: a=b|Cookie: c=d"""
            )
        ),
    ),
    max_size=3,
    unique_by=lambda line: line.split(b":")[0].lower(),
)
_SIZE_FORMS = st.sampled_from([b"%x", b"%X", b"00%x", b"%x;a=b", b'%x; a="b;c"', b"%x \t;a"])


@st.composite
def _framed(draw: st.DrawFn, old: bool) -> tuple[list[bytes], bytes]:
    """Header lines and the bytes of one body."""
    body = draw(_BODY)
    if old or draw(st.booleans()):
        spaces = draw(st.sampled_from([b"", b" ", b"\t "]))
        return [b"Content-Length:%b%d%b" % (spaces, len(body), spaces)], body
    pieces, at = [], 0
    while at < len(body):
        size = draw(st.integers(1, 30))
        chunk = body[at : at + size]
        pieces.append(draw(_SIZE_FORMS) % len(chunk) + b"\r\n" + chunk + b"\r\n")
        at += size
    trailers = draw(st.sampled_from([b"", b"Digest: x\r\n", b"a:\r\nb: c\r\n"]))
    name = draw(st.sampled_from([b"Transfer-Encoding: chunked", b"transfer-encoding:Chunked "]))
    return [name], b"".join(pieces) + b"0\r\n" + trailers + b"\r\n"


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """One valid request."""
    old = draw(st.sampled_from([False] * 9 + [True]))
    framing, body = draw(_framed(old))
    lines = [b"Host: x", *framing, *draw(_OTHER_FIELDS)]
    start = b"POST %b HTTP/1.%d" % (draw(_TARGETS), not old)
    before = draw(st.sampled_from([b""] * 5 + [b"\r\n"]))
    return before + b"\r\n".join([start, *draw(st.permutations(lines))]) + b"\r\n\r\n" + body


_LINES = """Content-Length: 5|Content-Length: 0|Content-Length: +3|Content-Length: 3, 3
    Content-Length : 4|Content-Length: 0x4|Content-Length: 999999999999999999999
    Content-Length: 2000|Content-Length:|Content-Length: \x0e4|Content_Length: 4
    Transfer-Encoding: chunked|Transfer-Encoding: \x0echunked|Transfer-Encoding: identity
    Transfer-Encoding: gzip, chunked|Transfer-Encoding: chunked, identity
    Transfer-Encoding : chunked|Transfer-Encoding:\r\a chunked|X: y\r\a folded|X|: x
    Upgrade: h2c|Connection: Upgrade\r\aUpgrade: websocket|Expect: x|Host: y
    0\r\a|5|ffffffffffffffff|-1|0x5"""
_PARTS = """HTTP/1.1|HTTP/1.0|HTTP/2.0|RTSP/1.0|GET |PRI * |\a|\r|\r\a|\r\a\r\a|\a\a|\a\r\a
    \0| |\t|:|;|\x7f|#|%|\xff|_"""
_LONG = [b"X: " + b"a" * 1100 + b"\r\n", b";" + b"e" * 4200, b"a" * 1030]
_WORDS = st.sampled_from([line + b"\r\n" for line in listed(_LINES)] + listed(_PARTS) + _LONG)


@st.composite
def repeats(draw: st.DrawFn) -> list[bytes]:
    """Valid requests whose heads are the same but for the length, as one client writes them."""
    spaces, others = draw(st.sampled_from([b"", b" ", b"\t "])), draw(_OTHER_FIELDS)
    name = draw(st.sampled_from([b"Content-Length", b"content-length", b"CONTENT-LENGTH"]))
    place = draw(st.integers(0, len(others)))
    found = []
    for body in draw(st.lists(_BODY, min_size=2, max_size=4)):
        length = name + b":" + spaces + b"%d" % len(body) + spaces
        lines = [b"POST %b HTTP/1.1" % CHAT, b"Host: x", *others[:place], length, *others[place:]]
        found.append(b"\r\n".join(lines) + b"\r\n\r\n" + body)
    return found


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Pipelined requests with a word put in, bytes taken out, doubled or changed."""
    data = b"".join(draw(st.lists(requests(), min_size=1, max_size=3) | repeats()))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        if draw(st.booleans()):  # at the start of a line
            at = data.rfind(b"\r\n", 0, at) + 2 if b"\r\n" in data[:at] else at
        end = draw(st.integers(at, min(len(data), at + 12)))
        what = draw(st.integers(0, 3))
        middle = draw(_WORDS) if what < 2 else b"" if what == 2 else data[at:end] * 2
        data = data[:at] + middle + data[at if what == 0 else end :]
    return data


RAW = st.lists(
    st.one_of(
        _WORDS,
        st.binary(max_size=12),
        st.sampled_from([b"POST ", CHAT, b" HTTP/1.1\r\n", b"Host: x\r\n", b"a: b\r\n", b"hello"]),
    ),
    max_size=16,
).map(b"".join)

CUTS = st.lists(st.integers(0, 10_000), max_size=8)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """`data` in pieces; every place is taken modulo its length."""
    ends = sorted({place % (len(data) + 1) for place in places} | {len(data)})
    return [data[a:b] for a, b in zip([0, *ends], ends, strict=False) if a < b]
