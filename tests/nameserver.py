"""A name server whose answers a test sets, over UDP and TCP."""

from __future__ import annotations

import os
import socket
import struct
import threading
from contextlib import suppress
from typing import Self

import dns.flags
import dns.message
import dns.rcode
import dns.rrset


class NameServer:
    """Answers with the records that `records` has by name and type, as `10 1 80 a.test.` for SRV; without any there is
    no such name. `rcode` answers every question, `is_silent` none; `is_cut`: over UDP all answers are too large;
    `is_odd`: they make no sense."""

    def __init__(self) -> None:
        self.records: dict[tuple[str, str], list[str]] = {}
        self.ttl = 1
        self.rcode: str | None = None
        self.is_silent = self.is_cut = self.is_odd = False
        self.asked: list[str] = []
        self.port = 0
        self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        while not self.port:
            self._tcp = socket.create_server(("127.0.0.1", 0))
            try:
                self._udp.bind(self._tcp.getsockname())
                self.port = self._tcp.getsockname()[1]
            except OSError:  # somebody has it, who speaks UDP alone
                self._tcp.close()
        self._threads = [
            threading.Thread(target=each, name="nameserver") for each in (self._serve_udp, self._serve_tcp)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self._udp, self._tcp):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._udp.close()
        self._tcp.close()

    def _serve_udp(self) -> None:
        with suppress(OSError):  # shut down
            while data := (received := self._udp.recvfrom(4096))[0]:
                if (answer := self._answer(data, self.is_cut)) is not None:
                    self._udp.sendto(answer, received[1])

    def _serve_tcp(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._tcp.accept()
                with sock:
                    with suppress(OSError, struct.error):  # it has gone
                        (size,) = struct.unpack("!H", sock.recv(2, socket.MSG_WAITALL))
                        answer = self._answer(sock.recv(size, socket.MSG_WAITALL), False) or b""
                        sock.sendall(struct.pack("!H", len(answer)) + answer)

    def _answer(self, data: bytes, is_cut: bool) -> bytes | None:
        query = dns.message.from_wire(data)
        (question,) = query.question
        name, kind = question.name.to_text(omit_final_dot=True), question.rdtype.name
        self.asked.append(f"{name} {kind}")
        if self.is_silent:
            return None
        if self.is_odd:
            return data[:2] + os.urandom(len(self.asked) % 400)
        answer = dns.message.make_response(query)
        records = self.records.get((name, kind))
        if self.rcode is not None:
            answer.set_rcode(dns.rcode.from_text(self.rcode))
        elif is_cut:
            answer.flags |= dns.flags.TC
        elif records:
            answer.answer = [dns.rrset.from_text_list(question.name, self.ttl, "IN", kind, records)]
        elif name not in {known for known, _ in self.records}:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        return answer.to_wire()
