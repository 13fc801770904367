"""A Hugging Face Hub on loopback: what its client asks for when it downloads files, and nothing else.

One repository, `kyutai/tiny`, private to whoever has the token, with one commit on `main`.
"""

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REPOSITORY = "kyutai/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_of_this_test"


@dataclass
class Hub:
    """`files` is what the repository holds; `asked` every request, as `METHOD path`."""

    files: Path
    gated: bool = False
    busy: bool = False  # it has no answer for now
    stops_in: str = ""  # the file of which it sends half, and no more until `goes_on` is set
    goes_on: threading.Event = field(default_factory=threading.Event)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def answer(self, path: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a file's path."""
        if self.busy:
            return 429, {}, b""
        repository, _, rest = path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        if repository != REPOSITORY or token != f"Bearer {TOKEN}":
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        if self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if revision not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if not (self.files / name).is_file():
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
        body = (self.files / name).read_bytes()
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        return 200, {"ETag": etag, "X-Repo-Commit": COMMIT}, body


@contextlib.contextmanager
def hub(files: Path) -> Iterator[Hub]:
    """Serves a folder until the end of the block."""
    it = Hub(files)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(send=False)

        def do_GET(self) -> None:
            self._answer(send=True)

        def _answer(self, send: bool) -> None:
            it.asked.append(f"{self.command} {self.path}")
            status, headers, body = it.answer(self.path, self.headers["Authorization"])
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if send and it.stops_in and self.path.endswith(it.stops_in):
                part = len(body) // 2
                self.wfile.write(body[:part])
                self.wfile.flush()
                it.goes_on.wait()
                body = body[part:]
            if send:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    it.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield it
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
