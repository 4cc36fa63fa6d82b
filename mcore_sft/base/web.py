"""HTTP with a server that may be slow, endless, or somebody else's.

The time limit is of the whole exchange, not of a wait between two bytes, and a longer reply than
asked for is not read to its end. No redirect is followed, so that what is sent, a key among it,
reaches the address that was named and no other. An address of this machine is reached without the
proxy of the environment; where another is not, what is said of it names the proxy.
"""

import ipaddress
import math
import os
import re
import time
import urllib.request
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Self
from urllib.parse import urlsplit

import anyio
import httpx2
from anyio.from_thread import start_blocking_portal

_ADDRESS = re.compile(r"[\x21-\x7e]+")
_HEADER = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")


class NoReply(Exception):
    """No reply came; says why, and nothing of what was sent."""


class NotThere(NoReply):
    """Nobody could be reached at the address."""


class TooLong(NoReply):
    """The reply is longer than was allowed."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a server answered, whatever its status."""

    status: int
    location: str | None
    """Where it sends the client instead, of a redirect."""
    retry_after: float | None
    """Seconds after which it wants to be asked again, if it says so."""
    body: bytes
    cut: str | None
    """Why the body ends early; none where it is whole."""


class Client:
    """Asks the servers of one address; exchanges at the same time share its connections."""

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        """Raises `NoReply` where the address, a header or the proxy cannot be used."""
        if reason := why_no_address(url):
            raise NoReply(f"the address cannot be asked: {reason}")
        sent = {"Accept-Encoding": "identity", **(headers or {})}
        if bad := next((name for name, it in sent.items() if not fits_header(it)), None):
            raise NoReply(f"{bad} holds a line break or another character that no header can hold")
        proxy = _proxy(url)
        self.via = f" through the proxy {_named(proxy)}" if proxy else ""
        """Which proxy leads there, for what is said of a failure; empty where none does."""
        try:
            self._http = httpx2.AsyncClient(
                headers=sent,
                proxy=proxy,
                trust_env=False,
                verify=httpx2.create_ssl_context(),
                timeout=None,
                limits=httpx2.Limits(max_connections=None),
            )
        except (ValueError, ImportError, httpx2.InvalidURL) as error:
            # its words may quote the proxy's password
            raise NoReply(f"the proxy cannot be used{self.via} ({type(error).__name__})") from None

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *how: object) -> None:
        await self._http.aclose()

    async def exchange(
        self, url: str, body: bytes | None = None, *, seconds: float, most_bytes: int
    ) -> Reply:
        """Send a GET, or a POST of `body`; the reply is there within `seconds` in all.

        Raises `NoReply`: `NotThere` where no connection could be made, `TooLong` for a body of more
        than `most_bytes`.
        """
        try:
            with anyio.fail_after(seconds):
                return await self._exchange(url, body, most_bytes)
        except TimeoutError:
            said = f"timed out: no whole reply within {seconds:g} s"
            raise NoReply(f"{said}{self.via}") from None
        except httpx2.ConnectError as error:
            raise NotThere(f"{_reason(error)}{self.via}") from None
        except httpx2.HTTPError as error:
            raise NoReply(f"{_reason(error)}{self.via}") from None
        except (httpx2.InvalidURL, ValueError) as error:  # its words may quote what was sent
            raise NoReply(f"the address cannot be asked ({type(error).__name__})") from None

    async def _exchange(self, url: str, body: bytes | None, most_bytes: int) -> Reply:
        content, cut = b"", None
        method = "GET" if body is None else "POST"
        async with self._http.stream(method, url, content=body) as answer:
            try:
                async for part in answer.aiter_raw():
                    content += part
                    if len(content) > most_bytes:
                        raise TooLong(f"the reply is longer than {most_bytes:,} bytes{self.via}")
            except httpx2.TransportError as error:
                cut = f"the reply ended early ({_reason(error)})"
            if not cut and answer.headers.get("Content-Encoding") == "gzip":  # which was not asked
                content, cut = _unpacked(content, most_bytes)
                if len(content) > most_bytes:
                    raise TooLong(f"the reply is longer than {most_bytes:,} bytes{self.via}")
            return Reply(
                status=answer.status_code,
                location=answer.headers.get("Location"),
                retry_after=_seconds(answer.headers.get("Retry-After")),
                body=content,
                cut=cut,
            )


def exchange(
    url: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    *,
    seconds: float,
    most_bytes: int,
) -> Reply:
    """One exchange as `Client` has them, for whoever has no others at the same time."""

    async def once() -> Reply:
        async with Client(url, headers) as client:
            return await client.exchange(url, body, seconds=seconds, most_bytes=most_bytes)

    with start_blocking_portal() as portal:
        return portal.call(once)


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


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for `url`; none for an address of this machine."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or _is_this_machine(host) or urllib.request.proxy_bypass(host):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _is_this_machine(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def _named(proxy: str) -> str:
    """A proxy without the user and the password that its address may hold."""
    scheme, _, rest = proxy.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


def _unpacked(content: bytes, most_bytes: int) -> tuple[bytes, str | None]:
    """What a gzip holds, one byte more than `most_bytes` of it at most, and why it ends early."""
    if not content.startswith(b"\x1f\x8b"):
        return content, None
    gzip = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        unpacked = gzip.decompress(content, most_bytes + 1)
    except zlib.error as error:
        return b"", f"its gzip is broken ({error})"
    whole = gzip.eof or len(unpacked) > most_bytes
    return unpacked, None if whole else "its gzip ends early"


def _reason(error: BaseException) -> str:
    """What the operating system said, where it said something; else what the library says."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConnectionError) and cause.errno:
            return os.strerror(cause.errno)  # asyncio has other words for it
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error) or type(error).__name__


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After in seconds from now: it is a number of them, or a date."""
    if retry_after is None:
        return None
    try:
        try:
            seconds = float(retry_after)
        except ValueError:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
    except (ValueError, OverflowError):
        return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
