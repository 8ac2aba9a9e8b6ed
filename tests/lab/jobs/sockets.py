"""Sockets between the job's own processes, or to nobody. Put after counting.py."""

# ruff: noqa: F821, PTH108
import asyncio
import os
import socket
import ssl
import struct
import sys
import time
from contextlib import suppress


def echoes(one, other, size=8):
    """A child sends back what the parent says."""
    if os.fork() == 0:
        one.close()
        while True:
            other.sendall(whole(other, size))
    other.close()

    def step(number):
        said = number.to_bytes(8, "big") * (size // 8)
        one.sendall(said)
        if whole(one, size) != said:
            bad("heard something else than", number)

    count(step)


def backlog(family, address, clients=1, say=b""):
    """Connections that wait to be accepted, each with what its client has said; accepted after a while."""
    server = socket.socket(family, socket.SOCK_STREAM)
    server.bind(address)
    server.listen(16)
    waiting = []
    for _ in range(clients):
        client = socket.socket(family, socket.SOCK_STREAM)
        client.connect(address)
        if say:
            client.sendall(say)
        waiting.append(client)
    accepted = []

    def step(number):
        if number < 1500 or len(accepted) == clients:
            return
        server.settimeout(5)
        try:
            connection, _ = server.accept()
        except TimeoutError:
            bad("the connection that waited is gone")
        accepted.append(connection)
        if say and connection.recv(len(say)) != say:
            bad("what it had said is gone")

    count(step, gap=0.01)


@situation
def unix_stream_pair():
    echoes(*socket.socketpair())


@situation
def unix_stream_pair_with_much_to_say():
    echoes(*socket.socketpair(), size=1 << 18)


@situation
def unix_packets_pair():
    echoes(*socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))


@situation
def unix_datagram_pair():
    echoes(*socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))


@situation
def unix_datagrams_by_name():
    server = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    server.bind("/tmp/datagrams")
    client = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    client.bind("/tmp/datagrams.client")
    client.connect("/tmp/datagrams")

    def step(number):
        client.send(number.to_bytes(8, "big"))
        data, peer = server.recvfrom(8)
        if (data, peer) != (number.to_bytes(8, "big"), "/tmp/datagrams.client"):
            bad("another datagram", data, peer)

    count(step)


@situation
def unix_stream_by_name():
    server = socket.socket(socket.AF_UNIX)
    server.bind("/tmp/named")
    server.listen()

    def step(number):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect("/tmp/named")
            accepted, _ = server.accept()
            client.sendall(b"x")
            if whole(accepted, 1) != b"x":
                bad("another byte")
            accepted.close()

    count(step, gap=0.2)


@situation
def unix_stream_of_an_abstract_name():
    server = socket.socket(socket.AF_UNIX)
    server.bind("\0abstract")
    server.listen()
    client = socket.socket(socket.AF_UNIX)
    client.connect("\0abstract")
    accepted, _ = server.accept()
    echoes(client, accepted)


@situation
def unix_socket_whose_name_is_gone():
    server = socket.socket(socket.AF_UNIX)
    server.bind("/tmp/gone.sock")
    server.listen()
    client = socket.socket(socket.AF_UNIX)
    client.connect("/tmp/gone.sock")
    accepted, _ = server.accept()
    os.unlink("/tmp/gone.sock")
    echoes(client, accepted)


@situation
def unix_stream_with_unread_data():
    one, other = socket.socketpair()
    one.sendall(bytes(range(256)) * 100)

    def step(number):
        if whole(other, 256) != bytes(range(256)):
            bad("other data")
        one.sendall(bytes(range(256)))

    count(step)


@situation
def unix_stream_closed_by_its_peer_with_data_left():
    one, other = socket.socketpair()
    one.sendall(b"last words")
    one.close()

    def step(number):
        if number == 1500 and (whole(other, 10) != b"last words" or other.recv(1) != b""):
            bad("the last words are others")

    count(step, gap=0.01)


@situation
def unix_backlog():
    backlog(socket.AF_UNIX, "/tmp/backlog")


@situation
def unix_backlog_with_data():
    backlog(socket.AF_UNIX, "/tmp/backlog", say=b"hello")


@situation
def tcp_backlog():
    backlog(socket.AF_INET, ("127.0.0.1", 7031), clients=3)


@situation
def tcp_backlog_with_data():
    backlog(socket.AF_INET, ("127.0.0.1", 7032), clients=2, say=b"hello")


@situation
def descriptors_on_their_way():
    """A pipe's end is sent over a socket, and not received yet: SCM_RIGHTS."""
    one, other = socket.socketpair()
    near, far = os.pipe()
    socket.send_fds(one, [b"x"], [far])
    os.close(far)

    def step(number):
        if number == 1500:
            _, [got], _, _ = socket.recv_fds(other, 1, 1)
            os.write(got, b"through")
            if os.read(near, 7) != b"through":
                bad("another pipe")

    count(step, gap=0.01)


