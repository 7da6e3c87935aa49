"""A bucket on 127.0.0.1: as much of Google Cloud Storage as the layers below a workdir speak.

Objects lie in memory and have generations; uploads with conditions, whole, in parts and resumable; ranges, copies,
listings. TensorFlow's file system knows no other endpoint than Google's, so that a proxy which ends TLS stands before
the server for it. A store in `Trouble` answers 503, breaks connections off, is slow, or lists late.
"""

import base64
import collections
import contextlib
import dataclasses
import datetime
import hashlib
import json
import pathlib
import random
import re
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

import google_crc32c
import trustme

NAME = "bucket"


class Stored(collections.namedtuple("Stored", "content generation updated")):
    """An object of the bucket; `updated` is in seconds since the epoch."""

    def resource(self, name):
        """What the service tells of it."""
        when = datetime.datetime.fromtimestamp(self.updated, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {
            "kind": "storage#object",
            "id": f"{NAME}/{name}/{self.generation}",
            "name": name,
            "bucket": NAME,
            "generation": str(self.generation),
            "metageneration": "1",
            "size": str(len(self.content)),
            "updated": when,
            "timeCreated": when,
            "contentType": "application/octet-stream",
            "storageClass": "STANDARD",
            "crc32c": base64.b64encode(google_crc32c.value(self.content).to_bytes(4, "big")).decode(),
            "md5Hash": base64.b64encode(hashlib.md5(self.content).digest()).decode(),
            "etag": str(self.generation),
        }


@dataclasses.dataclass
class Trouble:
    """What goes wrong.

    Attributes:
        unavailable: share of requests that are answered 503.
        broken: share of answers whose connection ends in the middle of the body.
        refused: share of connections that end before an answer.
        delay: seconds before each answer, for a share `delayed` of them.
        missing, forbidden: share of requests that are answered 404, 403.
        lag: seconds that listings do not know of what was written or removed.
        only: a pattern that the request's "METHOD /path" must match.
        at_most: so many times altogether.
    """

    unavailable: float = 0.0
    broken: float = 0.0
    refused: float = 0.0
    delay: float = 0.0
    delayed: float = 1.0
    missing: float = 0.0
    forbidden: float = 0.0
    lag: float = 0.0
    only: str = ""
    at_most: int = 1_000_000
    seed: int = 0
    times: int = 0


class Bucket:
    """The objects, and the requests that came."""

    def __init__(self):
        self.objects: dict[str, Stored] = {}
        self.changes: list[tuple[float, str, Stored | None]] = []
        self.uploads: dict[str, tuple[str, bytearray, dict]] = {}
        self.guard = threading.RLock()
        self.generation = 1000
        self.requests: collections.Counter = collections.Counter()
        self.bytes_in = 0
        self.trouble = Trouble()
        self.random = random.Random(0)
        self.changing = 0
        self.strikes: dict[int, Callable[[], object]] = {}

    def strike(self, number: int, action: Callable[[], object]) -> None:
        """Calls `action` when so many requests more that change something have come, before that one is served."""
        self.strikes[self.changing + number] = action

    def make_trouble(self, **what) -> Trouble:
        self.trouble = Trouble(**what)
        self.random = random.Random(self.trouble.seed)
        return self.trouble

    def put(self, name: str, content: bytes) -> dict:
        with self.guard:
            self.generation += 1
            self._note(name)
            self.objects[name] = Stored(bytes(content), self.generation, time.time())
            return self.objects[name].resource(name)

    def delete(self, name: str) -> None:
        with self.guard:
            self._note(name)
            del self.objects[name]

    def _note(self, name: str) -> None:
        self.changes.append((time.time(), name, self.objects.get(name)))

    def listed(self) -> dict[str, Stored]:
        """The objects as listings show them: some seconds late where that is the trouble."""
        with self.guard:
            found = dict(self.objects)
            since = time.time() - self.trouble.lag
            for when, name, before in reversed(self.changes):
                if when < since:
                    break
                if before is None:
                    found.pop(name, None)
                else:
                    found[name] = before
            return found

    def names(self, prefix: str = "") -> list[str]:
        with self.guard:
            return sorted(name for name in self.objects if name.startswith(prefix))

    def copy_tree(self, source: str, target: str) -> None:
        """All objects below a prefix under another one, without a request."""
        with self.guard:
            for name in self.names(source + "/"):
                self.put(target + name[len(source) :], self.objects[name].content)

    def remove_tree(self, prefix: str) -> None:
        with self.guard:
            for name in self.names(prefix + "/"):
                self.delete(name)

    def save_tree(self, prefix: str, directory: pathlib.Path) -> None:
        """Writes the objects below a prefix as files."""
        for name in self.names(prefix + "/"):
            if not name.endswith("/"):
                path = directory / name[len(prefix) + 1 :]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self.objects[name].content)

    def load_tree(self, directory: pathlib.Path, prefix: str) -> None:
        """Makes the files below a directory objects."""
        for path in directory.rglob("*"):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(directory)}", path.read_bytes())


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: Bucket

    def log_message(self, *_):
        pass

    def do_GET(self):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.take()

    do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = do_GET

    def answer(self, code, body=b"", headers=()):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(code)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            if self.strikes("broken") and len(body) > 1:
                self.wfile.write(body[: len(body) // 2])
                self.hang_up()
                return
            self.wfile.write(body)

    def refuse(self, code, reason):
        self.answer(code, {"error": {"code": code, "message": reason, "errors": [{"reason": reason}]}})

    def hang_up(self):
        self.wfile.flush()
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def strikes(self, kind):
        """Whether this request is one that a trouble hits."""
        trouble, bucket = self.bucket.trouble, self.bucket
        share = getattr(trouble, kind)
        if not share or trouble.times >= trouble.at_most:
            return False
        if trouble.only and not re.search(trouble.only, f"{self.command} {self.path}"):
            return False
        with bucket.guard:
            hit = bucket.random.random() < share
            trouble.times += hit
        return hit

    def body(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            content = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def take(self):
        address = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(address.query, keep_blank_values=True).items()}
        content = self.body()
        self.bucket.requests[self.command] += 1
        self.bucket.bytes_in += len(content)
        if self.command in ("POST", "PUT", "DELETE") and "lock.json" not in self.path:
            with self.bucket.guard:
                self.bucket.changing += 1
                action = self.bucket.strikes.pop(self.bucket.changing, None)
            if action:
                action()
        trouble = self.bucket.trouble
        if trouble.delay and self.strikes("delayed"):
            time.sleep(trouble.delay)
        if self.strikes("refused"):
            self.hang_up()
            return
        for kind, code in (("unavailable", 503), ("missing", 404), ("forbidden", 403)):
            if self.strikes(kind):
                self.refuse(code, {503: "backendError", 404: "notFound", 403: "forbidden"}[code])
                return
        routes = (
            (r"(?:/resumable)?/upload/storage/v1/b/([^/]+)/o$", self.upload),
            (r"/storage/v1/b/[^/]+/o/(.+)/(?:rewriteTo|copyTo)/b/[^/]+/o/(.+)$", self.copy),
            (r"(?:/download)?/storage/v1/b/[^/]+/o/(.+)$", self.object),
            (r"/storage/v1/b/[^/]+/o/?$", self.list),
            (r"/storage/v1/b/[^/]+/storageLayout$", self.layout),
            (r"/storage/v1/b/([^/]+)/?$", self.about),
            (r"/[^/]+/(.+)$", self.plain),
        )
        with self.bucket.guard:
            for pattern, route in routes:
                found = re.match(pattern, address.path)
                if found:
                    route(query, content, *map(unquote, found.groups()))
                    return
        self.refuse(404, f"route {address.path}")

    def fits(self, query, name):
        """Whether the conditions on the object's generation hold; answers where they do not."""
        held = self.bucket.objects.get(name)
        generation = held.generation if held else 0
        wanted, unwanted = query.get("ifGenerationMatch"), query.get("ifGenerationNotMatch")
        if (wanted is not None and int(wanted) != generation) or (unwanted is not None and int(unwanted) == generation):
            self.refuse(412, "conditionNotMet")
            return False
        return True

    def upload(self, query, content, bucket_name):
        number = query.get("upload_id")
        if number in self.bucket.uploads:
            self.go_on(number, content)
            return
        if query.get("uploadType") == "resumable":
            name = query.get("name") or json.loads(content or b"{}").get("name")
            if not self.fits(query, name):
                return
            number = f"u{time.time_ns()}"
            self.bucket.uploads[number] = (name, bytearray(), query)
            host = self.headers.get("Host", "")
            base = f"https://{host}" if "googleapis" in host else f"http://{host}"
            place = f"{base}/upload/storage/v1/b/{bucket_name}/o?uploadType=resumable&upload_id={number}"
            self.answer(200, b"", [("Location", f"{place}&name={quote(name, safe='')}")])
            return
        if query.get("uploadType") == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            described, media = (part.split(b"\r\n\r\n", 1)[1] for part in content.split(b"--" + boundary)[1:3])
            name, content = query.get("name") or json.loads(described)["name"], media[:-2]
        else:
            name = query["name"]
        if self.fits(query, name):
            self.answer(200, self.bucket.put(name, content))

    def go_on(self, number, content):
        name, held, query = self.bucket.uploads[number]
        span = re.match(r"bytes (?:\*|(\d+)-(\d+))/(\*|\d+)", self.headers.get("Content-Range", ""))
        first, total = (span[1], span[3]) if span else (None, "")
        if first is not None:
            del held[int(first) :]
        held += content
        # Without a range the body is all; an inquiry ("bytes */N") is answered with what is there.
        if span is None or (total != "*" and int(total) == len(held)):
            if self.fits(query, name):
                self.answer(200, self.bucket.put(name, held))
            del self.bucket.uploads[number]
            return
        self.answer(308, b"", [("Range", f"bytes=0-{len(held) - 1}")] if held else [])

    def copy(self, query, _, source, target):
        if source not in self.bucket.objects:
            self.refuse(404, "notFound")
            return
        resource = self.bucket.put(target, self.bucket.objects[source].content)
        size = resource["size"]
        self.answer(
            200,
            {
                "kind": "storage#rewriteResponse",
                "totalBytesRewritten": size,
                "objectSize": size,
                "done": True,
                "resource": resource,
            },
        )

    def object(self, query, _, name):
        held = self.bucket.objects.get(name)
        if held is None:
            self.refuse(404, "notFound")
        elif self.fits(query, name):
            if self.command == "DELETE":
                self.bucket.delete(name)
                self.answer(204)
            elif query.get("alt") == "media":
                self.media(held)
            else:
                self.answer(200, held.resource(name))

    def plain(self, query, content, name):
        if self.command == "PUT":
            self.answer(200, b"", [("x-goog-generation", self.bucket.put(name, content)["generation"])])
        elif name not in self.bucket.objects:
            self.refuse(404, "notFound")
        else:
            self.media(self.bucket.objects[name])

    def media(self, held):
        size = len(held.content)
        headers = [
            ("x-goog-generation", str(held.generation)),
            ("ETag", str(held.generation)),
            ("Content-Type", "application/octet-stream"),
            ("x-goog-stored-content-length", str(size)),
            ("x-goog-stored-content-encoding", "identity"),
        ]
        span = re.match(r"bytes=(\d*)-(\d*)$", self.headers.get("Range") or "")
        if not span:
            self.answer(200, held.content, headers)
            return
        first, last = span.groups()
        start = max(0, size - int(last)) if first == "" else int(first)
        stop = size if first == "" or last == "" else min(int(last) + 1, size)
        if start >= size:
            self.answer(416, b"", [("Content-Range", f"bytes */{size}")])
            return
        self.answer(206, held.content[start:stop], [*headers, ("Content-Range", f"bytes {start}-{stop - 1}/{size}")])

    def list(self, query, _):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        first, last = query.get("startOffset", ""), query.get("endOffset", "")
        items, prefixes = [], set()
        for name, held in sorted(self.bucket.listed().items()):
            if not name.startswith(prefix) or (first and name < first) or (last and name >= last):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(held.resource(name))
        most = int(query.get("maxResults", "1000000"))
        found = {"kind": "storage#objects"}
        if items:
            found["items"] = items[:most]
        if prefixes:
            found["prefixes"] = sorted(prefixes)[:most]
        self.answer(200, found)

    def layout(self, query, _):
        self.answer(200, {"bucket": NAME, "hierarchicalNamespace": {"enabled": False}})

    def about(self, query, _, name):
        known = {"id": name, "name": name, "location": "US", "storageClass": "STANDARD", "locationType": "region"}
        self.answer(200, {"kind": "storage#bucket", **known})


class Server(ThreadingHTTPServer):
    daemon_threads = True
    # Many processes begin at once.
    request_queue_size = 128

    def handle_error(self, request, client_address):
        """A client that was killed has hung up."""


def pump(source, target):
    try:
        while content := source.recv(1 << 16):
            target.sendall(content)
    except OSError:
        pass
    finally:
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def relay(client, context, port):
    """One connection through the proxy: CONNECT, TLS, and bytes both ways."""
    try:
        asked = b""
        while b"\r\n\r\n" not in asked:
            more = client.recv(4096)
            if not more:
                return
            asked += more
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        inside = context.wrap_socket(client, server_side=True)
        server = socket.create_connection(("127.0.0.1", port))
    except OSError:
        client.close()
        return
    threading.Thread(target=pump, args=(inside, server), daemon=True).start()
    pump(server, inside)


def accept(listener, context, port):
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=relay, args=(client, context, port), daemon=True).start()


@contextlib.contextmanager
def serving() -> Iterator[tuple[Bucket, dict[str, str]]]:
    """An empty bucket, and the environment of processes that take gs:// for it."""
    bucket = Bucket()
    server = Server(("127.0.0.1", 0), type("OfBucket", (Handler,), {"bucket": bucket}))
    port = server.server_address[1]
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("storage.googleapis.com", "www.googleapis.com", "*.googleapis.com").configure_cert(context)
    listener = socket.create_server(("127.0.0.1", 0))
    with tempfile.TemporaryDirectory() as directory:
        certificate = pathlib.Path(directory) / "ca.pem"
        authority.cert_pem.write_to_path(str(certificate))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        threading.Thread(target=accept, args=(listener, context, port), daemon=True).start()
        address = f"http://127.0.0.1:{port}"
        environment = {
            "https_proxy": f"http://127.0.0.1:{listener.getsockname()[1]}",
            "CURL_CA_BUNDLE": str(certificate),
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
            "NO_GCE_CHECK": "true",
            "TENSORSTORE_GCS_HTTP_URL": address,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": address,
            "STORAGE_EMULATOR_HOST": address,
            "GOOGLE_CLOUD_PROJECT": "x",
            # The processes of a run find each other without the proxy.
            "no_proxy": "127.0.0.1,localhost",
        }
        try:
            yield bucket, environment
        finally:
            listener.close()
            server.shutdown()
            server.server_close()
