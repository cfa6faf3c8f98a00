"""Ports of servers that are started for a benchmark or a test."""

import socket

import pytest

from lrq_server.vllm_process import reserve_port


def test_a_reserved_port_is_given_to_those_alone_who_name_it_as_servers_do() -> None:
    port = reserve_port()
    with socket.socket() as other, pytest.raises(OSError):
        other.bind(("127.0.0.1", port))  # what the system finds taken here, it does not give away
    with socket.create_server(("127.0.0.1", port)) as server:
        assert server.getsockname()[1] == port
