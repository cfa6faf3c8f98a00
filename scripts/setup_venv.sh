#!/usr/bin/env bash
# Make .venv with everything: the three packages (editable), vLLM, and the tools for tests.
#
#   scripts/setup_venv.sh            uses the newest python3.11+ on PATH; PYTHON=/path/to/python chooses one
#
# Without an NVIDIA GPU it installs the CPU builds (install_cpu_vllm.sh).
# Running it again does nothing unless these scripts or pyproject.toml have changed.
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

stamp=$(cat pyproject.toml scripts/setup_venv.sh scripts/install_cpu_vllm.sh | sha256sum | cut -d' ' -f1)
if [ "$(cat $venv/lrq-setup-stamp 2>/dev/null || true)" = "$stamp" ]; then exit 0; fi

command -v cc >/dev/null || fail "no C compiler (cc) found: torch compiles with it. Install gcc or clang."
python=$(find_python)
echo "setup: making $venv with $("$python" --version) (a few minutes, about 4 GB)"
[ -x $venv/bin/python ] || "$python" -m venv $venv

if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
  $venv/bin/python -m pip --disable-pip-version-check install --quiet -e '.[offline,server,cuda,dev]'
else
  scripts/install_cpu_vllm.sh $venv/bin/python -e '.[offline,server,cpu,nvrtc,dev]'
fi
echo "$stamp" >$venv/lrq-setup-stamp
echo "setup: ready"
