"""MLflow servers for tests, and proxies before them: with a password, a prefix, TLS, or slow answers."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self


class Server:
    """`mlflow server` on loopback, to be stopped and started."""

    def __init__(self, folder: Path, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder = folder
        self.uri = f"http://127.0.0.1:{self.port}"
        self.options = options or ("--serve-artifacts", "--artifacts-destination", str(folder / "artifacts"))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db", *self.options]
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # half a dozen processes less
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        end = time.monotonic() + 240
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                assert time.monotonic() < end, (self.folder / "server.log").read_text()[-2000:]
                time.sleep(0.5)

    def signal(self, number: int) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def stop(self) -> None:
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Proxy:
    """A reverse proxy before a server, in threads of this process."""

    def __init__(self, port: int, *, user: str = "", prefix: str = "", cert: Path | None = None) -> None:
        """`user` is "name:password"; `cert` a PEM file with certificate and key."""
        wanted = f"Basic {base64.b64encode(user.encode()).decode()}" if user else None
        self.held: dict[str, float] = {}  # seconds for which the first create of a run of that ram.kind is held
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None: ...

            def answer(self, code: int, body: bytes, kind: str = "text/plain") -> None:
                self.close_connection = True
                with contextlib.suppress(OSError):  # the client has left
                    self.send_response(code)
                    self.send_header("Connection", "close")
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if wanted and self.headers.get("Authorization") != wanted:
                    return self.answer(401, b"You are not authenticated.")
                if not self.path.startswith(prefix):
                    return self.answer(404, b"no such site")
                if self.path.endswith("runs/create"):
                    tags = {tag["key"]: tag["value"] for tag in json.loads(body)["tags"]}
                    time.sleep(proxy.held.pop(tags["ram.kind"], 0.0))
                back = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                hop = ("host", "authorization", "connection")
                headers = {k: v for k, v in self.headers.items() if k.lower() not in hop}
                back.request(self.command, self.path.removeprefix(prefix), body, headers)
                got = back.getresponse()
                self.answer(got.status, got.read(), got.getheader("Content-Type") or "text/plain")
                back.close()

            do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = forward

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False  # so that closing waits for requests that are held
        if cert is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(cert)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        self.address = f"127.0.0.1:{self.port}{prefix}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
