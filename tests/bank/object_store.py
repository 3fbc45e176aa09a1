"""An object store that speaks as much of Google Cloud Storage's protocol as TensorStore asks for, in memory."""

import contextlib
import http.server
import json
import threading
import urllib.parse

BUCKET = "bucket"


class Objects(http.server.ThreadingHTTPServer):
    """Objects by name: their bytes and generation."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Request)
        self.lock = threading.Lock()
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.generation = 0


class _Request(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Objects

    def log_message(self, *_):
        pass

    def _send(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _parse(self):
        url = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(url.query))
        return urllib.parse.unquote(url.path.partition(f"/b/{BUCKET}/o")[2].removeprefix("/"))

    def _refused(self, name):
        """Whether a condition on the generation fails; a missing object has generation 0."""
        generation = self.server.objects.get(name, (b"", 0))[1]
        wanted, unwanted = (self.query.get(f"ifGeneration{n}Match") for n in ("", "Not"))
        return (wanted is not None and int(wanted) != generation) or (
            unwanted is not None and int(unwanted) == generation
        )

    def do_GET(self):
        name = self._parse()
        with self.server.lock:
            if not name:
                return self._list()
            if name not in self.server.objects:
                return self._send(404)
            value, generation = self.server.objects[name]
            if self._refused(name):
                return self._send(304, x_goog_generation=generation)
        first, last = 0, len(value) - 1
        if (wanted := self.headers.get("range")) is not None:
            begin, end = wanted.removeprefix("bytes=").split("-")
            first, last = (int(begin), min(last, int(end or last))) if begin else (len(value) - int(end), last)
        headers = dict(x_goog_generation=generation, content_range=f"bytes {first}-{last}/{len(value)}")
        self._send(206 if wanted else 200, value[first : last + 1], **headers)

    def _list(self):
        first, end = self.query.get("startOffset", ""), self.query.get("endOffset", "\U0010ffff")
        names = [name for name in sorted(self.server.objects) if first <= name < end]
        items = [
            {"name": name, "size": str(len(value)), "generation": str(generation)}
            for name in names
            for value, generation in [self.server.objects[name]]
        ]
        self._send(200, json.dumps({"items": items}).encode(), content_type="application/json")

    def do_POST(self):
        self._parse()
        name, value = self.query["name"], self.rfile.read(int(self.headers["content-length"]))
        with self.server.lock:
            if self._refused(name):
                return self._send(412)
            self.server.generation += 1
            self.server.objects[name] = value, self.server.generation
            answer = {"name": name, "size": str(len(value)), "generation": str(self.server.generation)}
        self._send(200, json.dumps(answer).encode(), content_type="application/json")

    def do_DELETE(self):
        name = self._parse()
        with self.server.lock:
            if self._refused(name):
                return self._send(412)
            found = self.server.objects.pop(name, None)
        self._send(204 if found else 404)


@contextlib.contextmanager
def serving(monkeypatch):
    """A bucket that TensorStore finds under gs://bucket/."""
    with Objects() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()
