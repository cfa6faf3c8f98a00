"""Experts that few calibration tokens reach: their layers are rounded without looking at data, on what the others receive."""

from lrq_offline.decoder_blocks import Family
from lrq_offline.layer_inputs import InputSample

__all__ = ["TOO_FEW", "lend_samples", "short_of_tokens"]

_FEWEST = 64
TOO_FEW = f"fewer than {_FEWEST} calibration tokens reached its expert"


def short_of_tokens(family: Family, samples: dict[str, InputSample]) -> frozenset[str]:
    """The layers of experts with too few tokens. samples: by the first layer of each group."""
    if family.experts is None:
        return frozenset()
    names = family.experts
    few = [expert for expert in range(family.expert_count) if samples[names.output_of(expert)].seen < _FEWEST]
    return frozenset(layer for expert in few for layer in (*names.inputs_of(expert), names.output_of(expert)))


def lend_samples(family: Family, samples: dict[str, InputSample], short: frozenset[str]) -> None:
    """Give the output layers of experts in ``short`` the samples of all experts together, in place."""
    if family.experts is None or not short:
        return
    outputs = [family.experts.output_of(expert) for expert in range(family.expert_count)]
    of_all = InputSample.of_any(samples[name] for name in outputs)
    samples |= {name: of_all for name in outputs if name in short}
