"""lrq for vLLM: the checkpoint format, the kernels, and the plugin behind ``--quantization lrq``."""

__all__ = ["register"]


def register() -> None:
    """Entry point of vLLM's general plugins: make the quantization method ``lrq`` known. May be called repeatedly.

    vLLM calls it once in each of its processes, before any layer exists; it must stay cheap and must not touch a GPU.
    """
    from vllm.model_executor.layers.quantization import register_quantization_config

    from lrq_vllm.cli_errors import show_lrq_errors_plainly
    from lrq_vllm.quant_config import LrqConfig

    register_quantization_config("lrq")(LrqConfig)
    show_lrq_errors_plainly()
