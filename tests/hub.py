"""A local server that speaks the little of the Hugging Face hub's API that a download needs."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """`files` of the one repository. `cut`: the first download of each of these stops halfway."""

    repository: str
    files: dict[str, bytes]
    cut: set[str] = field(default_factory=set)
    kind: str = "datasets"  # or "models"
    url: str = ""
    ranges: list[str] = field(default_factory=list)  # asked for, as `FILE RANGE`
    sent: list[str] = field(default_factory=list)  # files of which bytes were sent


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Run the server; `hub.url` is its HF_ENDPOINT."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    api = f"/api/{hub.kind}/{hub.repository}"
    root = f"/{hub.repository}" if hub.kind == "models" else f"/{hub.kind}/{hub.repository}"
    resolve = f"{root}/resolve/{COMMIT}/"

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def _answer(self, *, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path).replace(
                "/resolve/main/", f"/resolve/{COMMIT}/"
            )
            if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
                names = [{"rfilename": name} for name in hub.files]
                self._json({"id": hub.repository, "sha": COMMIT, "siblings": names})
            elif path == f"{api}/tree/{COMMIT}":
                self._json([_entry(name, data) for name, data in hub.files.items()])
            elif path.startswith(resolve) and path.removeprefix(resolve) in hub.files:
                self._file(path.removeprefix(resolve), with_body=with_body)
            elif path.startswith(resolve):
                self._json({"error": "no"}, 404, "EntryNotFound")
            elif path.startswith((f"{api}/revision/", f"{root}/resolve/")):
                self._json({"error": "no"}, 404, "RevisionNotFound")
            else:
                self._json({"error": "no"}, 404, "RepoNotFound")

        def _json(self, value: object, status: int = 200, error: str = "") -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            if error:
                self.send_header("X-Error-Code", error)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _file(self, name: str, *, with_body: bool) -> None:
            data = hub.files[name]
            start = 0
            if asked := self.headers.get("Range"):
                hub.ranges.append(f"{name} {asked}")
                start = int(asked.removeprefix("bytes=").split("-")[0])
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("ETag", f'"{_sha(data)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            if not with_body:
                return
            hub.sent.append(name)
            if name in hub.cut:
                hub.cut.remove(name)
                self.wfile.write(data[start : len(data) // 2])
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(2)
            else:
                self.wfile.write(data[start:])

    return Handler


def _sha(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _entry(name: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(data), "oid": _sha(data)}
