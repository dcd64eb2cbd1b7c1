"""Images from the network, without letting a request reach what only this machine can: public addresses alone.

A name is resolved once for each hop, every address of it must be public, and the connection goes to the very address
that was checked, so that a name cannot point elsewhere a moment later. Redirects are followed by hand under the same
rules. Proxies of the environment are not used.
"""

import asyncio
import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable
from concurrent.futures import Executor

from stepjax.serving.errors import ApiError

MAX_REDIRECTS = 3

Resolve = Callable[[str, int], list[str]]


# IANA's registries of special-purpose addresses, and multicast. What they call globally reachable is left out, too: it
# is reached at the nearest of many machines, such as one's own gateway, and none of them has images. What `ipaddress`
# calls global differs between Python's versions.
_SPECIAL_V4 = [
    ipaddress.IPv4Network(each)
    for each in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16"),
        *("192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
    )
]
_UNICAST_V6 = ipaddress.IPv6Network("2000::/3")  # all that is given out for machines of the Internet
_SPECIAL_V6 = [
    ipaddress.IPv6Network(each)
    for each in ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20")
]
# The last 32 bits are an IPv4 address: mapped, or behind a NAT64 gateway, as names are where there is no IPv4.
_WITH_V4 = [ipaddress.IPv6Network(each) for each in ("::ffff:0:0/96", "64:ff9b::/96")]


def is_public(address: str) -> bool:
    """Whether an IP address is one of the Internet's, for one machine."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if not any(ip in network for network in _WITH_V4):
            return ip in _UNICAST_V6 and not any(ip in network for network in _SPECIAL_V6)
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return not any(ip in network for network in _SPECIAL_V4)


class Fetcher:
    """Fetches images in threads."""

    def __init__(
        self, executor: Executor, *, max_bytes: int, seconds: float, resolve: Resolve | None = None, allow=is_public
    ):
        """
        Args:
            max_bytes: of one image.
            seconds: for one image, redirects included.
            resolve: from host and port to addresses.
            allow: whether an address may be connected to.
        """
        self._executor = executor
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._resolve = resolve or _resolve
        self._allow = allow

    async def fetch(self, url: str) -> bytes:
        """
        Raises:
            ApiError: 400, the URL may not or cannot be fetched, or is too large or too slow.
        """
        deadline = time.monotonic() + self._seconds
        loop = asyncio.get_running_loop()
        try:
            # Threads cannot be cancelled: what a name server takes is not waited for, and what follows has a time-out.
            async with asyncio.timeout(self._seconds + 1):
                return await loop.run_in_executor(self._executor, self._fetch, url, deadline)
        except TimeoutError:
            raise self._error(url, f"it takes longer than {self._seconds:g} seconds") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._error(url, f"{type(error).__name__}") from error

    def _fetch(self, url: str, deadline: float) -> bytes:
        target = url
        for _ in range(MAX_REDIRECTS + 1):
            status, location, data = self._get(target, deadline)
            if status not in (301, 302, 303, 307, 308):
                if status != 200:
                    raise self._error(url, f"it answers with status {status}")
                return data
            if not location:
                raise self._error(url, "it redirects to nowhere")
            target = urllib.parse.urljoin(target, location)
        raise self._error(url, f"it redirects more than {MAX_REDIRECTS} times")

    def _get(self, url: str, deadline: float) -> tuple[int, str | None, bytes]:
        parts = urllib.parse.urlsplit(url)
        host, is_tls = parts.hostname, parts.scheme == "https"
        if parts.scheme not in ("http", "https") or not host or parts.username is not None:
            raise self._error(url, "give an http or https URL without a user name")
        port = parts.port or (443 if is_tls else 80)
        address = self._checked_address(url, host, port)
        connection = _Pinned(host, port, address, deadline, is_tls)
        # Time-outs of a socket are for one operation each; a server that sends byte by byte would never meet one.
        end = threading.Timer(max(deadline - time.monotonic(), 0), connection.abort)
        end.start()
        try:
            path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
            path = urllib.parse.quote(path, safe="/%:?#[]@!$&'()*+,;=~")
            connection.request("GET", path, headers={"accept": "image/*", "user-agent": "stepjax"})
            response = connection.getresponse()
            if response.status != 200:
                return response.status, response.headers.get("location"), b""
            data = bytearray()
            while chunk := response.read1(65536):
                data += chunk
                if len(data) > self._max_bytes:
                    raise self._error(url, f"it is larger than {self._max_bytes} bytes")
            if response.length or time.monotonic() > deadline:
                raise self._error(url, "it does not arrive whole, or in time")
            return 200, None, bytes(data)
        finally:
            end.cancel()
            connection.close()

    def _checked_address(self, url: str, host: str, port: int) -> str:
        try:
            addresses = self._resolve(host, port)
        except (OSError, UnicodeError):
            raise self._error(url, "its host is not known") from None
        if not addresses or not all(self._allow(address) for address in addresses):
            raise self._error(url, "its host has an address that is not public")
        return addresses[0]

    def _error(self, url: str, reason: str) -> ApiError:
        return ApiError(400, f"image {url[:200]}: {reason}", param="messages", code="image_not_fetched")


class _Pinned(http.client.HTTPConnection):
    """A connection to an address, in the name of a host, that ends at a deadline."""

    def __init__(self, host: str, port: int, address: str, deadline: float, is_tls: bool):
        super().__init__(host, port)
        self.default_port = 443 if is_tls else 80  # left out of the header `host`
        self._address = address
        self._deadline = deadline
        self._is_tls = is_tls
        self._open: socket.socket | None = None

    def connect(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._open = self.sock = socket.create_connection((self._address, self.port), left)
        if self._is_tls:
            context = ssl.create_default_context()
            self._open = self.sock = context.wrap_socket(
                self.sock, server_hostname=self.host, do_handshake_on_connect=False
            )
            self.sock.do_handshake()

    def abort(self) -> None:
        """From another thread: ends what is being read."""
        if self._open is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._open, socket.SHUT_RDWR)  # TLS's own would change what is being read


def _resolve(host: str, port: int) -> list[str]:
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
