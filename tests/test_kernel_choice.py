"""Which kernel a layer runs on."""

from typing import NamedTuple

import pytest
import torch

from lrq_vllm.errors import SettingsError
from lrq_vllm.kernel_choice import first_that_can

CPU = torch.device("cpu")


class Kernel(NamedTuple):
    name: str


FAST, SLOW = Kernel("fast"), Kernel("slow")


def test_the_first_kernel_that_can_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LRQ_KERNEL", raising=False)
    assert first_that_can([(FAST, "needs more"), (SLOW, None)], CPU) is SLOW
    assert first_that_can([(FAST, None), (SLOW, None)], CPU) is FAST


def test_the_environment_can_name_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRQ_KERNEL", "slow")
    assert first_that_can([(FAST, None), (SLOW, None)], CPU) is SLOW


def test_a_named_kernel_that_cannot_run_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRQ_KERNEL", "fast")
    with pytest.raises(SettingsError, match=r"LRQ_KERNEL asks for a kernel that cannot run on cpu \(fast: needs more"):
        first_that_can([(FAST, "needs more"), (SLOW, None)], CPU)


def test_a_name_that_no_kernel_has_is_refused_with_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRQ_KERNEL", "fastest")
    with pytest.raises(SettingsError, match="'fastest', but these layers run on one of fast, slow"):
        first_that_can([(FAST, None), (SLOW, None)], CPU)


def test_without_any_kernel_every_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LRQ_KERNEL", raising=False)
    with pytest.raises(SettingsError, match="fast: needs more; slow: needs less"):
        first_that_can([(FAST, "needs more"), (SLOW, "needs less")], CPU)
