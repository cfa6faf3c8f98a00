"""Seeds, the device, the Triton interpreter where there is no GPU, and checkpoints that several tests share."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Triton decides when it is imported whether kernels are interpreted, so this stands before any test module is loaded.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# After the line above: what this imports may import Triton.
from tests.checkpoints import Checkpoints, checkpoint_maker
from tests.images import Images, folder_for_others

# The same examples in every run, no time limit for one example, nothing remembered on disk.
settings.register_profile("lrq", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("lrq")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the tests marked gpu where there is none."""
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(scope="session")
def checkpoints(pytestconfig: pytest.Config) -> Checkpoints:
    """Checkpoints of the tiny model, by scheme and method."""
    assert pytestconfig.cache is not None
    return checkpoint_maker(pytestconfig.cache.mkdir("checkpoints"))


@pytest.fixture(scope="session")
def sealed(checkpoints: Checkpoints) -> Path:
    """A checkpoint with every kind of tensor. Not to be changed."""
    return checkpoints("w8a8", "lrq")


@pytest.fixture
def copy(sealed: Path, tmp_path: Path) -> Path:
    """Of that, to be changed."""
    return shutil.copytree(sealed, tmp_path / "changed")


@pytest.fixture(scope="session")
def images() -> Iterator[Images]:
    """What the Dockerfiles make, each made once per session."""
    with folder_for_others() as folder:
        yield Images(folder)


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: the GPU if there is one, else the CPU under Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)
