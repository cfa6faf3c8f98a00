#!/usr/bin/env python3
"""The GPU tests of our kernels under compute-sanitizer, which watches every access to memory.

    python bench/memcheck.py --out bench/results/memcheck-h200.json          # an NVIDIA GPU and CUDA's compute-sanitizer
    python bench/memcheck.py --tests tests/test_hadamard.py --out memcheck.json
    python bench/memcheck.py --left --out memcheck.json                      # what a run that was cut short has not come to

torch takes each tensor from the driver by itself, so that what is read behind a tensor's end is not another tensor's. Tests run
a few to a process, because kernels that a process has loaded keep memory of the GPU; those that record CUDA graphs run with
torch's own allocator. Ends with code 1 if an access was wrong, a test failed or did not run. The file is written after each
batch, with what is known so far.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from measured_on import measured_on

ROOT = Path(__file__).parent.parent
TESTS = ("hopper_kernels", "low_rank_kernels", "hadamard", "kernels", "grouped_gemm")
BATCH = 20
GRAPHS = "cuda_graph"  # in the name of a test that records one


class Found(NamedTuple):
    """Of some tests."""

    passed: int
    errors: list[str]  # first lines of what compute-sanitizer found, and "test: why" of tests that did not pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    files = [f"tests/test_{name}.py" for name in TESTS]
    parser.add_argument("--tests", nargs="+", default=files, metavar="FILE", help=f"default: {' '.join(files)}")
    parser.add_argument("--at-once", type=int, default=4, metavar="N", help="processes (default: 4)")
    parser.add_argument("--left", action="store_true", help="only tests that the file says were not run; the rest of it stays")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        sys.exit("compute-sanitizer is not on PATH or in /usr/local/cuda/bin. It comes with CUDA's toolkit.")
    tests = collected(arguments.tests)
    passed, errors, left = 0, list[str](), set(tests)
    if arguments.left:
        before = json.loads(arguments.out.read_text())
        passed, errors, left = before["passed"], before["errors"], left.intersection(before["not_run"])
    graphs = [test for test in tests if test in left and GRAPHS in test]
    others = [test for test in tests if test in left and GRAPHS not in test]
    count = -(-len(others) // BATCH)
    batches = [batch for batch in (*(others[first::count] for first in range(count)), graphs) if batch]
    tool = subprocess.run([sanitizer, "--version"], capture_output=True, text=True).stdout.strip().splitlines()[-1]
    about = {**measured_on("lrq", "torch", "triton"), "tool": tool, "files": arguments.tests, "tests": len(tests)}
    with ThreadPoolExecutor(arguments.at_once) as pool:
        running = {pool.submit(checked, sanitizer, batch): batch for batch in batches}
        for done in as_completed(running):
            found = done.result()
            passed, errors, left = passed + found.passed, errors + found.errors, left.difference(running[done])
            result = {**about, "passed": passed, "errors": errors, "not_run": sorted(left)}
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{passed} of {len(tests)} tests passed, {len(errors)} errors")
    sys.exit(bool(errors) or passed < len(tests))


def collected(files: list[str]) -> list[str]:
    """The names of the GPU tests."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", *files]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    return [line for line in lines if "::" in line]


def checked(sanitizer: str, tests: list[str]) -> Found:
    """Run these in a process of their own."""
    variables = {"COLUMNS": "400"}  # room for why a test failed, behind its name
    if GRAPHS not in tests[0]:
        variables["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        names, log = Path(folder, "tests"), Path(folder, "log")
        names.write_text("\n".join(tests) + "\n")
        # What libraries ask the driver for in vain is no access to memory.
        command = [
            sanitizer, "--tool", "memcheck", "--report-api-errors", "no", "--target-processes", "all", "--log-file", str(log),
            sys.executable, "-m", "pytest", "-q", "-rfEs", "-p", "no:cacheprovider", f"@{names}",
        ]  # fmt: skip
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | variables).stdout
        found = re.findall(r"^=+ ((?:Invalid|Misaligned|Out-of-range|Warp|Unspecified|Address).*)", log.read_text(), re.M)
    passed = re.search(r"(\d+) passed", said)
    failed = re.findall(r"^(?:FAILED|ERROR|SKIPPED) .*", said, re.M)
    print(said.strip().splitlines()[-1], flush=True)
    return Found(int(passed[1]) if passed else 0, found + failed)


if __name__ == "__main__":
    main()
