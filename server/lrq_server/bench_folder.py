"""What ``lrq-server bench`` leaves in its output folder."""

from functools import partial
from pathlib import Path

from lrq_server.bench_page import write_html
from lrq_server.bench_result import BenchResult, write_csv, write_json
from lrq_server.result_folder import ResultFolder

__all__ = ["RAW", "bench_folder", "write_results"]

RAW = "load-generator"  # what vllm bench serve wrote and said
_WRITERS = {"bench.csv": write_csv, "bench.html": write_html, "bench.json": write_json}


def bench_folder(path: Path) -> ResultFolder:
    """The folder that a bench may write to."""
    return ResultFolder(path, "a bench", tuple(_WRITERS), RAW)


def write_results(result: BenchResult, path: Path) -> list[Path]:
    """bench.csv, bench.html and bench.json."""
    return bench_folder(path).write({name: partial(write, result) for name, write in _WRITERS.items()})
