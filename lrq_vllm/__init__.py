"""lrq for vLLM: the checkpoint format, the kernels, and the plugin behind ``--quantization lrq``."""

import logging

__all__ = ["register"]


def register() -> None:
    """Entry point of vLLM's general plugins: make the quantization method ``lrq`` known. May be called repeatedly.

    vLLM calls it once in each of its processes, before any layer exists; it must stay cheap and must not touch a GPU. In a
    vLLM that lacks what the plugin imports it leaves a warning: other models still start.
    """
    from lrq_vllm.cli_errors import show_lrq_errors_plainly
    from lrq_vllm.vllm_versions import SUPPORTED

    try:
        from vllm.model_executor.layers.quantization import register_quantization_config
        from vllm.platforms import current_platform

        from lrq_vllm.cpu_tiles import ask_for_tiles
        from lrq_vllm.cpu_waiting import wait_asleep
        from lrq_vllm.quant_config import LrqConfig
        from lrq_vllm.ray_workers import copy_variables_to_workers

        if current_platform.is_cpu():
            from lrq_vllm.cpu_norms import offer_whole_norms
    except (ImportError, AttributeError, KeyError) as error:
        logging.getLogger(f"vllm.{__name__}").warning(
            "lrq is not available: it works with vLLM %s, and this one lacks what it needs (%s).", SUPPORTED, error
        )
        return
    register_quantization_config("lrq")(LrqConfig)
    copy_variables_to_workers()
    if current_platform.is_cpu():
        wait_asleep()
        ask_for_tiles()
        offer_whole_norms()
    show_lrq_errors_plainly()
