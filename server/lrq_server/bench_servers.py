"""The servers that ``--auto`` starts itself."""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lrq_server.endpoint import Endpoint, find_endpoint
from lrq_server.vllm_process import start_server, vllm_command
from lrq_vllm.checkpoint import QUANT_METHOD
from lrq_vllm.checkpoint.store import read_config
from lrq_vllm.errors import SettingsError

__all__ = ["check_model", "check_options", "command_for", "served"]

# A large model is read from disk, compiled and captured in graphs; a server that dies is noticed at once.
_PATIENCE_S = 3600
_CHOSEN_HERE = ("--host", "--port", "--uds", "--headless", "--api-key", "--served-model-name")


def check_model(model: str) -> None:
    """Raises SettingsError for a folder that is missing; a name like org/name is vLLM's to find."""
    if not Path(model).is_dir() and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model):
        raise SettingsError(f"The model folder {model} does not exist. --auto takes the model and the baseline: two folders.")


def check_options(options: Sequence[str]) -> None:
    """Raises SettingsError for options of vLLM that would give the servers another address or name."""
    for option in options:
        if option.split("=")[0] in _CHOSEN_HERE:
            raise SettingsError(
                f"{option} does not go with --auto, which chooses its servers' addresses and names. Leave it out, or start the "
                "servers yourself and use --url and --baseline."
            )


def command_for(model: str, options: Sequence[str]) -> list[str]:
    """``lrq-server serve`` for an LRQ checkpoint, ``vllm serve`` for everything else.

    Raises ModelFolderError for a folder whose config.json cannot be read, SettingsError without vLLM.
    """
    if Path(model).is_dir():
        quantization = read_config(Path(model)).get("quantization_config")
        if isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD:
            return [sys.executable, "-m", "lrq_server", "serve", model, *options]
    return vllm_command(model, *options)


@contextmanager
def served(model: str, log: Path, options: Sequence[str]) -> Iterator[Endpoint]:
    """A server of the model, ready, for as long as the block lasts.

    Raises LrqError with its log's end if it does not start.
    """
    with start_server(command_for(model, options), log) as server:
        server.wait_until_ready(_PATIENCE_S)
        yield find_endpoint(server.url, None)
