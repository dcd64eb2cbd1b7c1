"""Remote images: what is fetched, and above all what is not."""

import asyncio
import contextlib
import http.server
import ipaddress
import random
import threading
import time

import pytest
from running_server import running

from stepjax.serving.errors import ApiError
from stepjax.serving.fetch import Fetcher, is_public
from stepjax.serving.threads import Threads


@pytest.mark.parametrize(
    "address",
    "127.8.9.1 169.254.169.254 239.255.255.250 ::1 fe80::1%eth0 ff02::1 ::ffff:127.0.0.1 64:ff9b::a9fe:a9fe".split(),
)
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "64:ff9b::808:808"])
def test_addresses_that_are_public(address):
    assert is_public(address)


# IANA's special-purpose address registries, whole, with multicast, what is deprecated and what is not given out.
SPECIAL_V4 = """
0.0.0.0/8 0.0.0.0/32 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.0.0/29
192.0.0.8/32 192.0.0.9/32 192.0.0.10/32 192.0.0.170/32 192.0.0.171/32 192.0.2.0/24 192.31.196.0/24 192.52.193.0/24
192.88.99.0/24 192.88.99.2/32 192.168.0.0/16 192.175.48.0/24 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24
224.0.0.0/4 240.0.0.0/4 255.255.255.255/32
""".split()
SPECIAL_V6 = """
::1/128 ::/128 ::/96 ::ffff:0:0:0/96 64:ff9b:1::/48 100::/64 100:0:0:1::/64 2001::/23 2001::/32 2001:1::1/128
2001:1::2/128 2001:1::3/128 2001:2::/48 2001:3::/32 2001:4:112::/48 2001:10::/28 2001:20::/28 2001:30::/28
2001:db8::/32 2002::/16 2620:4f:8000::/48 3fff::/20 5f00::/16 fc00::/7 fe80::/10 fec0::/10 ff00::/8 ::/3 4000::/2
8000::/1
""".split()
PUBLIC = """
1.0.0.0/8 9.255.255.0/24 100.63.255.0/24 100.128.0.0/24 126.0.0.0/8 128.0.0.0/8 172.15.255.0/24 172.32.0.0/24
192.0.1.0/24 192.88.98.0/24 192.167.255.0/24 192.169.0.0/24 198.17.255.0/24 198.20.0.0/24 223.255.255.0/24 2000::/16
2001:200::/23 2001:db7::/32 2001:db9::/32 2003::/18 2400::/12 2600::/12 2620:4f:7fff::/48 2620:4f:8001::/48
2800::/12 2a00::/12 2c00::/12
""".split()


def addresses_in(network):
    """The first, the last and some between."""
    network, spread = ipaddress.ip_network(network), random.Random(0)
    places = [0, network.num_addresses - 1, *(spread.randrange(network.num_addresses) for _ in range(20))]
    return [network[place] for place in places]


def in_ipv6(address):
    return [ipaddress.IPv6Address(first + int(address)) for first in (0xFFFF << 32, 0x64FF9B << 96)]


@pytest.mark.parametrize("network", SPECIAL_V4)
def test_special_purpose_ipv4_is_not_public(network):
    for address in addresses_in(network):
        assert not is_public(str(address)), address
        for inside in in_ipv6(address):
            assert not is_public(str(inside)), inside


@pytest.mark.parametrize("network", SPECIAL_V6)
def test_special_purpose_ipv6_is_not_public(network):
    nat64 = ipaddress.ip_network("64:ff9b::/96")  # public as the address within
    mapped = ipaddress.ip_network("::ffff:0:0/96")
    for address in addresses_in(network):
        assert address in nat64 or address in mapped or not is_public(str(address)), address


@pytest.mark.parametrize("network", PUBLIC)
def test_unicast_of_the_internet_is_public(network):
    for address in addresses_in(network):
        assert is_public(str(address)), address
        if address.version == 4:
            assert all(is_public(str(inside)) for inside in in_ipv6(address))


def test_nothing_is_public_that_python_does_not_call_global():
    """Whichever version of it this is."""
    spread = random.Random(0)
    drawn = [ipaddress.IPv4Address(spread.getrandbits(32)) for _ in range(3000)]
    drawn += [ipaddress.IPv6Address((1 << 125) + spread.getrandbits(125)) for _ in range(3000)]
    drawn += [address for network in (*SPECIAL_V4, *SPECIAL_V6, *PUBLIC) for address in addresses_in(network)]
    nat64 = ipaddress.ip_network("64:ff9b::/96")
    for address in drawn:
        if address not in nat64 and is_public(str(getattr(address, "ipv4_mapped", None) or address)):
            assert address.is_global and not (address.is_multicast or address.is_reserved), address


