"""``lrq-server serve`` as a process of its own, asked by OpenAI's client. One server for all tests but the last."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch

from lrq_server.vllm_process import VllmServer, start_server
from lrq_vllm.checkpoint.store import read_manifest
from tests.checkpoints import Checkpoints

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the CPU"),
]

KEY, NAME, LENGTH = "secret", "tiny", 2048
PROMPT = "This PEP describes"
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
# Tokens of an answer that takes seconds.
LONG = 1500
# A number that nothing here comes near, so that what hangs fails.
PATIENCE_S = 120


@contextmanager
def serving(checkpoint: Path, folder: Path, *options: str) -> Iterator[VllmServer]:
    """A server that answers."""
    with starting(checkpoint, folder, *options) as server:
        server.wait_until_ready()
        yield server


@contextmanager
def starting(checkpoint: Path, folder: Path, *options: str) -> Iterator[VllmServer]:
    """A server that may still load."""
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)
    command = [
        sys.executable, "-m", "lrq_server", "serve", str(checkpoint), "--enforce-eager", "--max-model-len", str(LENGTH),
        "--max-num-seqs", "16", "--served-model-name", NAME, "--chat-template", str(template), "--api-key", KEY, *options,
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv("LRQ_SELFTEST", "1")
        with start_server(command, folder / "log") as server:
            yield server


@pytest.fixture(scope="module")
def checkpoint(checkpoints: Checkpoints) -> Path:
    return checkpoints("w8a8", "lrq")


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    folder = tmp_path_factory.mktemp("serving")
    limits = ("--max-request-mb", "2", "--max-concurrent-requests", "24", "--drain-seconds", str(PATIENCE_S))
    with serving(checkpoint, folder, *limits, "--log-format", "json", "--count-clipped") as running:
        yield running


@pytest.fixture
def client(server: VllmServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE_S) as client:
        yield client


def complete(client: openai.OpenAI, **settings: Any) -> Any:
    return client.completions.create(**({"model": NAME, "prompt": PROMPT, "max_tokens": 12, "temperature": 0} | settings))


def chat(client: openai.OpenAI, **settings: Any) -> Any:
    messages = [{"role": "user", "content": "What is a PEP?"}]
    return client.chat.completions.create(
        **({"model": NAME, "messages": messages, "max_tokens": 12, "temperature": 0} | settings)
    )


def get(server: VllmServer, path: str, key: str | None = None) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.get(server.url + path, headers=headers, timeout=PATIENCE_S)


def metrics(server: VllmServer) -> dict[str, float]:
    """Name with labels -> value."""
    lines = [line.rpartition(" ") for line in get(server, "/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def until_idle(server: VllmServer) -> None:
    """Wait until the engine works on nothing."""
    deadline = time.monotonic() + PATIENCE_S
    while any(value for name, value in metrics(server).items() if name.startswith("vllm:num_requests_")):
        assert time.monotonic() < deadline


# --- OpenAI's API ---


def test_completions_and_their_streams_say_the_same(client: openai.OpenAI) -> None:
    answer = complete(client)
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 12
    parts = list(complete(client, stream=True))
    assert len(parts) > 3 and "".join(part.choices[0].text for part in parts) == answer.choices[0].text


def test_chats_and_their_streams_say_the_same(client: openai.OpenAI) -> None:
    answer = chat(client).choices[0].message
    assert answer.role == "assistant" and answer.content
    parts = [part.choices[0].delta.content or "" for part in chat(client, stream=True)]
    assert "".join(parts) == answer.content
    # The prompt is what the template makes of the messages, and nothing else.
    written = complete(client, prompt="user: What is a PEP?\nassistant:", extra_body={"add_special_tokens": False})
    assert written.choices[0].text == answer.content


def test_log_probabilities_come_with_the_tokens(client: openai.OpenAI) -> None:
    found = complete(client, logprobs=3).choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == 12
    for chosen, top in zip(found.token_logprobs, found.top_logprobs, strict=True):
        assert len(top) >= 3 and chosen == max(top.values()) <= 0
    spoken = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert len(spoken) == 12 and all(len(token.top_logprobs) == 2 for token in spoken)


def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI) -> None:
    whole = complete(client).choices[0].text
    stop = whole.split()[3]
    cut = complete(client, stop=[stop]).choices[0]
    assert cut.finish_reason == "stop" and cut.text == whole[: whole.index(stop)]


def test_several_answers_and_seeds(client: openai.OpenAI) -> None:
    first, again, other = (
        [choice.text for choice in complete(client, n=3, temperature=1, seed=seed).choices] for seed in (7, 7, 8)
    )
    assert len(first) == len(set(first)) == 3
    assert first == again != other


def test_what_it_cannot_do_is_refused_as_openai_refuses(client: openai.OpenAI, server: VllmServer) -> None:
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=NAME, input="text")
    with pytest.raises(openai.NotFoundError) as unknown:
        complete(client, model="other")
    assert unknown.value.body["code"] == 404 and "`other`" in unknown.value.body["message"]
    with pytest.raises(openai.BadRequestError) as too_long:
        complete(client, prompt=[5] * (LENGTH + 1))
    assert too_long.value.body["code"] == 400 and str(LENGTH) in too_long.value.body["message"]
    with pytest.raises(openai.BadRequestError):
        complete(client, temperature=-1)
    with pytest.raises(openai.AuthenticationError):
        complete(client.with_options(api_key="wrong"))
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/completions", content=b'{"model": ', headers=headers)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == 400
    # It goes on.
    assert complete(client).choices[0].text


def test_a_prompt_of_a_megabyte_is_refused_for_its_tokens_and_one_of_two_for_its_size(
    client: openai.OpenAI, server: VllmServer
) -> None:
    with pytest.raises(openai.BadRequestError) as too_long:
        complete(client, prompt="word " * 200_000)
    assert too_long.value.body["code"] == 400
    with pytest.raises(openai.APIStatusError) as too_large:
        complete(client, prompt="word " * 400_001)
    assert too_large.value.status_code == 413 and "2,000,000 bytes" in too_large.value.body["message"]
    assert metrics(server)['lrq_requests_rejected_total{reason="too_large"}'] == 1
    assert complete(client).choices[0].text


# --- What lrq-server adds ---


def test_info_says_what_runs_and_needs_the_key(server: VllmServer, checkpoint: Path) -> None:
    assert get(server, "/lrq/info").status_code == get(server, "/lrq/info", "wrong").status_code == 401
    info = get(server, "/lrq/info", KEY).json()
    assert (info["scheme"], info["weight_bits"], info["kv_bits"], info["model"]["names"]) == ("w8a8", 8, 16, [NAME])
    assert info["self_test"]["result"] == "passed" and info["self_test"]["texts"] == 4
    assert info["quality"]["method"] == "lrq" and len(info["quality"]["blocks"]) == 4
    # vLLM fuses q, k and v, and gate and up: four of a block's seven are left.
    assert len(info["kernels"]) == len(read_manifest(checkpoint).quantized) * 4 // 7
    assert set(info["kernels"].values()) == {"onednn"} and "model.layers.3.self_attn.qkv_proj" in info["kernels"]


def test_metrics_show_vllms_and_ours_without_a_key(server: VllmServer) -> None:
    for path in ("/lrq/live", "/lrq/ready", "/health", "/metrics"):
        assert get(server, path).status_code == 200
    found = metrics(server)
    assert found['lrq_layers{kernel="onednn",scheme="w8a8"}'] == 16 and found["lrq_ready"] == 1
    assert [value for name, value in found.items() if name.startswith('lrq_info{scheme="w8a8"')] == [1]
    assert any(name.startswith("vllm:generation_tokens_total") for name in found)


def test_what_leaves_the_calibrated_range_is_shown_for_each_layer(server: VllmServer, client: openai.OpenAI) -> None:
    before = metrics(server)["lrq_quantized_values_total"]
    complete(client)
    found = metrics(server)
    assert found["lrq_quantized_values_total"] > before
    shares = {name: share for name, share in found.items() if name.startswith("lrq_clipped_share{")}
    assert 'lrq_clipped_share{module="model.layers.0.mlp.down_proj"}' in shares and len(shares) == 16
    assert all(0 <= share < 0.1 for share in shares.values())


def test_a_busy_server_makes_no_errors(server: VllmServer) -> None:
    async def ask(client: openai.AsyncOpenAI, free: asyncio.Semaphore, place: int) -> int:
        async with free:
            settings: dict[str, Any] = {"model": NAME, "prompt": f"{PROMPT} {place}", "max_tokens": 4}
            answer = await client.completions.create(**settings, extra_body={"ignore_eos": True})
            assert answer.usage is not None
            return answer.usage.completion_tokens

    async def load() -> list[int]:
        free = asyncio.Semaphore(16)
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
            return await asyncio.gather(*(ask(client, free, place) for place in range(200)))

    assert asyncio.run(load()) == [4] * 200


def test_clients_that_leave_take_no_place(client: openai.OpenAI, server: VllmServer) -> None:
    for _ in range(3):  # more in all than may be inside at a time, if their places were not given back
        streams = [complete(client, stream=True, max_tokens=LONG, extra_body={"ignore_eos": True}) for _ in range(12)]
        for stream in streams:
            next(iter(stream))
            stream.close()
        for stream in streams:
            line = request_line(server, stream.response.headers["x-request-id"])
            assert (line["status"], line["complete"]) == (200, False)
    until_idle(server)
    assert complete(client).choices[0].text


def test_its_log_is_one_object_per_line(client: openai.OpenAI, server: VllmServer) -> None:
    answer = client.completions.with_raw_response.create(
        model=NAME, prompt=PROMPT, max_tokens=1, extra_headers={"X-Request-Id": "of-this-test"}
    )
    assert answer.headers["x-request-id"] == "of-this-test"
    line = request_line(server, "of-this-test")
    assert (line["method"], line["path"], line["status"], line["complete"]) == ("POST", "/v1/completions", 200, True)
    assert line["milliseconds"] > 0
    text = server.log.read_text()
    loggers = {json.loads(line)["logger"].partition(".")[0] for line in text.splitlines() if line.startswith("{")}
    assert {"vllm", "uvicorn"} <= loggers
    # Nothing of theirs beside it; what libraries in C++ and progress bars write is not theirs.
    assert not re.findall(r"^(?:\(\w+ pid=|INFO|WARNING|ERROR).*", text, re.MULTILINE)


def request_line(server: VllmServer, request_id: str) -> dict[str, Any]:
    """Written when the answer has ended, which its reader may know a little earlier."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := [line for line in request_lines(server) if line["request_id"] == request_id]):
        assert time.monotonic() < deadline
    (line,) = found
    return line


