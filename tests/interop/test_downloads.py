"""If these fail, a page or half a file is taken for weights, or a broken connection ends in a stack trace."""

import http.server
import threading

import numpy as np
import pytest
from safetensors.numpy import save

from iar_jax.interop import downloads
from iar_jax.runtime.artifacts import sha256_of
from iar_jax.runtime.errors import UserError

WEIGHTS = save({"a": np.arange(300, dtype=np.float32)})


class Odd(http.server.BaseHTTPRequestHandler):
    """Answers by the name that is asked for."""

    def do_GET(self):
        name = self.path.strip("/")
        if name == "missing":
            self.send_error(404)
            return
        if name == "nonsense":
            self.wfile.write(b"220 mail.example ESMTP\r\n")
            return
        if name == "nothing":
            return
        page = b"<!DOCTYPE html><html><body>Please sign in</body></html>"
        others = {"page": page, "pointer": b"version https://git-lfs.github.com/spec/v1\n", "empty": b""}
        body = others.get(name, WEIGHTS)
        self.send_response(200)
        if name == "chunks":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"40\r\n" + body[:64] + b"\r\n40\r\n" + body[:10])
            return
        if name != "silent":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:500] if name in ("cut", "silent") else body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Odd) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def fetch(address, sha256=""):
    return downloads.find("", (downloads.PublicFile("weights.safetensors", address, sha256),), "The weights")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "Not Found"),
        ("page", "it is a web page"),
        ("pointer", "it is a Git LFS pointer"),
        ("empty", "it is empty"),
        ("cut", "500 of 1,272 bytes came"),
        ("silent", "cannot be read as a PyTorch or safetensors file"),
        ("chunks", "IncompleteRead"),
        ("nonsense", "220 mail.example"),
        ("nothing", "closed connection without response"),
    ],
)
def test_what_is_not_the_file_is_told_in_a_line_and_not_kept(server, tmp_path, monkeypatch, name, message):
    monkeypatch.setenv("IAR_JAX_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=message) as refusal:
        fetch(f"{server}/{name}")
    assert f"{server}/{name}" in str(refusal.value)
    assert "Put one of weights.safetensors into" in str(refusal.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/a", "http://nowhere.invalid/a", "nowhere", "http://[::1/a"])
def test_what_cannot_be_reached_is_told_in_a_line(tmp_path, monkeypatch, address):
    monkeypatch.setenv("IAR_JAX_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="neither here nor could be fetched"):
        fetch(address)


def test_a_whole_file_of_the_right_hash_is_kept(server, tmp_path, monkeypatch):
    monkeypatch.setenv("IAR_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "weights").write_bytes(WEIGHTS)
    digest = sha256_of(tmp_path / "weights")
    with pytest.raises(UserError, match=rf"its SHA-256 begins {digest[:8]}, not 6726825d"):
        fetch(f"{server}/whole", "6726825d")
    assert not list((tmp_path / "cache").iterdir())
    assert fetch(f"{server}/whole", digest[:8]).read_bytes() == WEIGHTS
    # Taken from there the next time.
    assert fetch("http://nowhere.invalid/", digest[:8]).read_bytes() == WEIGHTS


def test_weights_that_are_nowhere_are_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("IAR_JAX_CACHE", str(tmp_path))
    elsewhere = [file._replace(address=f"file://{tmp_path}/nowhere") for file in downloads.INCEPTION]
    with pytest.raises(UserError, match=rf"Put one of weights-inception.*graph_def\.pb into {tmp_path}"):
        downloads.find("", tuple(elsewhere), "Inception weights")