class Site(http.server.BaseHTTPRequestHandler):
    hosts = []

    def do_GET(self):
        self.hosts.append(self.headers["host"])
        if self.path.startswith("/to/"):
            self.send_response(302)
            target = self.path.removeprefix("/to/")
            self.send_header("location", target if "://" in target else f"/{target}")
            self.end_headers()
        elif self.path == "/missing":
            self.send_error(404)
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.05)
        elif self.path == "/slow-header":
            self.wfile.write(b"HTTP/1.0 200 OK\r\nx: ")
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.05)
        else:
            size = 5000 if self.path == "/large" else 4
            self.send_response(200)
            self.send_header("content-length", str(size + (self.path == "/short")))
            self.end_headers()
            self.wfile.write(b"x" * size)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site():
    class Quiet(http.server.ThreadingHTTPServer):
        def handle_error(self, *_):  # those who are cut off
            pass

    with Quiet(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"site.test:{server.server_port}"
        server.shutdown()


def fetch(url, *, resolve=lambda host, port: ["127.0.0.1"], allow=lambda address: True, seconds=0.5):
    async def main():
        with contextlib.closing(Threads(1, "fetches")) as threads:
            given = {} if resolve is None else {"resolve": resolve}
            return await Fetcher(threads, max_bytes=1000, seconds=seconds, allow=allow, **given).fetch(url)

    return asyncio.run(main())


def refused(url, part, **options):
    with pytest.raises(ApiError) as caught:
        fetch(url, **options)
    assert caught.value.status == 400 and part in caught.value.message, caught.value.message


def test_an_image_is_fetched_from_the_address_in_the_name_of_its_host(site):
    assert fetch(f"http://{site}/a.png?x=1#y") == b"xxxx"
    assert Site.hosts[-1] == site
    assert fetch(f"http://{site}/to/to/a.png") == b"xxxx"
    assert fetch(f"http://{site}/to/http://{site}/b.png") == b"xxxx"


def test_a_name_is_resolved_once_and_the_connection_goes_there(site):
    asked = []

    def rebinding(host, port):
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["127.0.0.2"]

    assert fetch(f"http://{site}/a.png", resolve=rebinding) == b"xxxx"
    assert asked == ["site.test"]


def test_every_address_of_every_hop_is_checked(site):
    for url in (
        f"http://{site}/a.png",
        "http://127.0.0.1:1/",
        "http://localhost/",
        "http://[::1]/",
        "http://2130706433/",
    ):
        with pytest.raises(ApiError) as caught:
            fetch(url, resolve=None, allow=is_public)
        assert "non-public" in caught.value.message or "does not resolve" in caught.value.message
    refused(f"http://{site}/a.png", "non-public", resolve=lambda *_: ["8.8.8.8", "10.0.0.1"], allow=is_public)
    public = {"site.test": ["127.0.0.1"], "inside.test": ["169.254.169.254"]}
    refused(
        f"http://{site}/to/http://inside.test/latest/meta-data",
        "non-public",
        resolve=lambda host, _: public[host],
        allow=lambda address: address == "127.0.0.1",
    )


def test_failures_are_named(site):
    refused(f"http://{site}/large", "larger than 1000 bytes")
    refused(f"http://{site}/missing", "status 404")
    refused(f"http://{site}/short", "incomplete or not HTTP")
    refused(f"http://{site}/to/to/to/to/to/a", "redirects more than 3 times")
    refused(f"http://{site}/to/ftp://x/", "http or https")
    refused("http://user:pw@site.test/", "without a user name")
    refused("http://site.test:99999/", "ValueError")
    refused("http://site.test/", "does not resolve", resolve=lambda *_: (_ for _ in ()).throw(OSError()))


@pytest.mark.parametrize("path", ["slow", "slow-header"])
def test_a_site_that_drips_is_given_up_and_its_thread_is_free(site, path):
    start = time.monotonic()
    with pytest.raises(ApiError):
        fetch(f"http://{site}/{path}")
    assert time.monotonic() - start < 1.5


def test_the_server_refuses_its_own_network(processor):
    with running(processor, allow_remote_images=True) as server:
        for url in (f"{server.url}/health", "http://169.254.169.254/latest", "file:///etc/hostname"):
            answer = server.chat([{"type": "image_url", "image_url": {"url": url}}])
            assert answer.status_code == 400 and answer.json()["error"]["code"] == "image_not_fetched", answer.text
