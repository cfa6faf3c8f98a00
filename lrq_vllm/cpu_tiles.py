"""On a CPU with AMX, vLLM's attention multiplies with tiles, which Linux grants to a process that has asked for them.

oneDNN asks when it first multiplies with them. Where layers are small, or compute without oneDNN, attention may come earlier:
vLLM's process then ends with "illegal instruction".
"""

import torch

__all__ = ["ask_for_tiles"]


def ask_for_tiles() -> None:
    """Once asked, it holds for this process and for those that it forks."""
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
