"""The tests of evaluation cannot reach another machine, and the guard that sees to it is on without being asked for."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

ELSEWHERE = "192.0.2.1"  # reserved for documentation (RFC 5737): nobody is there


@pytest.mark.parametrize(
    "ask",
    [
        lambda: socket.create_connection((ELSEWHERE, 80), timeout=0.2),
        lambda: socket.socket().connect((ELSEWHERE, 80)),
        lambda: socket.socket().connect_ex((ELSEWHERE, 80)),
        lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", (ELSEWHERE, 80)),
        lambda: socket.getaddrinfo("huggingface.co", 443),
        lambda: socket.gethostbyname("huggingface.co"),
    ],
)
def test_other_machines_are_refused(ask: Callable[[], Any], request: pytest.FixtureRequest) -> None:
    assert "offline" in request.fixturenames
    with pytest.raises(pytest.fail.Exception, match="the network was asked"):
        ask()
    request.getfixturevalue("offline").clear()


def test_an_attempt_in_another_thread_is_seen(request: pytest.FixtureRequest) -> None:
    def ask() -> None:
        with pytest.raises(pytest.fail.Exception):
            socket.create_connection((ELSEWHERE, 80), timeout=0.2)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    asked = request.getfixturevalue("offline")
    assert asked == [ELSEWHERE]
    asked.clear()


def test_this_machine_may_be_talked_to() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), timeout=5):
        connection, _ = server.accept()
        connection.close()