@situation
def listeners_of_one_port():
    """SO_REUSEPORT: two sockets listen at one port."""
    servers = []
    for _ in range(2):
        server = socket.socket()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind(("127.0.0.1", 7033))
        server.listen()
        servers.append(server)

    def step(number):
        if [one.getsockname() for one in servers] != [("127.0.0.1", 7033)] * 2:
            bad("other names")

    count(step)


@situation
def listener_of_ipv6_alone():
    server = socket.socket(socket.AF_INET6)
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    server.bind(("::1", 7034))
    server.listen()
    keeps("the listener", ("::1", 7034, 0, 0), server.getsockname)


@situation
def listener_of_every_address():
    server = socket.create_server(("0.0.0.0", 7035), backlog=77)
    keeps("the listener", ("0.0.0.0", 7035), server.getsockname)


@situation
def bound_and_not_listening():
    server = socket.socket()
    server.bind(("127.0.0.1", 7036))
    keeps("the socket", ("127.0.0.1", 7036), server.getsockname)


@situation
def unbound_tcp_socket():
    one = socket.socket()
    keeps("the socket", ("0.0.0.0", 0), one.getsockname)


@situation
def tcp_with_data_and_an_end():
    """The peer has written and closed; nobody has read it yet: CLOSE_WAIT."""
    with socket.create_server(("127.0.0.1", 7037)) as server:
        client = socket.create_connection(("127.0.0.1", 7037))
        accepted, _ = server.accept()
    client.sendall(b"last words")
    client.close()

    def step(number):
        if number == 1500 and (whole(accepted, 10) != b"last words" or accepted.recv(1) != b""):
            bad("the last words are others")

    count(step, gap=0.01)


def tcp_over():
    """A connection over 127.0.0.1, and the socket that has accepted it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        return client, server.accept()[0]


@situation
def tcp_closed_by_both_with_data_left():
    """As whoever reads to the end after shutdown(SHUT_WR): both ends are closed, and what came is not read yet."""
    client, accepted = tcp_over()
    client.shutdown(socket.SHUT_WR)
    if accepted.recv(1):
        bad("more than the end")
    accepted.sendall(b"last words" * 10000)
    accepted.close()

    def step(number):
        if number == 1500 and (whole(client, 100000) != b"last words" * 10000 or client.recv(1) != b""):
            bad("the last words are others")

    count(step, gap=0.01)


@situation
def tcp_closed_with_more_data_than_its_reader_takes():
    """One end is closed, with data left that the other, whose queue is full, does not read."""
    client, accepted = tcp_over()
    client.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            client.send(bytes(65536))
    client.close()
    count(lambda number: accepted.fileno())


@situation
def tcp_answered_after_its_end():
    """One end has said all and waits for an answer that comes much later."""
    client, accepted = tcp_over()
    client.sendall(b"question")
    client.shutdown(socket.SHUT_WR)

    def step(number):
        if number == 1500:
            if whole(accepted, 8) != b"question" or accepted.recv(1) != b"":
                bad("another question")
            accepted.sendall(b"answer")
            accepted.close()
            if whole(client, 6) != b"answer" or client.recv(1) != b"":
                bad("another answer")

    count(step, gap=0.01)


@situation
def tcp_closed_by_both_and_never_read():
    """It is closed by both, with both ends open in the job: each has still something to read."""
    client, accepted = tcp_over()
    for one in (client, accepted):
        one.sendall(b"last words")
        one.shutdown(socket.SHUT_WR)

    def step(number):
        if number == 1500:
            for one in (client, accepted):
                if whole(one, 10) != b"last words" or one.recv(1) != b"":
                    bad("the last words are others")

    count(step, gap=0.01)


@situation
def unix_packets_unread():
    """Of a SOCK_SEQPACKET, whose borders are to be kept, as is the end after them."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for size in (1, 100, 3000):
        one.send(bytes(size))
    one.close()

    def step(number):
        if number == 1500 and [len(other.recv(9000)) for _ in range(4)] != [1, 100, 3000, 0]:
            bad("other packets")

    count(step, gap=0.01)


@situation
def unix_stream_half_closed():
    one, other = socket.socketpair()
    one.sendall(b"question")
    one.shutdown(socket.SHUT_WR)

    def step(number):
        if number == 1500:
            if whole(other, 8) != b"question" or other.recv(1) != b"":
                bad("another question")
            other.sendall(b"answer")
            if whole(one, 6) != b"answer":
                bad("another answer")

    count(step, gap=0.01)


@situation
def listener_with_fast_open():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.IPPROTO_TCP, 23, 16)
        keeps("TCP_FASTOPEN", 16, lambda: server.getsockopt(socket.IPPROTO_TCP, 23))


