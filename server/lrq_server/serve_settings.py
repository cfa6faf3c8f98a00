"""What ``lrq-server serve`` adds to vLLM's options."""

from dataclasses import dataclass

from lrq_vllm.errors import SettingsError, one_paragraph

__all__ = ["LOG_FORMATS", "ServeSettings"]

LOG_FORMATS = ("text", "json")


@dataclass(frozen=True)
class ServeSettings:
    """Limits and manners of one server.

    max_request_mb: of a request's body, 10^6 bytes each. max_concurrent_requests: that are worked on or wait, together.
    drain_seconds: that requests have to end after SIGTERM. hash_files: compare the content of all tensors before loading.
    Raises SettingsError for values that no server can have.
    """

    max_request_mb: float = 16
    max_concurrent_requests: int = 1024
    drain_seconds: float = 30
    log_format: str = "text"
    hash_files: bool = True

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.max_request_mb < float("inf"):
            problems.append(f"--max-request-mb is {self.max_request_mb:g}, not a size that lets requests in")
        if self.max_concurrent_requests < 1:
            problems.append(f"--max-concurrent-requests is {self.max_concurrent_requests}, which lets no request in")
        if not 0 <= self.drain_seconds <= 86400:
            problems.append(f"--drain-seconds is {self.drain_seconds:g}, not between 0 and a day")
        if self.log_format not in LOG_FORMATS:
            problems.append(f"--log-format is {self.log_format!r}, not {' or '.join(LOG_FORMATS)}")
        if problems:
            raise SettingsError(one_paragraph(problems, "Correct it or leave it out."))

    @property
    def max_request_bytes(self) -> int:
        """Of a request's body."""
        return int(self.max_request_mb * 1_000_000)