def request_lines(server: VllmServer) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line["logger"] == "vllm.lrq_server.request_log"]


# --- Its end ---


async def long_answer(client: openai.AsyncOpenAI, begun: asyncio.Semaphore) -> int:
    """Its tokens. It is announced when its first has come."""
    count = 0
    parts = await client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=LONG, temperature=0, stream=True, stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    async for part in parts:
        if not count:
            begun.release()
        count = part.usage.completion_tokens if part.usage else 1
    return count


async def long_answer_at_once(client: openai.AsyncOpenAI) -> int:
    """The same, not in parts."""
    ask: dict[str, Any] = {"model": NAME, "prompt": PROMPT, "max_tokens": LONG}
    answer = await client.completions.create(**ask, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    return answer.usage.completion_tokens


@asynccontextmanager
async def working(server: VllmServer) -> AsyncIterator[tuple[httpx.AsyncClient, list[asyncio.Task[int]]]]:
    """Long answers that have begun, half of them streams, and a client for other questions."""
    begun, streams = asyncio.Semaphore(0), 2
    async with (
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE_S) as client,
        httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as asking,
    ):
        answers = [asyncio.create_task(long_answer_at_once(client)) for _ in range(2)]
        answers += [asyncio.create_task(long_answer(client, begun)) for _ in range(streams)]
        for _ in range(streams):
            await asyncio.wait_for(begun.acquire(), PATIENCE_S)
        yield asking, answers


