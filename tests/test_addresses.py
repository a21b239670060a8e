"""Addresses are values: however one is written, it is the same client, trusted or not, and shown in one way."""

from __future__ import annotations

import ipaddress
import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import Start, exchange, get, wait_until
from wire import WireBackend

from balancer.control import neighbours
from balancer.protocol import addresses
from balancer.protocol.addresses import client_address, is_in_networks, is_loopback, parse_network, plain, told_clients

TRUSTED = (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/8"))


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.1.2.3", True),
        ("11.0.0.1", False),
        ("::ffff:10.1.2.3", True),
        ("fd00::1", True),
        ("fd00::1%eth0", True),
        ("fe80::1", False),
        ("unknown", False),
        ("", False),
        ("010.1.2.3", False),
    ],
)
def test_networks_match_addresses_of_either_family(address: str, expected: bool) -> None:
    assert is_in_networks(address, TRUSTED) is expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("192.0.2.1:80", "192.0.2.1"),
        ("[2001:DB8::1]:80", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("192.0.2.1:_hidden", "192.0.2.1"),  # RFC 7239 section 6.3
        ("[::ffff:192.0.2.1]:80", "192.0.2.1"),
        ("2001:db8::1:80", "2001:db8::1:80"),  # without brackets that is no port
        *(("[2001:db8::1", None), ("[192.0.2.1]x", None), ("192.0.2.1:80:80", None), ("unknown", None), ("_a", None)),
    ],
)
def test_an_address_may_be_written_in_many_ways(text: str, value: str | None) -> None:
    found = addresses.parse(text)
    assert (found and str(found)) == value


@given(st.ip_addresses(v=6))
def test_a_customer_is_a_64(address: ipaddress.IPv6Address) -> None:
    network = str(ipaddress.ip_network((address, 64), strict=False).network_address)
    assert addresses.network_of(str(address)) == (str(address.ipv4_mapped) if address.ipv4_mapped else network)


def test_ipv4_in_ipv6_is_ipv4_wherever_it_is_looked_at() -> None:
    assert plain("::ffff:192.0.2.1") == "192.0.2.1" and plain("2001:DB8:0::1") == "2001:db8::1"
    assert addresses.network_of("::ffff:192.0.2.1") == "192.0.2.1"
    assert addresses.network_of("2001:db8::1") == addresses.network_of("2001:db8::2")
    assert addresses.network_of("fe80::1%eth0") == "fe80::" and addresses.network_of("made:up") == "made:up"
    assert is_loopback("::ffff:127.0.0.1") and not is_loopback("::ffff:192.0.2.1")
    assert is_in_networks("10.1.2.3", [parse_network("::ffff:10.0.0.0/104")])


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "client"),
    [
        ("192.0.2.1", "", "192.0.2.1"),
        ("192.0.2.1", "203.0.113.5", "192.0.2.1"),  # anybody can claim that
        ("10.0.0.1", "", "10.0.0.1"),
        ("10.0.0.1", "203.0.113.5", "203.0.113.5"),
        ("10.0.0.1", "198.51.100.1, 203.0.113.5", "203.0.113.5"),
        ("10.0.0.1", "203.0.113.5,10.0.0.2 ,10.0.0.3", "203.0.113.5"),
        ("10.0.0.1", "10.0.0.2", "10.0.0.2"),
        ("10.0.0.1", "made up, 10.0.0.2", "10.0.0.2"),
        ("10.0.0.1", "203.0.113.5:4711", "203.0.113.5"),
        ("10.0.0.1", "[2001:db8::5]:4711, 10.0.0.2:80", "2001:db8::5"),
        ("10.0.0.1", '"[2001:db8::5]:4711", , 10.0.0.2,', "2001:db8::5"),
        ("fd00::1", "2001:DB8:0::5", "2001:db8::5"),
        ("::ffff:10.0.0.1", "203.0.113.5", "203.0.113.5"),
        ("10.0.0.1", "fe80::5%eth0", "fe80::5"),
        ("10.0.0.1", 'fe80::5% "GET / HTTP/1.1" 200 \x9b31m', "fe80::5"),  # a zone may be any text
    ],
)
def test_the_client_is_the_nearest_address_that_is_not_a_trusted_proxy(
    peer: str, forwarded_for: str, client: str
) -> None:
    assert client_address(peer, forwarded_for, TRUSTED) == client
    assert client_address(peer, forwarded_for, ()) == peer


@pytest.mark.parametrize(
    ("forwarded", "told"),
    [
        ([b"for=192.0.2.1"], "192.0.2.1"),
        ([b'host="a, b";For="[2001:db8::1]:80"; proto=http, for=192.0.2.1:1'], "[2001:db8::1]:80,192.0.2.1:1"),
        ([b"for=192.0.2.1", b"for=_hidden", b"proto=http"], "192.0.2.1,_hidden,"),
        ([b'for=192.0.2.1;x=", for=192.0.2.2;host="a"'], ""),  # an open quote, before what the next proxy has added
        ([b'host="x;for=192.0.2.1"'], ""),
    ],
)
def test_clients_are_told_in_forwarded_too(forwarded: list[bytes], told: str) -> None:
    """RFC 7239 section 4."""
    fields = {b"forwarded": forwarded}
    assert told_clients(lambda name: fields.get(name, ())) == told
    fields[b"x-forwarded-for"] = [b"192.0.2.7", b"192.0.2.8"]
    assert told_clients(lambda name: fields.get(name, ())) == "192.0.2.7,192.0.2.8"


def test_a_client_of_ipv4_is_one_where_we_listen_on_all_addresses(start: Start, scripted: WireBackend) -> None:
    balancer = start("--host=::")
    exchange(balancer.port, get(b"/", b"X-Forwarded-For: 192.0.2.1"))
    assert scripted.requests[-1].values(b"x-forwarded-for") == [b"127.0.0.1"]


@pytest.mark.parametrize("told", [b"X-Forwarded-For: %s", b'Forwarded: for="%s"'])
def test_the_access_log_names_the_client_of_a_trusted_proxy(
    start: Start, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], told: bytes
) -> None:
    balancer = start("--host=::", "--trusted-proxies=127.0.0.0/8", "--access-log")
    seen = ""
    for node, client in ((b"192.0.2.9:4711", "192.0.2.9"), (b"[2001:db8::9]:4711", "2001:db8::9")):
        exchange(balancer.port, get(b"/", told % node))

        def is_logged(client: str = client) -> bool:
            nonlocal seen
            seen += capfd.readouterr().out
            return f" {client} " in seen

        wait_until(is_logged, what=f"{client} is logged")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_whose_socket_it_is_is_told(host: str) -> None:
    """Also of an IPv6 socket that speaks IPv4."""
    family = socket.AF_INET6 if host == "::1" else socket.AF_INET
    with socket.create_server(("::1" if host == "::1" else "127.0.0.1", 0), family=family) as listener:
        with socket.create_connection((host, listener.getsockname()[1])), listener.accept()[0] as accepted:
            peer, port = accepted.getpeername()[:2]
            assert neighbours.owner(peer, str(port)) == os.geteuid() and neighbours.is_ours(peer, str(port))
    assert neighbours.owner(host, "x") is neighbours.owner("nobody", "1") is None


def test_an_end_of_an_earlier_connection_owns_nothing() -> None:
    """It was taken for one of root's, and a proxy's worker that had its port again for root."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname()) as client:
            accepted = listener.accept()[0]
            port = str(client.getsockname()[1])
        accepted.close()
    wait_until(lambda: neighbours.owner("127.0.0.1", port) is None)
