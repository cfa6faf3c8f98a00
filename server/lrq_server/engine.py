"""vLLM's OpenAI server in this process, with what app.py adds. The only module that touches vLLM's launcher.

What ``vllm serve`` does in one go is done here step by step: the port is taken and answers that the model is loading, the
engine starts, the checkpoint's golden texts are read by it (LRQ_SELFTEST=1), and vLLM's app gets our routes before it serves.
"""

import asyncio
import json
import logging
import os
import signal
import sys
import warnings
from argparse import Namespace
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, closing, contextmanager
from importlib import import_module
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

from lrq_server import web_server
from lrq_server.app import Additions, loading_app, with_additions
from lrq_server.limits import RequestGate
from lrq_server.readiness import Phase, Readiness
from lrq_server.serve_settings import ServeSettings
from lrq_server.server_info import ServedModel, server_info
from lrq_server.server_metrics import ClippingMetrics, ServerMetrics
from lrq_vllm.checkpoint.schema import Manifest
from lrq_vllm.errors import LrqError, SettingsError
from lrq_vllm.golden_replay import Replayed, replay_through, why_not
from lrq_vllm.layer_self_test import VARIABLE as SELF_TEST
from lrq_vllm.layer_self_test import wanted as self_test_wanted

__all__ = ["parsed_options", "refused_options", "serve"]

logger = logging.getLogger(f"vllm.{__name__}")

_WORKER_EXTENSION = "lrq_vllm.worker_extension.LrqWorkerExtension"
# Where vLLM 0.33, 0.32 and 0.25 keep their command line.
_CLI_MODULES = (
    "vllm.entrypoints.common.cli_args", "vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args",
)  # fmt: skip
_PATIENCE_S = 2  # of a metric that the engine has to be asked for


def parsed_options(arguments: Sequence[str]) -> Namespace:
    """MODEL and vLLM's options, by vLLM's own parser. Raises SettingsError for what it does not take."""
    import vllm.logger
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli = _first_of(_CLI_MODULES)
    parser = cli.make_arg_parser(FlexibleArgumentParser(prog="lrq-server serve"))
    parser.error = _refuse
    parsed: Namespace = parser.parse_args(list(arguments))
    parsed.model = parsed.model_tag or parsed.model
    try:
        cli.validate_parsed_serve_args(parsed)
        if hasattr(vllm.logger, "configure_logging_from_args"):  # from 0.32 on
            vllm.logger.configure_logging_from_args(parsed)
    except (TypeError, ValueError, OSError) as error:
        raise SettingsError(f"vLLM does not take these options: {error}. See `vllm serve --help=all`.") from error
    return parsed


def _refuse(message: str) -> None:
    """In place of 300 lines of usage."""
    raise SettingsError(f"{message}. See `lrq-server serve --help`, and `vllm serve --help=all` for vLLM's options.")


def refused_options(parsed: Namespace) -> list[str]:
    """A sentence for each of vLLM's options that makes another server of it than one front end and one engine, or with which
    the self-test, if it is wanted, cannot read log-probabilities.
    """
    given = {
        "--api-server-count": (parsed.api_server_count or 1) > 1,
        "--data-parallel-size": parsed.data_parallel_size > 1,
        "--headless": parsed.headless,
        "--grpc": getattr(parsed, "grpc", False),
        "--enable-ssl-refresh": parsed.enable_ssl_refresh,
        "--worker-extension-cls": bool(parsed.worker_extension_cls),
    }
    return [
        f"{option} does not go with `lrq-server serve`, which runs one front end and one engine: `vllm serve {parsed.model} "
        f"--quantization lrq` takes it, without what lrq-server adds."
        for option, is_given in given.items()
        if is_given
    ] + (_untestable_options(parsed) if self_test_wanted() else [])


def _untestable_options(parsed: Namespace) -> list[str]:
    given = {
        "--max-logprobs 0": parsed.max_logprobs == 0,
        f"--logprobs-mode {parsed.logprobs_mode}": parsed.logprobs_mode != "raw_logprobs",
    }
    return [
        f"{option} does not go with the self-test ({SELF_TEST}=1), which reads log-probabilities: leave out one of them."
        for option, is_given in given.items()
        if is_given
    ]


def serve(parsed: Namespace, manifest: Manifest, settings: ServeSettings) -> int:
    """Serve until told to stop. Returns 0 then, and 1 if the engine did not start or died.

    Raises CheckpointError for a checkpoint that does not answer as it should, SystemExit (130) if told to stop while loading.
    """
    import uvloop

    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    parsed.worker_extension_cls = _WORKER_EXTENSION
    code: int = uvloop.run(_serve(parsed, manifest, settings))
    return code


async def _serve(parsed: Namespace, manifest: Manifest, settings: ServeSettings) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the one place where all of these versions have it
        from vllm.entrypoints.openai import api_server
    for number in (signal.SIGTERM, signal.SIGINT):  # until the web server has handlers of its own
        signal.signal(number, _stop_loading)
    try:
        address, listener = _bound(api_server, parsed)
        options, readiness = _uvicorn_options(parsed), Readiness()
    except (KeyError, TypeError, ValueError) as error:
        raise SettingsError(f"vLLM does not take these options, or what the environment says: {error}.") from error
    with _socket_file_removed(parsed.uds), closing(listener), ExitStack() as loading:
        loading.enter_context(web_server.answering(loading_app(readiness), listener, options))
        async with AsyncExitStack() as running:
            try:
                engine = await running.enter_async_context(api_server.build_async_engine_client(parsed))
            except LrqError:
                raise
            except Exception as error:  # vLLM raises what it likes
                logger.debug("vLLM's engine did not start.", exc_info=True)
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                print(f"lrq-server: vLLM did not start ({reason}). Its log above says more.", file=sys.stderr)
                return 1
            readiness.watch(lambda: bool(engine.errored))
            replayed = await _tested(engine, parsed, readiness)
            metrics = ServerMetrics()
            gate = RequestGate(settings, readiness, metrics.rejected)
            served = await _served_model(engine, parsed)
            metrics.describe(manifest.scheme, (version("lrq"), served.vllm_version), served.kernels)
            tasks = await engine.get_supported_tasks()
            app = api_server.build_app(parsed, tasks, engine.model_config)
            await api_server.init_app_state(engine, app.state, parsed, tasks)
            additions = Additions(
                readiness=readiness,
                gate=gate,
                info=server_info(Path(parsed.model), manifest, served, replayed),
                keys=[key for key in (parsed.api_key or [os.environ.get("VLLM_API_KEY")]) if key],
                refresh_metrics=await _refresher(engine, readiness, metrics),
                silent=None if parsed.disable_uvicorn_access_log else _paths(parsed.disable_access_log_for_endpoints),
            )
            server = web_server.WebServer(with_additions(app, additions), options)
            app.state.server = server  # where vLLM's own handlers look for it
            loading.close()
            logger.info("Serving %s at %s.", ", ".join(served.names), address)
            told = await server.serve_until_told(listener, readiness, gate, settings.drain_seconds)
    if not told:
        print(
            "lrq-server: vLLM's engine died while it served. Its log above says why; start the server again.", file=sys.stderr
        )
    return 0 if told else 1


async def _tested(engine: Any, parsed: Namespace, readiness: Readiness) -> Replayed | None:
    """None if nobody asked for it, or the texts say nothing about this server."""
    if not self_test_wanted():
        return None
    model = engine.vllm_config.model_config
    reason = why_not(model.hf_config, model.max_model_len)
    if reason is not None:
        logger.warning("The self-test's texts are left out, its layers were tested: %s.", reason)
        return None
    readiness.enter(Phase.SELF_TEST)
    replayed = await replay_through(engine, Path(parsed.model))
    logger.info(
        "Self-test passed: %d texts, %.4f nats from the reference path on average.", replayed.texts, replayed.mean_difference
    )
    return replayed


async def _served_model(engine: Any, parsed: Namespace) -> ServedModel:
    import vllm

    kernels: dict[str, set[str]] = defaultdict(set)
    for rank in await engine.collective_rpc("lrq_kernels"):
        for layer, kernel in rank.items():
            kernels[layer].add(kernel)
    return ServedModel(
        names=tuple(parsed.served_model_name or [parsed.model]),
        vllm_version=vllm.__version__,
        max_model_len=engine.model_config.max_model_len,
        ranks=parsed.tensor_parallel_size,
        kv_cache_dtype=str(engine.vllm_config.cache_config.cache_dtype),
        kernels={layer: ", ".join(sorted(names)) for layer, names in kernels.items()},
    )


async def _refresher(engine: Any, readiness: Readiness, metrics: ServerMetrics) -> Callable[[], Awaitable[None]]:
    """What brings the metrics up to date. The engine is asked only if its workers count something."""
    counted = await engine.collective_rpc("lrq_clipped_counts")
    clipping = ClippingMetrics() if any(counted) else None

    async def refresh() -> None:
        metrics.show_ready(readiness.ready)
        if clipping is not None and readiness.phase is not Phase.ENGINE_DEAD:
            try:
                ranks = await asyncio.wait_for(engine.collective_rpc("lrq_clipped_counts"), _PATIENCE_S)
            except TimeoutError:
                logger.warning("The engine did not say in %d s what it clipped: /metrics shows older numbers.", _PATIENCE_S)
                return
            clipping.show(ranks)

    return refresh


def _uvicorn_options(parsed: Namespace) -> dict[str, Any]:
    """What vLLM gives uvicorn, from the same options."""
    from vllm import envs

    options: dict[str, Any] = {
        "log_level": parsed.uvicorn_log_level,
        "timeout_keep_alive": envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
        "h11_max_incomplete_event_size": parsed.h11_max_incomplete_event_size,
        "ssl_keyfile": parsed.ssl_keyfile,
        "ssl_certfile": parsed.ssl_certfile,
        "ssl_ca_certs": parsed.ssl_ca_certs,
        "ssl_cert_reqs": parsed.ssl_cert_reqs,
        "ssl_ciphers": parsed.ssl_ciphers,
    }
    if parsed.log_config_file:
        options["log_config"] = json.loads(Path(parsed.log_config_file).read_text())
    return options


def _paths(listed: str | None) -> list[str]:
    return [path.strip() for path in (listed or "").split(",") if path.strip()]


def _bound(api_server: Any, parsed: Namespace) -> tuple[str, Any]:
    """The port is taken, and not listened to."""
    takes = signature(api_server.setup_server).parameters
    bound: tuple[str, Any] = api_server.setup_server(parsed, **({"reuse_port": False} if "reuse_port" in takes else {}))
    return bound


@contextmanager
def _socket_file_removed(path: str | None) -> Iterator[None]:
    """In the end, so that the same command can listen there again."""
    try:
        yield
    finally:
        if path:
            Path(path).unlink(missing_ok=True)


def _first_of(names: Sequence[str]) -> Any:
    for name in names:
        try:
            return import_module(name)
        except ModuleNotFoundError:
            continue
    raise SettingsError("This vLLM keeps its command line where lrq does not find it. Use vLLM 0.25 to 0.33.")


def _stop_loading(*_: Any) -> None:
    """Not by a KeyboardInterrupt: vLLM swallows those that come while its engine starts, and waits for ten minutes."""
    print("lrq-server: told to stop while it was loading.", file=sys.stderr)
    raise SystemExit(130)
