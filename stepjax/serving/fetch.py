"""Fetches images from public addresses only, so that a request cannot reach hosts only this machine can (SSRF).

Each hop resolves its name once. All its addresses must be public, and the connection goes to the address that was
checked, so the name cannot be rebound in between. Redirects follow the same rules. Client libraries resolve names
themselves and read proxies from the environment, so this speaks HTTP with h11 (a uvicorn dependency) over an asyncio
connection. An allow-list of hosts would not do: users send images from anywhere.
"""

import asyncio
import functools
import ipaddress
import socket
import ssl
import urllib.parse
from collections.abc import Callable

import h11

from stepjax.serving.errors import invalid
from stepjax.serving.threads import Threads

_MAX_REDIRECTS = 3
_READ_BYTES = 65536

# IANA's special-purpose address registries, and multicast. Anycast addresses are refused too, although the registries
# call them globally reachable: the nearest machine may be the local gateway. `ipaddress.is_global` differs between
# Python versions.
_SPECIAL_V4 = [
    ipaddress.IPv4Network(each)
    for each in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16"),
        *("192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
    )
]
_UNICAST_V6 = ipaddress.IPv6Network("2000::/3")  # global unicast
_SPECIAL_V6 = [
    ipaddress.IPv6Network(each)
    for each in ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20")
]
# The last 32 bits are an IPv4 address: IPv4-mapped, or NAT64.
_WITH_V4 = [ipaddress.IPv6Network(each) for each in ("::ffff:0:0/96", "64:ff9b::/96")]


def is_public(address: str) -> bool:
    """Whether an IP address is public unicast."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if not any(ip in network for network in _WITH_V4):
            return ip in _UNICAST_V6 and not any(ip in network for network in _SPECIAL_V6)
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return not any(ip in network for network in _SPECIAL_V4)


def resolve(host: str, port: int) -> list[str]:
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


class Fetcher:
    def __init__(
        self,
        threads: Threads,
        *,
        max_bytes: int,
        seconds: float,
        resolve: Callable[[str, int], list[str]] = resolve,
        allow: Callable[[str], bool] = is_public,
    ):
        """
        Args:
            threads: run DNS lookups, which cannot be cancelled.
            max_bytes: per image.
            seconds: per image, redirects included.
            resolve: host and port -> addresses.
            allow: whether connecting to an address is allowed.
        """
        self._threads, self._max_bytes, self._seconds = threads, max_bytes, seconds
        self._resolve, self._allow = resolve, allow

    async def fetch(self, url: str) -> bytes:
        """Raises ApiError: 400, the URL is not allowed, cannot be fetched, or is too large or too slow."""
        target = url
        try:
            async with asyncio.timeout(self._seconds):
                for _ in range(_MAX_REDIRECTS + 1):
                    status, location, data = await self._get(target)
                    if status not in (301, 302, 303, 307, 308):
                        if status != 200:
                            raise _Refused(f"the response has status {status}")
                        return data
                    if not location:
                        raise _Refused("it redirects without a location")
                    target = urllib.parse.urljoin(target, location)
                raise _Refused(f"it redirects more than {_MAX_REDIRECTS} times")
        except TimeoutError:
            reason = f"it takes longer than {self._seconds:g} seconds"
        except h11.RemoteProtocolError:
            reason = "the response is incomplete or not HTTP"
        except _Refused as error:
            reason = str(error)
        except (OSError, ValueError, h11.LocalProtocolError) as error:
            reason = type(error).__name__
        raise invalid(f"image {url[:200]}: {reason}", "messages", "image_not_fetched")

    async def _get(self, url: str) -> tuple[int, str | None, bytes]:
        """Status, location and, if the status is 200, the body."""
        parts = urllib.parse.urlsplit(url)
        is_tls = parts.scheme == "https"
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise _Refused("give an http or https URL without a user name")
        port = parts.port or (443 if is_tls else 80)
        host, address = await self._checked_address(parts.hostname, port)
        path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        named = f"[{host}]" if ":" in host else host
        headers = {
            "host": named if port == (443 if is_tls else 80) else f"{named}:{port}",
            "accept": "image/*",
            "accept-encoding": "identity",
            "user-agent": "stepjax",
            "connection": "close",
        }
        target = urllib.parse.quote(path, safe="/%:?#[]@!$&'()*+,;=~")
        request = h11.Request(method="GET", target=target, headers=list(headers.items()))
        tls = {"ssl": await self._threads.run(_tls_context), "server_hostname": host} if is_tls else {}
        reader, writer = await asyncio.open_connection(address, port, **tls)
        try:
            connection = h11.Connection(h11.CLIENT)
            writer.write((connection.send(request) or b"") + (connection.send(h11.EndOfMessage()) or b""))
            return await self._answer(connection, reader)
        finally:
            writer.transport.abort()

    async def _answer(self, connection: h11.Connection, reader: asyncio.StreamReader) -> tuple[int, str | None, bytes]:
        status, data = 0, bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(_READ_BYTES))
            elif isinstance(event, h11.Response):
                status = event.status_code
                if status != 200:
                    return status, dict(event.headers).get(b"location", b"").decode("latin-1"), b""
            elif isinstance(event, h11.Data):
                data += event.data
                if len(data) > self._max_bytes:
                    raise _Refused(f"it is larger than {self._max_bytes} bytes")
            elif isinstance(event, h11.EndOfMessage):
                return status, None, bytes(data)

    async def _checked_address(self, host: str, port: int) -> tuple[str, str]:
        """The host in ASCII, and the address to connect to."""
        try:
            host = host.encode("idna").decode("ascii")
            addresses = await self._threads.run(self._resolve, host, port)
        except (OSError, UnicodeError):
            raise _Refused("its host does not resolve") from None
        if not addresses or not all(self._allow(address) for address in addresses):
            raise _Refused("its host has a non-public address")
        return host, addresses[0]


class _Refused(Exception):
    """The image's URL, or the response to it, is not acceptable."""


@functools.cache
def _tls_context() -> ssl.SSLContext:
    return ssl.create_default_context()
