"""One HTTP exchange with a server that may be slow, endless, or somebody else's.

The time limit is of the whole exchange, not of a wait between two bytes, and a longer reply than
asked for is not read to its end. No redirect is followed, so that what is sent, a key among it,
reaches the address that was named and no other.
"""

import http.client
import io
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

_ADDRESS = re.compile(r"[\x21-\x7e]+")
_HEADER = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")


class NoReply(Exception):
    """No whole reply came; says why, and nothing of what was sent."""


class TooLong(NoReply):
    """The reply is longer than was allowed."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a server answered, whatever its status."""

    status: int
    location: str | None
    """Where it sends the client instead, of a redirect."""
    body: bytes


def fits_header(text: str) -> bool:
    """Whether a header can hold `text` to the letter: ASCII, without line breaks at its end."""
    return _HEADER.fullmatch(text) is not None


def why_no_address(url: str) -> str | None:
    """Why `url` cannot be asked, without quoting it, as it may hold a secret; None if it can."""
    if not _ADDRESS.fullmatch(url):
        return "it holds a blank, a line break or another character that no address has"
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname
        _ = parts.port  # raises ValueError where it is no number
    except ValueError:
        known = None
    if not known:
        return "it is not of the form http://HOST:PORT or https://HOST"
    if "@" in parts.netloc:
        return "it holds a user or a password, which are not sent"
    return None


def exchange(
    url: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    *,
    seconds: float,
    most_bytes: int,
) -> Reply:
    """Send a GET, or a POST of `body`; the reply is complete within `seconds` in all.

    Proxies of the environment are used. Raises `NoReply`, or `TooLong` for a body of more than
    `most_bytes`.
    """
    if reason := why_no_address(url):
        raise NoReply(f"the address cannot be asked: {reason}")
    if bad := next((name for name, it in (headers or {}).items() if not fits_header(it)), None):
        raise NoReply(f"{bad} holds a line break or another character that no header can hold")
    until = time.monotonic() + seconds
    opener = urllib.request.OpenerDirector()
    for handler in (urllib.request.ProxyHandler(), _Http(until), _Https(until)):
        opener.add_handler(handler)
    request = urllib.request.Request(url, body, dict(headers or {}))
    try:
        with cast(http.client.HTTPResponse, opener.open(request, timeout=seconds)) as answer:
            content = answer.read(most_bytes + 1)
            if len(content) > most_bytes:
                raise TooLong(f"the reply is longer than {most_bytes:,} bytes")
            if answer.length:
                raise NoReply(f"the reply ended {answer.length:,} bytes early")
            return Reply(
                status=answer.status, location=answer.headers.get("Location"), body=content
            )
    except (OSError, http.client.HTTPException) as error:
        raise NoReply(_reason(error, seconds)) from None
    except ValueError as error:  # its words may quote a proxy's password
        raise NoReply(f"the address or the proxy cannot be used ({type(error).__name__})") from None


def _reason(error: Exception, seconds: float) -> str:
    cause = getattr(error, "reason", error)
    if isinstance(cause, TimeoutError):
        return f"timed out: no whole reply within {seconds:g} s"
    return str(cause) or type(cause).__name__


class _Until(io.RawIOBase):
    """Bytes of a socket, as long as they come before a point of time."""

    def __init__(self, connected: socket.socket, until: float) -> None:
        self._socket, self._until = connected, until
        self._raw = connected.makefile("rb", buffering=0)

    def makefile(self, mode: str) -> io.BufferedReader:
        """As http.client asks a socket for it."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        """It is only read."""
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Raises TimeoutError once the time is over, however many bytes came until then."""
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._socket.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        """Close the socket, if nothing else reads it."""
        self._raw.close()
        super().close()


def _connections(
    kind: type[http.client.HTTPConnection], until: float
) -> Callable[..., http.client.HTTPConnection]:
    def reply(connected: socket.socket, **how: Any) -> http.client.HTTPResponse:
        return http.client.HTTPResponse(cast(socket.socket, _Until(connected, until)), **how)

    def connect(host: str, **options: Any) -> http.client.HTTPConnection:
        connection: Any = kind(host, **options)
        connection.response_class = reply
        return cast(http.client.HTTPConnection, connection)

    return connect


class _Http(urllib.request.HTTPHandler):
    def __init__(self, until: float) -> None:
        super().__init__()
        self._until = until

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_connections(http.client.HTTPConnection, self._until), req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, until: float) -> None:
        super().__init__()
        self._until = until

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_connections(http.client.HTTPSConnection, self._until), req)