@situation
def tcp_options_of_a_pair():
    """What was chosen for a connection, at either end."""
    options = {
        "user timeout": (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 12345),
        "not sent": (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 4096),
        "type of service": (socket.IPPROTO_IP, socket.IP_TOS, 16),
        "no delay": (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        "idle": (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 77),
    }
    ends = tcp_over()
    for one in ends:
        for level, name, value in options.values():
            one.setsockopt(level, name, value)

    def read():
        return [[one.getsockopt(level, name) for level, name, _ in options.values()] for one in ends]

    keeps("options", read(), read)


@situation
def tcp_many_pairs():
    with socket.create_server(("127.0.0.1", 7038), backlog=200) as server:
        pairs = []
        for _ in range(60):
            client = socket.create_connection(("127.0.0.1", 7038))
            pairs.append((client, server.accept()[0]))

        def step(number):
            one, other = pairs[number % 60]
            one.sendall(number.to_bytes(8, "big"))
            if int.from_bytes(whole(other, 8), "big") != number:
                bad("another number")

        count(step)


@situation
def tcp_to_an_address_of_loopback():
    """127.0.0.9, which is no interface's own."""
    with socket.create_server(("127.0.0.9", 7039)) as server:
        client = socket.create_connection(("127.0.0.9", 7039))
        accepted, _ = server.accept()
    echoes(client, accepted)


@situation
def tls_within_the_job():
    """TLS keeps its state in memory, and takes no byte twice."""

    def context(side):
        # Without a certificate, of which the container has none: a key exchange that proves no name.
        made = ssl.SSLContext(side)
        made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
        made.maximum_version = ssl.TLSVersion.TLSv1_2
        made.set_ciphers("AECDH-AES128-SHA:@SECLEVEL=0")
        return made

    with socket.create_server(("127.0.0.1", 7040)) as server:
        if os.fork() == 0:
            client = context(ssl.PROTOCOL_TLS_CLIENT)
            with client.wrap_socket(socket.create_connection(("127.0.0.1", 7040))) as secure:
                while True:
                    secure.sendall(whole(secure, 8))
        secure = context(ssl.PROTOCOL_TLS_SERVER).wrap_socket(server.accept()[0], server_side=True)

    def step(number):
        secure.sendall(number.to_bytes(8, "big"))
        if int.from_bytes(whole(secure, 8), "big") != number:
            bad("another number")

    count(step)


@situation
def asyncio_server_and_client():
    async def serve(reader, writer):
        while line := await reader.readline():
            writer.write(line)
            await writer.drain()

    async def main():
        server = await asyncio.start_server(serve, "127.0.0.1", 7041)
        reader, writer = await asyncio.open_connection("127.0.0.1", 7041)
        number = 0
        async with server:
            while True:
                writer.write(b"%d\n" % number)
                if (heard := await asyncio.wait_for(reader.readline(), 60)) != b"%d\n" % number:
                    bad("heard", heard)
                print(number, time.monotonic_ns(), flush=True)
                number += 1
                await asyncio.sleep(0.02)

    asyncio.run(main())


@situation
def netlink_of_routes():
    one = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    one.bind((0, 0))

    def step(number):
        one.send(struct.pack("IHHIIBxHiII", 32, 18, 0x301, number, 0, 0, 0, 0, 0, 0))  # RTM_GETLINK, all
        while struct.unpack_from("IHH", data := one.recv(65536))[1] != 3:  # NLMSG_DONE
            if struct.unpack_from("I", data, 8)[0] != number:
                bad("another answer")

    count(step, gap=0.1)


@situation
def raw_socket():
    try:
        one = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    except PermissionError:
        one = None  # as in containers without CAP_NET_RAW
    count(lambda number: one and one.fileno())


@situation
def packet_socket():
    try:
        one = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
    except PermissionError:
        one = None
    count(lambda number: one and one.fileno())


@situation
def socket_of_the_kernels_ciphers():
    """AF_ALG."""
    with suppress(OSError):
        one = socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)
        one.bind(("hash", "sha256"))
    count(nothing)


@situation
def udp_connected_to_nobody():
    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    one.connect(("127.0.0.1", 7042))
    mine = one.getsockname()
    keeps("the socket", (mine, ("127.0.0.1", 7042)), lambda: (one.getsockname(), one.getpeername()))


@situation
def udp_with_unread_datagrams():
    """UDP promises nothing: the datagrams may be there or not, and the next ones arrive."""
    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    one.bind(("127.0.0.1", 7043))
    other = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for _ in range(5):
        other.sendto(bytes(8), ("127.0.0.1", 7043))
    one.settimeout(0.2)

    def step(number):
        for _ in range(20):
            other.sendto(number.to_bytes(8, "big"), ("127.0.0.1", 7043))
            with suppress(TimeoutError):
                while int.from_bytes(one.recv(8), "big") != number:
                    pass
                return
        bad("nothing arrives")

    count(step)


SITUATIONS[sys.argv[1]]()
