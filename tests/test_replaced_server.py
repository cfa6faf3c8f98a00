"""A rolling update for real: two servers of the CPU image behind vLLM's router, one replaced while clients ask."""

import asyncio
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
import torch
import yaml

from lrq_server.vllm_process import VllmServer, reserve_port
from tests.checkpoints import Checkpoints
from tests.images import ROOT, Image, Images

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(torch.cuda.is_available(), reason="two servers of the CPU image"),
]

COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.replicas.yaml").read_text())
# Clients pause between requests: on two cores a server must find time to start beside another one that answers.
CLIENTS, PAUSE_S, BEFORE, AFTER, NEW_TOKENS = 4, 0.5, 12, 12, 12
SHARED_CORES = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
OPTIONS = ("--max-model-len", "256", "--enforce-eager", "--host", "127.0.0.1")


@pytest.fixture(scope="module")
def models(images: Images, checkpoints: Checkpoints) -> dict[str, Path]:
    """/models: what is served, and what will be."""
    return {
        name: shutil.copytree(checkpoints(scheme, "lrq"), images.folder / "models" / name)
        for name, scheme in (("old", "w8a8"), ("new", "w4a16"))
    }


@contextmanager
def stopped(process: "subprocess.Popen[bytes]") -> Iterator["subprocess.Popen[bytes]"]:
    """With all its children, in every case."""
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


async def ready(url: str, log: Path, process: "subprocess.Popen[bytes]") -> None:
    """Clients go on in the meantime."""
    await asyncio.to_thread(VllmServer(url, log, process).wait_until_ready)


def replica(image: Image, model: Path, port: int, log: Path) -> "subprocess.Popen[bytes]":
    """A server with the options that compose.replicas.yaml gives it."""
    given = shlex.split(COMPOSE["x-replica"]["command"])
    ours = given[given.index("--served-model-name") : given.index("--drain-seconds") + 2]
    return image.start(log, model, *ours, *OPTIONS, "--port", str(port), **SHARED_CORES)


def router(ports: list[int], port: int, log: Path) -> "subprocess.Popen[bytes]":
    """With the options that compose.replicas.yaml gives it, but for addresses."""
    given = shlex.split(COMPOSE["services"]["router"]["command"])
    workers = [f"http://127.0.0.1:{worker}" for worker in ports]
    given[given.index("--worker-urls") + 1 : given.index("--host")] = workers
    given[given.index("--host") + 1], given[given.index("--port") + 1] = "127.0.0.1", str(port)
    program = Path(sys.executable).with_name("vllm-router")
    with log.open("wb") as output:
        return subprocess.Popen(
            [str(program), *given, "--prometheus-port", str(reserve_port())],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


async def answered_by(url: str) -> int:
    """Requests that a server has answered to their ends."""
    async with httpx.AsyncClient() as client:
        lines = (await client.get(f"{url}/metrics")).text.splitlines()
    return int(sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("vllm:request_success_total{")))


class Clients:
    """Ask again and again, half of them with streamed answers, until told to stop. Whatever is no whole answer is kept."""

    def __init__(self, url: str) -> None:
        self.answers, self.failures, self.stop = 0, list[str](), False
        self._url = f"{url}/v1/completions"

    async def ask(self, stream: bool) -> None:
        request = {"model": "model", "prompt": "This PEP", "max_tokens": NEW_TOKENS, "ignore_eos": True, "stream": stream}
        async with httpx.AsyncClient(timeout=120) as client:
            while not self.stop:
                try:
                    answer = await client.post(self._url, json=request)
                    whole = answer.text.rstrip().endswith("[DONE]") if stream else '"finish_reason":"length"' in answer.text
                    if answer.status_code != httpx.codes.OK or not whole:
                        self.failures.append(f"{answer.status_code}: {answer.text[-300:]}")
                    self.answers += 1
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                await asyncio.sleep(PAUSE_S)

    async def have(self, more: int) -> None:
        """So many more answers."""
        wanted = self.answers + more
        while self.answers < wanted and not self.failures:
            await asyncio.sleep(0.05)


def test_a_server_is_replaced_under_load_and_no_request_fails(images: Images, models: dict[str, Path]) -> None:
    image, folder = images.made("lrq-cpu"), images.folder
    ports, at = [reserve_port(), reserve_port()], reserve_port()
    urls, routed = [f"http://127.0.0.1:{port}" for port in ports], f"http://127.0.0.1:{at}"

    async def story() -> Clients:
        with (
            stopped(replica(image, models["old"], ports[0], folder / "first.log")) as first,
            stopped(replica(image, models["old"], ports[1], folder / "second.log")) as second,
        ):
            for url, name, process in zip(urls, ("first", "second"), (first, second), strict=True):
                await ready(url, folder / f"{name}.log", process)
            with stopped(router(ports, at, folder / "router.log")) as routing:
                await ready(routed, folder / "router.log", routing)
                clients = Clients(routed)
                asking = [asyncio.create_task(clients.ask(stream=number % 2 == 0)) for number in range(CLIENTS)]
                await clients.have(BEFORE)
                before = [await answered_by(url) for url in urls]
                first.terminate()  # while it has requests
                await asyncio.to_thread(first.wait, 60)
                with stopped(replica(image, models["new"], ports[0], folder / "third.log")) as third:
                    await ready(urls[0], folder / "third.log", third)
                    while not await answered_by(urls[0]) and not clients.failures:
                        await clients.have(1)
                    await clients.have(AFTER)
                    clients.stop = True
                    await asyncio.gather(*asking)
                    after = [await answered_by(url) for url in urls]
        print(f"{clients.answers} answers; by server before and after: {before}, {after}")
        assert first.returncode == 0
        assert min(before) > 0 and after[0] > 0 and after[1] > before[1]
        return clients

    clients = asyncio.run(story())
    assert clients.failures == []
    assert clients.answers >= BEFORE + AFTER
    log = (folder / "first.log").read_text()
    assert "Told to stop" in log and "are cut off" not in log
