"""What a running server says of a text: its tokens by /tokenize, their log-probabilities by /v1/completions.

Both are vLLM's: ``prompt_logprobs`` is no part of the OpenAI API.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import torch
from torch import Tensor

from lrq_server.endpoint import Endpoint, request_headers
from lrq_server.served_quality import Reported
from lrq_vllm.errors import LrqError, SettingsError

__all__ = ["ScoreSettings", "score", "tokenize"]

_NEVER = -9999.0  # what vLLM writes for the logarithm of 0
_NEEDS_VLLM = "`lrq-server eval` needs a server of vLLM's."
_TIMEOUT_S = 600  # a long window on a busy server


@dataclass(frozen=True)
class ScoreSettings:
    """seq_len: tokens of a window. windows: None for as many as the text has. top_logprobs: most likely tokens to report.

    concurrency: requests at a time. Raises SettingsError for what cannot be.
    """

    seq_len: int = 512
    windows: int | None = None
    top_logprobs: int = 20
    concurrency: int = 8

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise SettingsError(f"--seq-len {self.seq_len} must be 2 or more: a window's first token is not predicted.")
        if self.windows is not None and self.windows < 2:
            raise SettingsError(f"--windows {self.windows} must be 2 or more: intervals come from how windows differ.")
        for option in ("top_logprobs", "concurrency"):
            if getattr(self, option) < 1:
                raise SettingsError(f"--{option.replace('_', '-')} {getattr(self, option)} must be 1 or more.")


def tokenize(endpoint: Endpoint, texts: Sequence[str]) -> list[int]:
    """Token ids of the texts, end to end, each with the special tokens that the server's tokenizer gives a prompt.

    Raises LrqError if the server has no such route or does not answer.
    """

    async def ids_of_all() -> list[int]:
        ids: list[int] = []
        async with _client(endpoint) as client:
            for text in texts:
                found = await _post(client, "/tokenize", {"model": endpoint.model, "prompt": text}, "")
                try:
                    ids += [int(token) for token in found["tokens"]]
                except (KeyError, TypeError, ValueError) as error:
                    raise LrqError(
                        f"{endpoint.url}/tokenize does not answer as vLLM does ({error!r}). {_NEEDS_VLLM}"
                    ) from error
        return ids

    return asyncio.run(ids_of_all())


def score(endpoint: Endpoint, windows: Tensor, settings: ScoreSettings, advance: Callable[[], None]) -> Reported:
    """Let the server read token windows int64 [windows, seq_len]. advance: called after each.

    Raises LrqError as soon as a request fails or an answer lacks what was asked for.
    """
    cure = f"--top-logprobs {settings.top_logprobs} may be more than the server's --max-logprobs. "

    async def read(client: httpx.AsyncClient, places: asyncio.Semaphore, window: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        request = {
            "model": endpoint.model, "prompt": window, "max_tokens": 1, "temperature": 0,
            "prompt_logprobs": settings.top_logprobs,
        }  # fmt: skip
        async with places:
            answer = await _post(client, "/v1/completions", request, cure)
        found = _parsed(answer, window, settings.top_logprobs + 1, endpoint)
        advance()
        return found

    async def read_all() -> list[tuple[Tensor, Tensor, Tensor]]:
        places = asyncio.Semaphore(settings.concurrency)
        async with _client(endpoint) as client:
            reading = [asyncio.ensure_future(read(client, places, window)) for window in windows.tolist()]
            try:
                return await asyncio.gather(*reading)
            finally:  # those that nobody waits for any more let go of their connections
                for one in reading:
                    one.cancel()
                await asyncio.gather(*reading, return_exceptions=True)

    parts = asyncio.run(read_all())  # which Ctrl-C ends at once, however long an answer takes
    return Reported(*(torch.stack(part) for part in zip(*parts, strict=True)))


def _client(endpoint: Endpoint) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=endpoint.url, headers=request_headers(), timeout=_TIMEOUT_S)


async def _post(client: httpx.AsyncClient, route: str, request: dict[str, Any], cure: str) -> Any:
    """The JSON of a good answer. cure: what a refused request may need."""
    address = f"{str(client.base_url).rstrip('/')}{route}"
    try:
        answer = await client.post(route, json=request)
    except httpx.TransportError as error:
        raise LrqError(f"{address} does not answer ({error!r}). See the server's log.") from error
    if answer.status_code == httpx.codes.NOT_FOUND:
        raise LrqError(f"{address} is not there (HTTP 404). {_NEEDS_VLLM}")
    if answer.status_code != httpx.codes.OK:
        said = " ".join(answer.text.split())[:400]
        raise LrqError(f"{address} refused a request (HTTP {answer.status_code}): {said} {cure}See the server's log.")
    try:
        return answer.json()
    except ValueError as error:
        raise LrqError(f"{address} does not answer in JSON ({error}). {_NEEDS_VLLM}") from error


def _parsed(answer: Any, window: Sequence[int], most: int, endpoint: Endpoint) -> tuple[Tensor, Tensor, Tensor]:
    """Of one window, the three tensors of Reported without their first axis. most: tokens that one place can have."""
    try:
        places = answer["choices"][0]["prompt_logprobs"][1:]
        if len(places) != len(window) - 1:
            raise LrqError(
                f"{endpoint.url} gave log-probabilities of {len(places)} tokens for a prompt of {len(window)}. {_NEEDS_VLLM}"
            )
        tokens = torch.full((len(places), most), -1)
        log_p = torch.full((len(places), most), -torch.inf, dtype=torch.float64)
        for row, place in enumerate(places):
            tokens[row, : len(place)] = torch.tensor([int(token) for token in place])
            log_p[row, : len(place)] = torch.tensor([entry["logprob"] for entry in place.values()], dtype=torch.float64)
        of_text = torch.tensor(
            [place[str(token)]["logprob"] for place, token in zip(places, window[1:], strict=True)], dtype=torch.float64
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise LrqError(
            f"{endpoint.url} does not answer with prompt_logprobs as vLLM does ({error!r}). {_NEEDS_VLLM}"
        ) from error
    if not (of_text > _NEVER).all():
        raise LrqError(
            f"{endpoint.url} gives a token of the text the probability 0: its perplexity has no value. Is the model "
            "broken, or has the text tokens that it must not produce?"
        )
    return of_text, tokens, log_p
