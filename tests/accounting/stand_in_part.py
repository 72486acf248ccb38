"""A small program in the place of a part of `tollgate up`: answers, obeys signals, or misbehaves.

    python stand_in_part.py ROLE [BEHAVIOUR]

Roles: migrate, sandbox, accounting, admin_api, proxy. Behaviours: `fails` says why and exits
with 3; `dies` serves and then exits with 4 once told to (a file `die` in the data directory);
`stubborn` ignores the request to stop. Each stop is noted in `stops` in the data directory.
"""

import json
import os
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

DATA = Path(os.environ["TOLLGATE_DATA_DIR"])
ROLE = sys.argv[1]
BEHAVIOUR = sys.argv[2] if len(sys.argv) > 2 else ""


class Answers(BaseHTTPRequestHandler):
    """Probes answer 200; the operator API keeps what it was asked in `calls`."""

    def do_GET(self) -> None:
        known = self.path in ("/healthz", "/readyz") or self._note()
        if self.path == "/v1/account/whoami" and "inf_revoked" in self.headers["Authorization"]:
            self._send(401, {})
        else:
            self._send(200 if known else 404, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._note(body)
        if self.path.endswith("/keys"):
            self._send(201, {"key_id": "key_1", "key_secret": f"inf_{os.urandom(4).hex()}"})
        elif self.path.endswith("/grants"):
            self._send(201, {})
        else:
            self._send(201, {"workspace_id": "ws_1"})

    def _note(self, body: object = None) -> bool:
        with open(DATA / "calls", "a") as calls:
            calls.write(json.dumps([self.command, self.path, body]) + "\n")
        return True

    def _send(self, status: int, answer: object) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: the log is for what went wrong."""


def main() -> None:
    if BEHAVIOUR == "fails":
        sys.exit(f"tollgate: {ROLE} cannot work like this")
    if ROLE == "migrate":
        return
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: BEHAVIOUR == "stubborn" or stopped.set())
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    listens = {"admin_api": "TOLLGATE_ADMIN_LISTEN", "proxy": "TOLLGATE_PRIVATE_LISTEN"}
    if ROLE in listens:
        host, _, port = os.environ[listens[ROLE]].rpartition(":")
        server = ThreadingHTTPServer((host, int(port)), Answers)
        threading.Thread(target=server.serve_forever, daemon=True).start()
    while not stopped.wait(0.02):
        if BEHAVIOUR == "dies" and (DATA / "die").exists():
            sys.stderr.write("something broke\n")
            os._exit(4)
    with open(DATA / "stops", "a") as stops:
        stops.write(ROLE + "\n")


if __name__ == "__main__":
    main()
