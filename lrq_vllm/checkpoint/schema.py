"""What an LRQ checkpoint says about itself: the ``quantization_config`` of config.json, and the tensors it implies.

docs/checkpoint-format.md is the specification in words; tests/test_checkpoint.py holds both to literal bytes.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from lrq_vllm.checkpoint.correction import LOW_RANK_SUFFIXES, Correction
from lrq_vllm.checkpoint.hadamard import OnlineHadamard
from lrq_vllm.checkpoint.packing import packed_width, storage_dtype
from lrq_vllm.errors import CheckpointError, one_paragraph

__all__ = [
    "FORMAT_VERSION",
    "GROUP_UNIT",
    "QUANT_METHOD",
    "SCHEMES",
    "ActivationFormat",
    "Manifest",
    "Scheme",
    "TensorSpec",
    "WeightFormat",
    "config_without_quantization",
    "undivided_layers",
]

QUANT_METHOD = "lrq"
FORMAT_VERSION = 1
# Groups of inputs that share a step are multiples of this: whole packed words and whole kernel blocks.
GROUP_UNIT = 32
# Of keys and values in the cache: asymmetric, a step for each token and head, at run time.
_KV_CACHE = {"bits": 8, "granularity": "token_head", "mode": "dynamic", "symmetric": False}


@dataclass(frozen=True)
class ActivationFormat:
    """How inputs are quantized: ``static`` has one step per tensor, calibrated; else one per token, at run time.

    symmetric: the step comes from the token's largest magnitude times a calibrated ratio, and the zero-point is 2^(bits-1).
    """

    bits: int
    static: bool
    symmetric: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The object under ``activation`` in config.json."""
        rule = {"granularity": "tensor", "mode": "static"} if self.static else {"granularity": "token", "mode": "dynamic"}
        return {"bits": self.bits, **rule, "symmetric": self.symmetric}


@dataclass(frozen=True)
class Scheme:
    """Bit widths that go by one name, e.g. w4a8: 4-bit weights, 8-bit activations quantized per token."""

    weight_bits: int
    activation: ActivationFormat | None


SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        "w8a8": Scheme(8, ActivationFormat(8, static=True)),
        "w4a8": Scheme(4, ActivationFormat(8, static=False)),
        "w4a16": Scheme(4, None),
        "w3a16": Scheme(3, None),
        "w2a16": Scheme(2, None),
        "w4a4": Scheme(4, ActivationFormat(4, static=False, symmetric=True)),
    }
)