def test_told_to_stop_it_ends_what_it_has_begun(server: VllmServer) -> None:
    """The last one with the common server."""

    async def test() -> None:
        async with working(server) as (asking, answers):
            server.process.send_signal(signal.SIGTERM)
            while (ready := await asking.get("/lrq/ready")).status_code == 200:
                pass
            assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
            refused = await asking.post("/v1/completions", json={})
            assert refused.status_code == refused.json()["error"]["code"] == 503
            assert await asyncio.gather(*answers) == [LONG] * 4

    asyncio.run(test())
    assert server.process.wait(PATIENCE_S) == 0
    assert "Told to stop: no new requests; 4 have" in server.log.read_text()


def test_it_ends_when_its_engine_is_killed(checkpoint: Path, tmp_path: Path) -> None:
    async def test(server: VllmServer) -> None:
        async with working(server) as (asking, answers):
            (engine,) = [child for child in psutil.Process(server.process.pid).children() if "EngineCore" in child.name()]
            os.kill(engine.pid, signal.SIGKILL)
            killed = time.monotonic()
            while await is_ready(asking):
                assert time.monotonic() - killed < 5  # what is promised
            for answer in answers:
                with pytest.raises(openai.APIError):
                    await answer

    with serving(checkpoint, tmp_path) as server:
        asyncio.run(test(server))
        assert server.process.wait(PATIENCE_S) == 1
    assert "vLLM's engine died while it served" in server.log.read_text()


def test_told_to_stop_while_it_loads_it_ends_with_its_engine(checkpoint: Path, tmp_path: Path) -> None:
    with starting(checkpoint, tmp_path) as server:
        with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as asking:
            deadline = time.monotonic() + PATIENCE_S
            # The engine's process is there, and the model is not.
            while not any("EngineCore" in child.name() for child in psutil.Process(server.process.pid).children()):
                assert time.monotonic() < deadline
                with pytest.raises(subprocess.TimeoutExpired):
                    server.process.wait(0.2)
            assert asking.get("/lrq/ready").json() == {"status": "loading"}
            children = psutil.Process(server.process.pid).children(recursive=True)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE_S) == 130
        _, left = psutil.wait_procs(children, PATIENCE_S)
        assert not left


async def is_ready(asking: httpx.AsyncClient) -> bool:
    try:
        return (await asking.get("/lrq/ready")).status_code == 200
    except httpx.TransportError:
        return False
