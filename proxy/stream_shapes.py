"""[7] A streamed chunk, in the shapes it is decoded to."""

from typing import Any

from msgspec import Raw, Struct


class Chunk(Struct):
    """What is read of a chunk; any field may hold anything."""

    id: Any = None
    created: Any = None
    model: Any = None
    choices: Raw = Raw()
    usage: Raw = Raw()
    error: Raw = Raw()


class Choice(Struct):
    """One of its choices."""

    delta: Raw = Raw()


class Delta(Struct):
    """What a choice adds."""

    content: Any = None


class ChunkError(Struct):
    """What a provider says of a failure within its answer."""

    message: str | None = None
