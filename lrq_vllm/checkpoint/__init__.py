"""The checkpoint format: what is stored, how it is packed, and what the integers mean. Needs torch and safetensors only."""

from lrq_vllm.checkpoint.schema import FORMAT_VERSION, QUANT_METHOD, SCHEMES, Manifest
from lrq_vllm.checkpoint.store import TensorFolder, check_tensors, read_manifest

__all__ = ["FORMAT_VERSION", "QUANT_METHOD", "SCHEMES", "Manifest", "TensorFolder", "check_tensors", "read_manifest"]
