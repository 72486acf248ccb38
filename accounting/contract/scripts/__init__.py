"""The Lua scripts: one verb each, loaded by name, called by digest.

Each file's header states KEYS, ARGV, reply and invariant. `SCRIPTS["lease"].digest` is what
EVALSHA takes; `load_all` puts every script into a Redis.
"""

import hashlib
from importlib import resources
from typing import Any, NamedTuple


class Script(NamedTuple):
    name: str
    source: str
    digest: str


def _read() -> dict[str, Script]:
    found = {}
    for entry in resources.files(__package__).iterdir():
        if entry.name.endswith(".lua"):
            source = entry.read_text("utf-8")
            name = entry.name.removesuffix(".lua")
            digest = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()
            found[name] = Script(name, source, digest)
    return found


SCRIPTS = _read()


async def load_all(redis: Any) -> None:
    """SCRIPT LOAD every script through a redis.asyncio client."""
    for script in SCRIPTS.values():
        await redis.script_load(script.source)


async def call(redis: Any, name: str, keys: list[str], arguments: list[Any]) -> Any:
    """Run a script by name through a redis.asyncio client, loading it where Redis lost it."""
    from redis.exceptions import NoScriptError

    script = SCRIPTS[name]
    try:
        return await redis.evalsha(script.digest, len(keys), *keys, *arguments)
    except NoScriptError:
        return await redis.eval(script.source, len(keys), *keys, *arguments)
