"""A proxy in front of an object store emulator; the proxy injects faults and counts requests."""

import collections
import contextlib
import dataclasses
import http.client
import http.server
import re
import socket
import threading
import urllib.parse

MUTATING = {"write", "copy", "delete"}
FAULTS = ("refuse", "silence", "cut", "lose", "truncate", "delay", "stale", "unconditional")


def kind_of(method, target, headers):
    """The kind of a request to either service: write, copy, delete, list, read, find or other."""
    path, _, query = target.partition("?")
    if path.startswith(("/storage/v1/", "/upload/", "/download/")):
        is_object = re.search(r"/b/[^/]+/o/.", path)
        if method == "POST":
            return "copy" if is_object else "write" if path.startswith("/upload/") else "other"
        if method == "GET" and not is_object:
            return "list" if path.endswith("/o") else "other"
        is_media = path.startswith("/download/") or "alt=media" in query
        return {"GET": "read" if is_media else "find", "PUT": "write", "DELETE": "delete"}.get(method, "other")
    if "/" not in path.strip("/"):
        return {"GET": "list", "POST": "delete"}.get(method, "other")
    if method == "PUT" and "x-amz-copy-source" in headers:
        return "copy"
    return {"GET": "read", "HEAD": "find", "PUT": "write", "POST": "write", "DELETE": "delete"}.get(method, "other")


@dataclasses.dataclass
class Rule:
    """A fault for some requests.

    fault: "refuse" answers with `status`; "silence" waits `seconds`, then closes the connection; "cut" closes the
    connection in the middle of the request's body; "lose" carries the request out and closes the connection without an
    answer; "truncate" closes the connection in the middle of the answer's body; "delay" waits `seconds`, then carries the
    request out; "stale" repeats the first answer to a listing; "unconditional" removes a write's conditions.
    kind: the kind of requests that the rule applies to, None for all. skip: number of requests without a fault at first.
    every: 2 applies the rule to every second request. times: how often the rule applies.
    """

    fault: str
    kind: str | None = None
    times: float = 1
    skip: int = 0
    every: int = 1
    status: int = 503
    seconds: float = 60.0
    seen: int = 0


class FaultProxy:
    """Forwards requests from `address` to `upstream`, an address such as http://127.0.0.1:8000.

    requests: (kind, URL path) of all requests; counts: by kind; injected: by fault.
    """

    def __init__(self, upstream):
        self.upstream = upstream
        self.requests, self.counts, self.injected = [], collections.Counter(), collections.Counter()
        self._rules, self._calls, self._first_answers = [], [], {}
        self._mutex, self._closing = threading.Lock(), threading.Event()
        self._mutations = 0
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _make_handler(self))
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def inject(self, fault, kind=None, **options):
        """Adds a Rule; the first rule that applies to a request decides."""
        assert fault in FAULTS
        self._rules.append(Rule(fault, kind, **options))

    def clear(self):
        """Removes all rules."""
        self._rules.clear()

    def call_after(self, count, function):
        """Calls a function after the `count`-th change from now on was carried out, before the answer."""
        self._calls.append((self._mutations + count, function))

    def choose(self, kind, target):
        """Counts a request; returns the rule that applies, or None."""
        with self._mutex:
            self.requests.append((kind, urllib.parse.unquote(target.partition("?")[0])))
            self.counts[kind] += 1
            for rule in self._rules:
                if rule.kind not in (None, kind) or rule.times < 1:
                    continue
                rule.seen += 1
                if rule.seen > rule.skip and (rule.seen - rule.skip) % rule.every == 0:
                    rule.times -= 1
                    self.injected[rule.fault] += 1
                    return rule
        return None

    def note_mutation(self):
        with self._mutex:
            self._mutations += 1
            due = [function for count, function in self._calls if count == self._mutations]
        for function in due:
            function()

    def first_answer(self, target, answer):
        """The first answer to this request: `answer` if there was no earlier answer."""
        with self._mutex:
            return self._first_answers.setdefault(target, answer)

    def wait(self, seconds):
        self._closing.wait(seconds)


def _make_handler(proxy):
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_any(self):
            kind = kind_of(self.command, self.path, self.headers)
            rule = proxy.choose(kind, self.path) or Rule("none")
            if rule.fault == "refuse":
                self._read_body()
                self._answer(rule.status, [], b"injected")
                return
            if rule.fault in ("silence", "delay"):
                proxy.wait(rule.seconds)
            if rule.fault == "cut":
                self._read_body(0.5)
            if rule.fault in ("silence", "cut"):
                self._close()
                return
            answer = self._forward(self._read_body(), rule.fault != "unconditional")
            if kind == "list":
                first = proxy.first_answer(self.path, answer)
                answer = first if rule.fault == "stale" else answer
            if kind in MUTATING:
                proxy.note_mutation()
            if rule.fault == "lose":
                self._close()
                return
            self._answer(*answer, fraction=0.5 if rule.fault == "truncate" else 1.0)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = do_any

        def _read_body(self, fraction=1.0):
            if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                body = b""
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    body += self.rfile.read(size)
                    if self.rfile.readline() != b"\r\n":
                        raise ConnectionResetError("the request ended within its body")
                self.rfile.readline()
                return body
            length = int(int(self.headers.get("Content-Length", 0)) * fraction)
            body = self.rfile.read(length)
            if len(body) < length:  # the client was killed; a store would not keep a part of an object
                raise ConnectionResetError("the request ended within its body")
            return body

        def _forward(self, body, conditional):
            upstream = urllib.parse.urlsplit(proxy.upstream)
            left_out = {"transfer-encoding", "expect", *(() if conditional else ("if-match", "if-none-match"))}
            headers = {key: value for key, value in self.headers.items() if key.lower() not in left_out}
            target = self.path if conditional else re.sub(r"ifGenerationMatch=\d+", "", self.path)
            headers |= {"Host": upstream.netloc, "Content-Length": str(len(body)), "Connection": "close"}
            connection = http.client.HTTPConnection(upstream.netloc, timeout=60)
            with contextlib.closing(connection):
                connection.request(self.command, target, body, headers)
                answer = connection.getresponse()
                return answer.status, answer.getheaders(), answer.read()

        def _answer(self, status, headers, body, fraction=1.0):
            self.send_response_only(status)
            for key, value in headers:
                if key.lower() == "location":  # of an upload in several requests
                    value = value.replace(proxy.upstream, proxy.address)
                if key.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(key, value)
            length = dict(headers).get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
            if status != 204:
                self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: int(len(body) * fraction)])
            if fraction < 1:
                self._close()

        def _close(self):
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)

    return Handler
