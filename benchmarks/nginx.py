"""nginx as a plain proxy before the stand-in: the baseline of every comparison.

Owns its configuration and start. Leaves processes to `processes`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from benchmarks import kernel
from benchmarks.processes import Running, free_port, running, until_answering

NGINX_CONFIG = """\
worker_processes {workers};
worker_rlimit_nofile {files};
pid {folder}/nginx.pid;
error_log {folder}/error.log error;
events {{ worker_connections {connections}; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  keepalive_requests 1000000;
  client_max_body_size 64m;
  client_body_buffer_size 2m;
  upstream provider {{
    server {upstream};
    keepalive 1024;
    keepalive_requests 1000000;
  }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://provider;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_read_timeout 300s;
    }}
  }}
}}
"""


def nginx_path() -> str | None:
    """Where nginx is; also where systems keep it off an ordinary user's path."""
    return shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


@contextlib.asynccontextmanager
async def start_nginx(
    upstream: str, core: int | None, workers: int = 1
) -> AsyncIterator[tuple[Running, str]]:
    """nginx as a plain keep-alive proxy to `upstream` (host:port).

    Gives the process and its base URL ending in /v1.
    """
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="benchmark-nginx-") as folder:
        config = write_nginx_config(Path(folder), upstream, port, workers)
        command = [nginx_path() or "nginx", "-c", str(config), "-g", "daemon off;"]
        async with running(command, core) as started:
            await until_answering(started, f"http://127.0.0.1:{port}/v1/models", 10.0)
            kernel.pin_tree([started.pid], core)
            yield started, f"http://127.0.0.1:{port}/v1"


def write_nginx_config(folder: Path, upstream: str, port: int, workers: int = 1) -> Path:
    """The configuration file, in a folder that nginx's own user may enter."""
    config = folder / "nginx.conf"
    files = kernel.raise_open_files()
    # With few connections left nginx closes those that have not asked yet: let there be more
    # than it can open files.
    text = NGINX_CONFIG.format(
        folder=folder,
        upstream=upstream,
        port=port,
        files=files,
        connections=2 * files,
        workers=workers,
    )
    config.write_text(text)
    folder.chmod(0o755)
    return config
