"""A vLLM server as a child process: started with ``vllm serve``, waited for, and stopped with all its children."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from lrq_vllm.errors import LrqError, SettingsError
from lrq_vllm.vllm_environment import serving_environment, vllm_executable

__all__ = ["NO_VLLM", "VllmServer", "log_end", "reserve_port", "start_server", "start_vllm", "vllm_command"]

NO_VLLM = "vLLM is not installed here. In a clone of lrq: pip install '.[cuda]', or '.[cpu]' without a GPU."
"""To whoever asked for something that takes it."""
_HOST = "127.0.0.1"


@dataclass(frozen=True)
class VllmServer:
    """A child process that is, or will be, a vLLM server. ``log`` is the file that takes its output."""

    url: str
    log: Path
    process: "subprocess.Popen[bytes]"

    def wait_until_ready(self, timeout_s: float = 300) -> None:
        """Return when the server answers. Raises LrqError with the log's last lines if it ends or takes too long."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise LrqError(
                    f"vLLM ended with code {self.process.returncode} before it served. Its log ends:\n{log_end(self.log)}"
                )
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        raise LrqError(f"vLLM did not answer within {timeout_s:.0f} s. Its log ends:\n{log_end(self.log)}")


def log_end(log: Path, lines: int = 25) -> str:
    """The last lines of a child's output."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def vllm_command(model: Path | str, *options: str) -> list[str]:
    """``vllm serve MODEL OPTIONS``. Raises SettingsError if there is no vLLM."""
    vllm = vllm_executable()
    if vllm is None:
        raise SettingsError(NO_VLLM)
    return [vllm, "serve", str(model), *options]


def start_vllm(model: Path, log: Path, options: Sequence[str] = ()) -> AbstractContextManager[VllmServer]:
    """:func:`start_server` with ``vllm serve``."""
    return start_server(vllm_command(model, *options), log)


@contextmanager
def start_server(command: Sequence[str], log: Path) -> Iterator[VllmServer]:
    """Start a command that takes vLLM's options on a free port of 127.0.0.1 and stop it at the end.

    It loads while the block goes on; VllmServer.wait_until_ready waits for it. No proxy that the environment names stands
    before it, for this process and those it starts.
    """
    port = reserve_port()
    hosts = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")).split(",")
    os.environ |= dict.fromkeys(("no_proxy", "NO_PROXY"), ",".join(dict.fromkeys([*filter(None, hosts), _HOST])))
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host", _HOST, "--port", str(port)],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env=serving_environment(), start_new_session=True,
        )  # fmt: skip
    try:
        yield VllmServer(f"http://{_HOST}:{port}", log, process)
    finally:
        _stop(process)


def reserve_port() -> int:
    """A port of 127.0.0.1 that is free, and that for a minute the system gives to nobody who does not name it.

    It has just had a connection. Programs that set SO_REUSEADDR, as servers do, may listen on it at once.
    """
    with socket.create_server((_HOST, 0)) as listener, socket.create_connection(listener.getsockname()):
        listener.accept()[0].close()  # who closes first waits
        return int(listener.getsockname()[1])


def _stop(process: "subprocess.Popen[bytes]", patience_s: float = 20) -> None:
    """Ask the server to end, then end whatever is left of its process group."""
    process.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
    finally:  # also for whom that takes too long
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
