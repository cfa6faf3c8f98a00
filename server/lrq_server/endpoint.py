"""An OpenAI-compatible server that is to be measured: which model it serves, and what its prompts are made with."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from lrq_vllm.errors import LrqError, SettingsError

__all__ = ["Endpoint", "find_endpoint", "request_headers"]

_TIMEOUT_S = 10


@dataclass(frozen=True)
class Endpoint:
    """url: without /v1. model: the name that requests give. root: what the server loaded, if it says so.

    max_model_len: tokens of a prompt and its answer, if it says so. server: its kind and version, if it says so.
    """

    url: str
    model: str
    root: str | None
    max_model_len: int | None
    server: str | None

    @property
    def short_name(self) -> str:
        """The model's name without folders before it."""
        return self.model.rstrip("/").rpartition("/")[2]

    def tokenizer(self) -> str:
        """Where its tokenizer is: the folder or the name on the hub that the server loaded.

        Raises SettingsError if the server does not say it or it is a folder of another machine.
        """
        root = self.root
        if root is None or (Path(root).is_absolute() and not Path(root).exists()):
            said = "does not say where its tokenizer is" if root is None else f"loaded {root}, which is not on this machine"
            raise SettingsError(
                f"{self.url} {said}. Prompts are made with it: name a folder or a model that has the same one with --tokenizer."
            )
        return root

    def check_fits(self, tokens: int, options: str) -> None:
        """Raises SettingsError if a prompt and its answer, together so many tokens, are more than the server takes.

        options: those that say how many tokens there are, for the message.
        """
        if self.max_model_len is not None and tokens > self.max_model_len:
            raise SettingsError(
                f"{tokens} tokens of prompt and answer do not fit into the {self.max_model_len} that {self.url} serves. Use "
                f"a smaller {options}, or serve the model with a larger --max-model-len."
            )


def find_endpoint(url: str, model: str | None, model_option: str = "--model") -> Endpoint:
    """Ask a server what it serves. model: one of its models; None if it has only one. model_option: what sets it, for messages.

    The environment's OPENAI_API_KEY is sent, if there is one. Raises SettingsError for a key or URL that is none, a server
    without this model or with several to choose from, LrqError for one that does not answer as such a server does.
    """
    base = url.rstrip("/").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        raise SettingsError(f"{url} is not the URL of a server. Write it like http://127.0.0.1:8000.")
    served = _served_models(base)
    names = [str(entry["id"]) for entry in served]
    if model is not None and model not in names:
        raise SettingsError(f"{base} does not serve {model}, but {', '.join(names)}. Choose one of them with {model_option}.")
    if model is None and len(names) > 1:
        raise SettingsError(f"{base} serves {len(names)} models: {', '.join(names)}. Choose one of them with {model_option}.")
    entry = served[0 if model is None else names.index(model)]
    root, length = entry.get("root"), entry.get("max_model_len")
    return Endpoint(
        url=base,
        model=str(entry["id"]),
        root=root if isinstance(root, str) else None,
        max_model_len=length if isinstance(length, int) else None,
        server=_server_version(base),
    )


def _served_models(base: str) -> list[dict[str, Any]]:
    address = f"{base}/v1/models"
    try:
        answer = httpx.get(address, headers=request_headers(), timeout=_TIMEOUT_S)
    except (httpx.TransportError, httpx.InvalidURL, UnicodeError) as error:
        raise LrqError(f"{base} does not answer ({error}). Start a server there, or correct the URL.") from error
    if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise LrqError(f"{address} asks for a key (HTTP {answer.status_code}). Set OPENAI_API_KEY in the environment.")
    try:
        entries = answer.raise_for_status().json()["data"]
        served = [entry for entry in entries if isinstance(entry["id"], str)]
    except (httpx.HTTPStatusError, ValueError, KeyError, TypeError) as error:
        raise LrqError(
            f"{address} does not answer as an OpenAI-compatible server does (HTTP {answer.status_code}, {error!r}). "
            "Correct the URL."
        ) from error
    if not served:
        raise LrqError(f"{base} serves no model. Start it with one.")
    return served


def _server_version(base: str) -> str | None:
    """Only vLLM's servers have this address; others leave it unknown."""
    try:
        answer = httpx.get(f"{base}/version", headers=request_headers(), timeout=_TIMEOUT_S)
        return f"vLLM {answer.raise_for_status().json()['version']}"
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None


def request_headers() -> dict[str, str]:
    """With the key that the environment's OPENAI_API_KEY gives, if there is one. Raises SettingsError for one that is none."""
    key = os.environ.get("OPENAI_API_KEY")
    if not key:
        return {}
    if not re.fullmatch("[!-~]+", key):
        raise SettingsError(
            "OPENAI_API_KEY holds a line break, a blank or a letter beyond ASCII (often a line break at its end, from a file): "
            "no request can carry it. Set it to the key alone."
        )
    return {"Authorization": f"Bearer {key}"}
