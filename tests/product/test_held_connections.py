"""What has held against strangers goes on holding, on the real server: bytes, heads, names and slow connections."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest
from support.server import RunningServer

pytestmark = pytest.mark.product

SECONDS = 120.0
"""Generous: it is used up only where an answer never comes."""
MODEL = "smollm2-135m-instruct"
COUNT = f"/v1beta/models/{MODEL}:countTokens"
BODY = b'{"contents": [{"parts": [{"text": "Hi"}]}]}'


@pytest.fixture(autouse=True)
def healthy_afterwards(castor: RunningServer) -> Iterator[None]:
    yield
    assert castor.client.get("/healthz").status_code == 200


def spoken(server: RunningServer, request: bytes) -> bytes:
    """All that the server says to bytes on a connection of their own, until it closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(request)
        answer = b""
        with suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                answer += piece
    return answer


def head(*lines: bytes, method: bytes = b"POST", path: str = COUNT, host: bytes = b"localhost") -> bytes:
    return b"\r\n".join([method + f" {path} HTTP/1.1".encode(), b"host: " + host, *lines, b"", b""])


def statuses(answer: bytes) -> list[int]:
    """The status of each answer on a connection; none of our bodies holds the words."""
    return [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]


HOSTS_OF_OTHERS = [
    *(b"localhost@evil.org", b"evil.org@localhost:80@evil.org", b"localhost:80@evil.org", b"evil.org#localhost"),
    *(b"evil.org?localhost", b"evil.org/localhost", b"evil.org\\localhost", b"evil.org%00localhost", b"xn--localhost-"),
    *(b"localhost.evil.org:8080", b"evil.org.", b"EVIL.ORG", b"[::2]", b"[::ffff:10.0.0.1]", b"[::1", b"::1]"),
    *(b"0x7f.1.evil.org", b"128.0.0.1", b"127.0.0.1.", b"127.1.evil", b"", b" ", b":8080", b"@", b"[]", b"."),
    *(b"evil.org@localhost", b"evil.org\\@localhost", b"localhost:x", b"localhost:999999", b"localhost/x"),
    *(b"localhost\xc2\xad.evil.org", b"evil\xe3\x80\x82org", b"localhost, evil.org", b"evil.org, localhost"),
]


@pytest.mark.parametrize("host", HOSTS_OF_OTHERS)
def test_hosts_of_others_are_refused(castor: RunningServer, host: bytes) -> None:
    answer = spoken(castor, head(b"connection: close", method=b"GET", path="/v1beta/models", host=host))
    assert statuses(answer) in ([400], [403]), answer
    assert MODEL.encode() not in answer


@pytest.mark.parametrize(
    "host", [b"localhost", b"LOCALHOST:1", b"127.0.0.1:65535", b"127.9.9.9", b"[::1]:80", b"[0::1]"]
)
def test_hosts_of_this_machine_pass(castor: RunningServer, host: bytes) -> None:
    answer = spoken(castor, head(b"connection: close", method=b"GET", path="/v1beta/models", host=host))
    assert statuses(answer) == [200]


ORIGINS_OF_OTHERS = [
    *(b"http://evil.org", b"https://EVIL.ORG:443", b"http://evil.org.", b"http://localhost.evil.org", b"null", b"NULL"),
    *(b"http://localhost@evil.org", b"http://localhost:80@evil.org", b"http://evil.org#@localhost", b"http://[::2]"),
    *(b"http://evil.org/@localhost", b"http://evil.org?localhost", b"//evil.org"),
    *(
        b"file://",
        b"data:text/html,x",
        b"chrome-extension://abc",
        b"",
        b"localhost.evil.org",
        b"http://",
        b"http://:80",
    ),
    *(
        b"http://evil.org@localhost",
        b"http://localhost:3000/path",
        b"file://localhost",
        b"chrome-extension://localhost",
    ),
    *(b"http://localhost:1", b"http://127.0.0.1", b"http://localhost:99999"),
    *(b"http://127.0.0.1.evil.org", b"http://10.0.0.1", b"http://[::ffff:10.0.0.1]", b"http://[", b"http://\xff"),
]