@dataclass(frozen=True)
class WeightFormat:
    """How every quantized weight W [out, in] is stored: one step per channel (a row), or per ``group_size`` inputs."""

    bits: int
    symmetric: bool = False
    group_size: int | None = None

    def groups(self, in_features: int) -> int:
        """Steps per row: 1, or in_features / group_size."""
        return 1 if self.group_size is None else in_features // self.group_size

    def to_dict(self) -> dict[str, Any]:
        """The object under ``weight`` in config.json."""
        granularity = "channel" if self.group_size is None else "group"
        return {
            "bits": self.bits,
            "granularity": granularity,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "packed_along": "input",
        }


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape that a stored tensor must have."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class Manifest:
    """The whole ``quantization_config``.

    quantized maps each quantized module to its weight's (out, in); skipped lists the linear modules left in 16 bits. kv_bits:
    8 if keys and values are to be cached in 8 bits; None for 16. tensor_parallel_sizes: on how many GPUs it can be served,
    the smallest first. correction: the low-rank pairs beside the integers; online_hadamard: the inputs to rotate first.
    """

    scheme: str
    weight: WeightFormat
    quantized: Mapping[str, tuple[int, int]]
    skipped: tuple[str, ...]
    tool_version: str
    kv_bits: int | None = None
    tensor_parallel_sizes: tuple[int, ...] = (1,)
    correction: Correction | None = None
    online_hadamard: OnlineHadamard | None = None

    @property
    def activation(self) -> ActivationFormat | None:
        """How this scheme quantizes activations; None leaves them in 16 bits."""
        return SCHEMES[self.scheme].activation

    def tensors_of(self, module: str) -> dict[str, TensorSpec]:
        """Tensor-name suffix -> what that tensor must be, for one quantized module.

        Raises KeyError for a module that the manifest does not list as quantized.
        """
        out_features, in_features = self.quantized[module]
        per_group = (out_features, self.weight.groups(in_features))
        bits = self.weight.bits
        specs = {
            "qweight": TensorSpec(storage_dtype(bits), (out_features, packed_width(in_features, bits))),
            "weight_step": TensorSpec(torch.float32, per_group),
            "weight_zero_point": TensorSpec(torch.uint8, per_group),
        }
        if self.activation is not None and self.activation.static:
            specs["input_step"] = TensorSpec(torch.float32, (1,))
            specs["input_zero_point"] = TensorSpec(torch.uint8, (1,))
        if self.activation is not None and self.activation.symmetric:
            specs["input_clip"] = TensorSpec(torch.float32, (1,))
        if self.correction is not None and module in self.correction.rank:
            rank, dtype = self.correction.rank[module], self.correction.dtype
            for suffix, rows in zip(LOW_RANK_SUFFIXES, (out_features, in_features), strict=True):
                specs[suffix] = TensorSpec(dtype, (rows, rank))
        return specs

    @property
    def quantized_bytes(self) -> int:
        """Bytes of everything that is stored for the quantized modules."""
        return sum(spec.nbytes for module in self.quantized for spec in self.tensors_of(module).values())

    @property
    def correction_bytes(self) -> int:
        """The share of U and V in :attr:`quantized_bytes`."""
        specs = (self.tensors_of(module) for module in self.quantized)
        return sum(of[suffix].nbytes for of in specs for suffix in LOW_RANK_SUFFIXES if suffix in of)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object for config.json."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "tool_version": self.tool_version,
            "scheme": self.scheme,
            "weight": self.weight.to_dict(),
            "activation": None if self.activation is None else self.activation.to_dict(),
            "kv_cache": None if self.kv_bits is None else dict(_KV_CACHE),
            "tensor_parallel_sizes": list(self.tensor_parallel_sizes),
            "correction": None if self.correction is None else self.correction.to_dict(),
            "online_hadamard": None if self.online_hadamard is None else self.online_hadamard.to_dict(),
            "quantized": {name: list(shape) for name, shape in self.quantized.items()},
            "skipped": list(self.skipped),
        }

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Manifest":
        """Read and check a ``quantization_config``.

        Raises CheckpointError with every problem found: another method or version, unknown keys, contradictions.
        """
        _check_version(config)
        problems = _key_problems(config)
        if problems:
            raise CheckpointError(_manifest_error(problems))
        weight_config, scheme = config["weight"], str(config["scheme"])
        correction, hadamard = config["correction"], config["online_hadamard"]
        try:
            manifest = cls(
                scheme=scheme,
                weight=WeightFormat(
                    bits=int(weight_config["bits"]),
                    symmetric=bool(weight_config["symmetric"]),
                    group_size=None if weight_config["group_size"] is None else int(weight_config["group_size"]),
                ),
                quantized=MappingProxyType({k: (int(v[0]), int(v[1])) for k, v in config["quantized"].items()}),
                skipped=tuple(config["skipped"]),
                tool_version=str(config["tool_version"]),
                kv_bits=None if config["kv_cache"] is None else 8,
                tensor_parallel_sizes=tuple(int(size) for size in config["tensor_parallel_sizes"]),
                correction=None if correction is None else Correction.from_dict(correction),
                online_hadamard=None
                if hadamard is None
                else OnlineHadamard(tuple(map(str, hadamard["modules"])), int(hadamard["block"]), int(hadamard["order"])),
            )
        except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise CheckpointError(_manifest_error([f"a value has the wrong form ({error!r})"])) from error
        problems = _contradictions(manifest, config)
        if problems:
            raise CheckpointError(_manifest_error(problems))
        return manifest

    def renamed(self, new_name: Callable[[str], str]) -> "Manifest":
        """The same checkpoint, of a model that calls its modules by other names."""
        correction, hadamard = self.correction, self.online_hadamard
        return replace(
            self,
            quantized={new_name(name): shape for name, shape in self.quantized.items()},
            skipped=tuple(map(new_name, self.skipped)),
            correction=correction and correction.renamed(new_name),
            online_hadamard=hadamard and replace(hadamard, modules=tuple(map(new_name, hadamard.modules))),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # A mapping proxy cannot be pickled, and vLLM sends its quantization config to worker processes.
        return (Manifest.from_dict, (self.to_dict(),))


def config_without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json's content as it was before quantization."""
    return {key: value for key, value in config.items() if key != "quantization_config"}


def undivided_layers(group_size: int, quantized: Mapping[str, tuple[int, int]]) -> list[str]:
    """A sentence for each module (name -> (out, in)) whose inputs are no multiple of the group size."""
    return [
        f"group_size {group_size} does not divide the {in_features} inputs of {name}"
        for name, (_, in_features) in quantized.items()
        if in_features % group_size
    ]


_KEYS = frozenset(
    [
        "quant_method",
        "format_version",
        "tool_version",
        "scheme",
        "weight",
        "activation",
        "kv_cache",
        "tensor_parallel_sizes",
        "correction",
        "online_hadamard",
        "quantized",
        "skipped",
    ]
)
# Keys that the scheme does not decide.
_CHOICES = ("kv_cache", "correction", "online_hadamard")


def _check_version(config: Mapping[str, Any]) -> None:
    method = config.get("quant_method")
    if method != QUANT_METHOD:
        raise CheckpointError(
            f"config.json says quant_method {method!r}, which is not an LRQ checkpoint. "
            "Quantize a model with `lrq-offline quantize`, or serve this one with the method that its config names."
        )
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"The checkpoint has format_version {version!r}; this installation of lrq reads version {FORMAT_VERSION}. "
            "Upgrade lrq, or quantize the model again with the version installed here."
        )


