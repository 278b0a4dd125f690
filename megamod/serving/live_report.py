"""The page about runs over HTTP: drawn anew whenever a file that it is made of has changed."""

import json
import signal
import socket
import threading
from collections.abc import Sequence
from hashlib import sha256
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from megamod.errors import UserError
from megamod.evaluation.run_report import format_run_report, list_report_files
from megamod.serving.page_policy import PAGE_POLICY

SCRIPT = """
<script>
const shown = %s
setInterval(async () => {
  const answer = await fetch("version").catch(() => null)  // none: the server has ended
  if (answer && answer.ok && (await answer.text()) !== shown) location.reload()
}, 2000)
</script>
"""


class LivePage:
    """The page of some runs, with a version that changes with their files.

    Args:
        paths: see `format_run_report`.
    """

    def __init__(self, paths: Sequence[Path]):
        """Start without a page: the first request draws it."""
        self.paths = list(paths)
        self.lock = threading.Lock()  # matplotlib draws one figure at a time
        self.version, self.text = "", ""

    def compute_version(self) -> str:
        """Compute the version of the page: a digest of times and sizes of the runs' files.

        It is equal as long as no file has changed, and follows files that appear or vanish.
        """
        digest = sha256()
        for file in list_report_files(self.paths):
            try:
                stat = file.stat()
                digest.update(f"{file} {stat.st_mtime_ns} {stat.st_size}\n".encode())
            except OSError:
                digest.update(f"{file} is missing\n".encode())
        return digest.hexdigest()

    def format_page(self) -> str:
        """Return the HTML page, with a script that loads it again when the version has changed.

        It is drawn anew if the version has changed since the last call, in one thread at a time.
        Runs that cannot be reported on, such as one that has not logged a step yet, give a page
        with the reason.
        """
        with self.lock:
            # Computed before the files are read, so that no change is missed.
            version = self.compute_version()
            if version != self.version:
                script = SCRIPT % json.dumps(version)
                try:
                    self.text, _ = format_run_report(self.paths, script)
                except UserError as error:
                    self.text = (
                        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
                        f"<title>no report yet</title></head>\n<body>\n<p>No report yet. "
                        f"{escape(str(error))}</p>\n{script}</body></html>\n"
                    )
                self.version = version
            return self.text


class LiveServer(ThreadingHTTPServer):
    """Server of a live page: the page at /, its version at /version, and nothing else.

    Args:
        page: page to serve.
        bound: bound socket, which the server closes at its end.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, page: LivePage, bound: socket.socket):
        """Start to listen on the bound socket; see the class for the arguments."""
        super().__init__(bound.getsockname(), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket, self.page = bound, page
        self.server_activate()

    def serve_until_stopped(self) -> None:
        """Serve until Ctrl-C or SIGTERM, then close the socket and return.

        It replaces the handlers of both signals, so it runs in the main thread.
        """
        # Set for Ctrl-C, too: a shell's job in the background ignores it otherwise.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        try:
            self.serve_forever(poll_interval=0.1)
        except KeyboardInterrupt:
            pass
        finally:
            self.server_close()


class _Handler(BaseHTTPRequestHandler):
    """Answers a request of a `LiveServer`."""

    server: LiveServer

    def do_GET(self) -> None:
        """Answer a GET request with the page, its version, or status 404."""
        match self.path:
            case "/":
                self._send_text(200, "text/html", self.server.page.format_page())
            case "/version":
                self._send_text(200, "text/plain", self.server.page.compute_version())
            case _:
                self._send_text(404, "text/plain", "there is / and /version\n")

    def _send_text(self, status: int, kind: str, text: str) -> None:
        """Send a whole response.

        Args:
            status: HTTP status.
            kind: media type, such as "text/html".
            text: body, sent in UTF-8.
        """
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", PAGE_POLICY)
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Log no requests: a page asks every two seconds."""