@pytest.mark.parametrize("origin", ORIGINS_OF_OTHERS)
def test_pages_of_others_are_refused(castor: RunningServer, origin: bytes) -> None:
    for method in (b"GET", b"OPTIONS"):
        lines = (b"origin: " + origin, b"access-control-request-method: POST", b"connection: close")
        answer = spoken(castor, head(*lines, method=method, path="/v1beta/models"))
        assert statuses(answer) == [403], answer
        assert b"access-control-allow" not in answer.lower()
        assert MODEL.encode() not in answer


HIDDEN = b"GET /hidden HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
LENGTH = b"content-length: %d" % len(BODY)
CHUNKED = b"transfer-encoding: chunked"
WHOLE = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)

SMUGGLED = {
    "both lengths": head(LENGTH, CHUNKED) + b"0\r\n\r\n" + HIDDEN,
    "both lengths, turned round": head(CHUNKED, LENGTH) + b"0\r\n\r\n" + HIDDEN,
    "two lengths": head(LENGTH, b"content-length: 0") + BODY + HIDDEN,
    "the same length twice": head(LENGTH, LENGTH) + BODY + HIDDEN,
    "a list of lengths": head(b"content-length: 43, 43") + BODY + HIDDEN,
    "a length with a sign": head(b"content-length: +43") + BODY + HIDDEN,
    "a hexadecimal length": head(b"content-length: 0x2b") + BODY + HIDDEN,
    "a length with a space": head(b"content-length: 4 3") + BODY + HIDDEN,
    "a length that is none": head(b"content-length: ") + BODY + HIDDEN,
    "a length beyond 64 bits": head(b"content-length: 18446744073709551616") + HIDDEN,
    "a space before the colon": head(b"transfer-encoding : chunked") + b"0\r\n\r\n" + HIDDEN,
    "a length and a space before the colon": head(LENGTH, b"transfer-encoding : chunked") + BODY + HIDDEN,
    "a coding that is none": head(b"transfer-encoding: xchunked") + b"0\r\n\r\n" + HIDDEN,
    "chunked, and not last": head(b"transfer-encoding: chunked, identity") + b"0\r\n\r\n" + HIDDEN,
    "chunked twice": head(CHUNKED, b"transfer-encoding: identity") + b"0\r\n\r\n" + HIDDEN,
    "a vertical tab": head(b"transfer-encoding:\x0bchunked") + b"0\r\n\r\n" + HIDDEN,
    "a folded coding": head(b"transfer-encoding:\r\n chunked", LENGTH) + b"0\r\n\r\n" + HIDDEN,
    "a folded header": head(b"x-a: b\r\n content-length: 43", CHUNKED, b"\tx: y") + b"0\r\n\r\n" + HIDDEN,
    "a fold first": b"GET /v1beta/models HTTP/1.1\r\n host: localhost\r\nhost: localhost\r\n\r\n" + HIDDEN,
    "a chunk size that is none": head(CHUNKED) + b"g\r\n" + BODY + b"\r\n0\r\n\r\n" + HIDDEN,
    "a negative chunk": head(CHUNKED) + b"-1\r\n" + BODY + b"\r\n0\r\n\r\n" + HIDDEN,
    "a chunk with a prefix": head(CHUNKED) + b"0x2b\r\n" + BODY + b"\r\n0\r\n\r\n" + HIDDEN,
    "a chunk beyond 64 bits": head(CHUNKED) + b"1000000000000002b\r\n" + BODY + b"\r\n0\r\n\r\n" + HIDDEN,
    "a chunk that is longer than it says": head(CHUNKED) + b"2\r\n" + BODY + b"\r\n0\r\n\r\n" + HIDDEN,
    "a chunk size with a line feed alone": head(CHUNKED) + b"2b\n" + BODY + b"\n0\n\n" + HIDDEN,
    "a carriage return in a value": head(b"x-a: b\rcontent-length: 43") + BODY + HIDDEN,
    "a NUL in a value": head(b"x-a: b\0c", LENGTH) + BODY + HIDDEN,
    "a NUL in a name": head(b"x\0a: b", LENGTH) + BODY + HIDDEN,
    "a name that is none": head(b": b", LENGTH) + BODY + HIDDEN,
    "no colon": head(b"nonsense", LENGTH) + BODY + HIDDEN,
}


