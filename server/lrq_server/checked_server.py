"""vLLM's OpenAI server, which answers nobody before it has read the checkpoint's golden texts and found them right.

The routes and the engine are vLLM's own; what ``vllm serve`` does in one go is done here in three steps, so that the test
comes after loading, on the very engine that will serve, and before the port is listened to.

    python -m lrq_server.checked_server MODEL --quantization lrq [vLLM's options]
"""

import asyncio
import logging
import os
import signal
import sys
import warnings
from argparse import Namespace
from collections.abc import Sequence
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

from lrq_vllm.errors import LrqError, SettingsError
from lrq_vllm.golden_replay import replay_through

__all__ = ["main"]

logger = logging.getLogger(f"vllm.{__name__}")
# Where vLLM 0.33, 0.32 and 0.25 keep their command line.
_CLI_MODULES = (
    "vllm.entrypoints.common.cli_args", "vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until told to stop. Returns 2 for a checkpoint that does not answer as it should."""
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    try:
        asyncio.run(_serve(_parsed(arguments)))
    except LrqError as error:
        print(f"lrq-server: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # told to stop while it was loading
        return 130
    return 0


def _parsed(arguments: Sequence[str] | None) -> Namespace:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli = _first_of(_CLI_MODULES)
    parsed: Namespace = cli.make_arg_parser(FlexibleArgumentParser(prog="lrq-server serve")).parse_args(arguments)
    parsed.model = parsed.model_tag or parsed.model
    cli.validate_parsed_serve_args(parsed)
    if (parsed.api_server_count or 1) > 1 or parsed.data_parallel_size > 1 or parsed.headless:
        raise SettingsError(
            "LRQ_SELFTEST=1 tests a server with one front end and one engine; --api-server-count, --data-parallel-size and "
            "--headless have more. Unset LRQ_SELFTEST, and run `lrq-offline verify` on this machine instead."
        )
    return parsed


def _first_of(names: Sequence[str]) -> Any:
    for name in names:
        try:
            return import_module(name)
        except ModuleNotFoundError:
            continue
    raise SettingsError(
        "This vLLM keeps its command line where lrq does not find it. Unset LRQ_SELFTEST, or use vLLM 0.25 to 0.33."
    )


async def _serve(parsed: Namespace) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the one place where all of these versions have it
        from vllm.entrypoints.openai import api_server
    signal.signal(signal.SIGTERM, _interrupt)  # until the web server has a handler of its own
    address, socket = _bound(api_server, parsed)
    try:
        async with api_server.build_async_engine_client(parsed) as engine:
            replayed = await replay_through(engine, Path(parsed.model))
            logger.info(
                "Self-test passed: %d texts, %.4f nats from the reference path on average.",
                replayed.texts, replayed.mean_difference,
            )  # fmt: skip
            stopped = await api_server.build_and_serve(engine, address, socket, parsed)
        await stopped
    finally:
        socket.close()


def _bound(api_server: Any, parsed: Namespace) -> tuple[str, Any]:
    """The port is taken, and not listened to."""
    takes = signature(api_server.setup_server).parameters
    bound: tuple[str, Any] = api_server.setup_server(parsed, **({"reuse_port": False} if "reuse_port" in takes else {}))
    return bound


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
