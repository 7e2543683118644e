"""A hub on this computer: serves the files of repositories in a folder with the part of the protocol that is used."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _handler(root: Path) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def log_message(self, format: str, *args: object) -> None:
            """Keep the test output quiet."""

        def _answer(self, with_body: bool) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                self._describe("/".join(parts[2:4]), parts[4:])
            elif len(parts) >= 5 and parts[2] == "resolve":
                self._send_file(root / parts[0] / parts[1] / "/".join(parts[4:]), with_body)
            else:
                self._send(404, b"{}", {})

        def _describe(self, repo: str, rest: list[str]) -> None:
            folder = root / repo
            if not folder.is_dir():
                self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
                return
            names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            if rest[:1] == ["tree"]:
                answer: object = [
                    {"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": "0" * 40}
                    for name in names
                ]
            else:
                answer = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

        def _send_file(self, path: Path, with_body: bool) -> None:
            if not path.is_file():
                self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
                return
            content = path.read_bytes()
            etag = hashlib.sha1(content).hexdigest()
            self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, with_body)

        def _send(self, status: int, content: bytes, headers: dict[str, str], with_body: bool = True) -> None:
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(key, value)
            self.end_headers()
            if with_body and self.command != "HEAD":
                self.wfile.write(content)

    return Handler


@contextmanager
def fake_hub(root: Path) -> Iterator[str]:
    """Serve `root/<org>/<name>/<files>`; yields the endpoint."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(root))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