@pytest.mark.parametrize("case", SMUGGLED)
def test_no_request_is_hidden_in_another(castor: RunningServer, case: str) -> None:
    """Where a proxy and this server could see different requests in the same bytes, nothing behind them is read."""
    answer = spoken(castor, SMUGGLED[case])
    assert statuses(answer)[-1:] == [400], answer
    assert b"/hidden" not in answer, "the second request was answered"


def test_what_is_no_smuggling_is_answered(castor: RunningServer) -> None:
    for request in (head(LENGTH) + BODY, head(CHUNKED) + WHOLE, head(CHUNKED) + WHOLE.replace(b"2b\r", b"2b;x=y\r")):
        answer = spoken(castor, request + HIDDEN)
        assert statuses(answer) == [200, 404], answer
        assert b"/hidden" in answer, "two requests on one connection are two answers"


@pytest.mark.parametrize(
    "flood",
    [
        [b"x-%d: y" % index for index in range(20_000)],
        [b"x: y"] * 50_000,
        [b"x: " + b"y" * 200_000],
        [b"x" * 200_000 + b": y"],
        [b"cookie: " + b"a=b; " * 40_000],
    ],
    ids=["names", "lines", "a long value", "a long name", "cookies"],
)
def test_a_flood_of_headers(castor: RunningServer, flood: list[bytes]) -> None:
    before = castor.resident_bytes()
    for _ in range(20):
        answer = spoken(castor, head(*flood, LENGTH) + BODY)
        # The rest of the flood, which nobody reads, may take the answer with it.
        assert statuses(answer) in ([431], []), answer[:300]
    assert castor.resident_bytes() - before < 50 * 1024 * 1024


def test_a_long_line_of_a_request(castor: RunningServer) -> None:
    answer = spoken(castor, head(method=b"GET", path="/" + "a" * 200_000))
    assert statuses(answer) in ([431], [])
    answer = spoken(castor, head(b"connection: close", method=b"GET", path="/v1beta/models?" + "key=b&" * 7_000))
    assert statuses(answer) == [200]


def test_heads_that_trickle(castor: RunningServer) -> None:
    """Some hundred connections that send their heads a byte a second hold up nobody, and are cut off all the same."""
    with ExitStack() as stack:
        slow = [
            stack.enter_context(socket.create_connection(("127.0.0.1", castor.port), timeout=SECONDS))
            for _ in range(300)
        ]
        for connection in slow:
            connection.sendall(b"POST / HTTP/1.1\r\nhost: localhost\r\nx: ")
        assert castor.client.post(COUNT, content=BODY).status_code == 200
        open_, deadline = set(slow), time.monotonic() + SECONDS
        while open_:
            assert time.monotonic() < deadline, f"{len(open_)} connections are still open"
            for connection in list(open_):
                try:
                    connection.send(b"y")
                except OSError:
                    open_.remove(connection)
            assert castor.client.post(COUNT, content=BODY).status_code == 200
            time.sleep(1)


@pytest.mark.parametrize(
    "name",
    [
        *("../../etc/passwd", "..%2f..%2f..%2fetc%2fpasswd", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/etc/passwd", "./x"),
        *("..\\..\\etc\\passwd", "%00", "a%00b", "x" * 10_000, "%0d%0ax-evil:1", "models/../../etc/passwd", "~root"),
        *("file:///etc/passwd", "hf:someone/something", "smollm2-135m-instruct/../x", "smollm2-135m-instruct%00"),
    ],
)
def test_models_by_paths(castor: RunningServer, name: str) -> None:
    """No name of a model is a path or an address, in a path of a request or in its body."""
    for method, path in (
        (b"GET", f"/v1beta/models/{name}"),
        (b"POST", f"/v1beta/models/{name}:generateContent"),
        (b"POST", f"/v1beta/models/{name}:countTokens"),
    ):
        length = b"content-length: %d" % (len(BODY) if method == b"POST" else 0)
        body = BODY if method == b"POST" else b""
        answer = spoken(castor, head(length, b"connection: close", method=method, path=path) + body)
        assert statuses(answer) == [404], answer
        assert b"root:" not in answer
        assert b"x-evil" not in answer.partition(b"\r\n\r\n")[0]
        assert len(answer) < len(name) + 1000, "nothing else of the request comes back"
    said = {"model": name, **json.loads(BODY)}
    assert castor.generate(said).status_code == 404
    assert all(f"models--{part}" not in castor.log() for part in ("someone", "something")), "nothing was fetched"