def _key_problems(config: Mapping[str, Any]) -> list[str]:
    problems = [f"key {key!r} is missing" for key in sorted(_KEYS - set(config))]
    problems += [f"key {key!r} is unknown" for key in sorted(set(config) - _KEYS)]
    if "scheme" in config and config["scheme"] not in tuple(SCHEMES):
        problems.append(f"scheme {config['scheme']!r} is none of {', '.join(SCHEMES)}")
    return problems


def _contradictions(manifest: Manifest, config: Mapping[str, Any]) -> list[str]:
    problems = []
    expected_bits = SCHEMES[manifest.scheme].weight_bits
    if manifest.weight.bits != expected_bits:
        problems.append(f"scheme {manifest.scheme} has {expected_bits}-bit weights, weight.bits says {manifest.weight.bits}")
    # What was read must say the same when it is written again: no value may have been bent into shape.
    written = manifest.to_dict()
    for key in sorted(_KEYS - {"quantized"}):
        if config[key] != written[key] and not (key == "weight" and problems):
            means = "this version knows null and" if key in _CHOICES else f"scheme {manifest.scheme} means"
            problems.append(f"{key} is {config[key]!r} where {means} {written[key]!r}")
    problems += [
        f"the shape of {name} is {config['quantized'][name]!r}, not two positive numbers"
        for name, shape in manifest.quantized.items()
        if config["quantized"][name] != list(shape) or min(shape) <= 0
    ]
    sizes = manifest.tensor_parallel_sizes
    if sizes[:1] != (1,) or list(sizes) != sorted(set(sizes)):
        problems.append(f"tensor_parallel_sizes is {list(sizes)}, not rising numbers from 1 up")
    if not manifest.quantized:
        problems.append("no module is listed as quantized")
    problems += [] if manifest.correction is None else manifest.correction.problems(manifest.quantized)
    problems += [] if manifest.online_hadamard is None else manifest.online_hadamard.problems(manifest.quantized)
    size = manifest.weight.group_size
    if size is not None:
        if manifest.weight.bits == 8:
            problems.append(f"group_size {size} does not go with {manifest.scheme}: 8-bit weights have one step per channel")
        elif size <= 0 or size % GROUP_UNIT:
            problems.append(f"group_size {size} is no positive multiple of {GROUP_UNIT}")
        else:
            problems += undivided_layers(size, manifest.quantized)
    return problems


def _manifest_error(problems: list[str]) -> str:
    return "The quantization_config of config.json is damaged: " + one_paragraph(
        problems, "Quantize the model again with `lrq-offline quantize`; the file is not meant to be edited by hand."
    )
