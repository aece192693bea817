"""A proxy before an S3 server on loopback that breaks things on the way."""

import http.client
import http.server
import threading
import time
from collections import Counter

SILENCE_S = 1.5


class Proxy(http.server.ThreadingHTTPServer):
    """Forward to an S3 server. `faults(method, path)` names what befalls a request: 503, cut, slow, down, or None."""

    daemon_threads = True

    def __init__(self, target):
        super().__init__(("127.0.0.1", 0), Forward)
        self.target, self.faults, self.seen = target, lambda method, path: None, Counter()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        """A client that hung up is what this is about."""


class Forward(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        pass

    def forward(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.faults(self.command, self.path)
        self.server.seen[fault] += 1
        if fault == "down":
            self.close_connection = True
            return
        if fault == "503":
            told = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
            self.answer(503, [("Content-Type", "application/xml")], told)
            return
        if fault == "slow":
            time.sleep(SILENCE_S)
        link = http.client.HTTPConnection(*self.server.target)
        link.request(self.command, self.path, body, dict(self.headers))
        reply = link.getresponse()
        content = reply.read()
        head = [pair for pair in reply.getheaders() if pair[0].lower() not in ("connection", "transfer-encoding")]
        if fault == "cut":
            content = content[: len(content) // 2]
            self.close_connection = True
        self.answer(reply.status, head, content, length=len(content) if fault != "cut" else len(content) + 1)

    def answer(self, status, head, content, length=None):
        self.send_response_only(status)
        for name, value in head:
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward
