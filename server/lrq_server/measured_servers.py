"""Which servers a command measures: one or two that run already, or two that it starts itself, one after the other."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from lrq_server.bench_servers import check_model, check_options, command_for, served
from lrq_server.endpoint import Endpoint, find_endpoint
from lrq_vllm.errors import SettingsError

__all__ = [
    "BASELINE", "MODEL", "add_options", "check_combinations", "has_baseline", "measure_own", "needs_baseline",
    "running_endpoints",
]  # fmt: skip

MODEL, BASELINE = "model", "baseline"
_Found = TypeVar("_Found")


def add_options(command: argparse.ArgumentParser) -> None:
    """--url or --auto, --baseline, --model, --baseline-model."""
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--url", help="a server that is running")
    which.add_argument(
        "--auto", nargs=2, metavar=("MODEL", "BASELINE"),
        help="start a server of each here, one after the other, and stop them; options after -- are handed to both",
    )  # fmt: skip
    command.add_argument("--baseline", metavar="URL", help="a running server to compare with")
    command.add_argument("--model", metavar="NAME", help="the model to ask, if the server at --url has several")
    command.add_argument("--baseline-model", metavar="NAME", help="the same at --baseline")


def check_combinations(parsed: argparse.Namespace, vllm_options: Sequence[str]) -> None:
    """Raises SettingsError for options of :func:`add_options` that do not go together, ModelFolderError for a folder without a
    model.
    """
    if parsed.auto:
        for option in ("baseline", "model", "baseline_model"):
            if getattr(parsed, option) is not None:
                name = option.replace("_", "-")
                raise SettingsError(f"--{name} is for servers that are running. --auto starts its own: leave --{name} out.")
        for model in parsed.auto:
            check_model(model)
            command_for(model, vllm_options)
        check_options(vllm_options)
        return
    if vllm_options:
        raise SettingsError(f"{vllm_options[0]} after -- is for servers that --auto starts. The one at --url is running.")
    if parsed.baseline_model is not None:
        needs_baseline(parsed, "--baseline-model")


def has_baseline(parsed: argparse.Namespace) -> bool:
    """Whether there will be two servers."""
    return bool(parsed.auto) or parsed.baseline is not None


def needs_baseline(parsed: argparse.Namespace, option: str) -> None:
    """Raises SettingsError if there is none to which the option could refer."""
    if not has_baseline(parsed):
        raise SettingsError(f"{option} needs a baseline. Give one with --baseline URL, or use --auto MODEL BASELINE.")


def running_endpoints(parsed: argparse.Namespace) -> dict[str, Endpoint]:
    """By role, the server at --url and that at --baseline. Raises LrqError's children as find_endpoint does."""
    endpoints = {MODEL: find_endpoint(parsed.url, parsed.model)}
    if parsed.baseline is not None:
        endpoints[BASELINE] = find_endpoint(parsed.baseline, parsed.baseline_model, "--baseline-model")
    return endpoints


def measure_own(
    parsed: argparse.Namespace,
    vllm_options: Sequence[str],
    logs: Path,
    measure: Callable[[str, Endpoint], _Found],
    say: Callable[[str], None],
) -> dict[str, _Found]:
    """By role, what ``measure(role, endpoint)`` found of a server of each model of --auto, which is stopped afterwards."""
    found = {}
    for role, model in zip((MODEL, BASELINE), parsed.auto, strict=True):
        log = logs / f"server-{role}.log"
        say(f"starting a server of {model} (log: {log})")
        with served(model, log, vllm_options) as endpoint:
            found[role] = measure(role, endpoint)
    return found
