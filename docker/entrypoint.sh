#!/usr/bin/env bash
# What a container runs: `lrq-server serve` with the container's arguments, or another command of lrq-server's.
#
#   docker run ... lrq /models/Llama-3-8B-lrq-w4a16 --max-model-len 8192
#   docker run ... lrq bench --url http://server:8000
#   docker run ... lrq --version
set -euo pipefail

case "${1:-}" in
  serve | bench | eval | -h | --help | --version) ;;
  *) set -- serve "$@" ;;
esac

# vLLM and torch keep what they compile there. With a read-only root it has to be mounted.
if [ ! -d "${HOME:-}" ] || [ ! -w "$HOME" ]; then
  echo "lrq: $(id -u) cannot write to HOME (${HOME:-not set}), where compiled code is kept." \
    "Mount a volume or a tmpfs there that this user may write to." >&2
  exit 2
fi
# exec: signals reach the server, which then lets requests end.
exec lrq-server "$@"
