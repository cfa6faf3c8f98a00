"""What docker/Dockerfile and docker/Dockerfile.cpu do, without Docker: the same scripts, into fresh virtual environments."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest

from lrq_vllm.vllm_environment import vllm_executable

ROOT = Path(__file__).parent.parent
UID = 54321  # of nobody, in particular without an entry in /etc/passwd


@dataclass(frozen=True)
class Image:
    """A virtual environment for an image's root. Commands run as a user without rights, if this one is root."""

    folder: Path

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def site(self) -> Path:
        return next(self.folder.glob("venv/lib/python*/site-packages"))

    def environment(self, **changes: str) -> dict[str, str]:
        """As in the Dockerfiles; vLLM's command is on PATH, as in an image."""
        vllm = Path(vllm_executable() or sys.executable).parent
        programs = os.pathsep.join([str(self.folder / "venv" / "bin"), str(vllm), "/usr/bin", "/bin"])
        return {
            "PATH": programs, "HOME": str(self.home), "USER": "lrq", "LRQ_UID": str(UID), "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1", "LRQ_SELFTEST": "1", "PYTHON": str(self.folder / "venv" / "bin" / "python"),
        } | changes  # fmt: skip

    def run(self, *command: str | Path, **changes: str) -> "subprocess.CompletedProcess[str]":
        """As the container's user, with its environment and these changes."""
        return subprocess.run(
            [str(part) for part in command],
            cwd=self.home, env=self.environment(**changes), text=True, capture_output=True, timeout=300, **other_user(),
        )  # fmt: skip

    def entrypoint(self, *arguments: str | Path, **changes: str) -> "subprocess.CompletedProcess[str]":
        """docker run IMAGE ARGUMENTS."""
        return self.run(self.folder / "docker" / "entrypoint.sh", *arguments, **changes)

    def start(self, log: Path, *arguments: str | Path, **changes: str) -> "subprocess.Popen[bytes]":
        """docker run --detach IMAGE ARGUMENTS, with its output in ``log``."""
        command = [str(part) for part in (self.folder / "docker" / "entrypoint.sh", *arguments)]
        with log.open("wb") as output:
            return subprocess.Popen(
                command, cwd=self.home, env=self.environment(**changes), stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True, **other_user(),
            )  # fmt: skip

    def install(self, *step: str | Path, **changes: str) -> "subprocess.CompletedProcess[str]":
        """A RUN of the Dockerfile, as this test's user, without a network."""
        command = [str(part) for part in (self.folder / "docker" / "install.sh", *step)]
        environment = self.environment(PIP_NO_INDEX="1", **changes)
        return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300)


def other_user() -> dict[str, object]:
    """For subprocess: a user without rights, if this is root."""
    return {"user": UID, "group": UID, "extra_groups": []} if os.geteuid() == 0 else {}


def python_for_others() -> Path:
    """This Python, or the same version in a usual place, that :func:`other_user` may run; skips if there is none."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for candidate in (getattr(sys, "_base_executable", sys.executable), f"/usr/bin/{name}", f"/usr/local/bin/{name}"):
        try:
            if (
                subprocess.run(
                    [candidate, "-c", "import ctypes, venv"], cwd="/", capture_output=True, **other_user()
                ).returncode
                == 0
            ):
                return Path(candidate)
        except OSError:
            continue
    pytest.skip(f"users without rights may not run {sys.executable}")


def context(destination: Path) -> Path:
    """What .dockerignore lets through to a build."""
    destination.mkdir()
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line.startswith("!"):
            source, copy = ROOT / line[1:], destination / line[1:]
            copy.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy)
    return destination


@contextmanager
def folder_for_others() -> Iterator[Path]:
    """A temporary folder that users without rights may read, as they may not read pytest's."""
    with tempfile.TemporaryDirectory(prefix="lrq-images-") as made:
        Path(made).chmod(0o755)
        yield Path(made)


class Images:
    """Made once each, in a folder that others may read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def wheels(self) -> Path:
        """The first stage: a folder with a wheel, built from the build context alone."""
        wheels = self.folder / "wheels"
        ended = new_image(self.folder / "wheel").install("wheel", context(self.folder / "context"), wheels)
        assert ended.returncode == 0, ended.stderr
        return wheels

    @cache  # noqa: B019 - there is one for a whole run
    def made(self, step: str) -> Image:
        """The second stage of Dockerfile (step lrq), and of Dockerfile.cpu (lrq-cpu)."""
        image = new_image(self.folder / step)
        # The CPU build asks for packages that do not work and are removed again: they are not here to be found.
        changes = {"PIP_NO_DEPS": "1"} if step == "lrq-cpu" else {}
        for command in ((step, self.wheels), ("home",)):
            ended = image.install(*command, **changes)
            assert ended.returncode == 0, ended.stderr
        return image


def new_image(folder: Path) -> Image:
    """Before its first RUN: Python, and the packages of this environment but lrq, which stand for the base image's."""
    folder.mkdir()
    venv = folder / "venv"
    subprocess.run([python_for_others(), "-m", "venv", "--without-pip", venv], check=True)
    # A .pth in these folders is not read: the checkout, which is installed by one, is not there.
    others = [path for path in sys.path if re.search(r"(site|dist)-packages$", path)]
    (Image(folder).site / "base_image.pth").write_text("\n".join(others) + "\n")
    shutil.copytree(ROOT / "docker", folder / "docker")
    (folder / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "install_cpu_vllm.sh", folder / "scripts")
    return Image(folder)
