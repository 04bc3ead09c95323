#!/usr/bin/env bash
# Trains on this machine, on whatever it has: CPU, NVIDIA GPUs or a TPU.
#
#   ./launch/local.sh --config=configs/quickstart.py [--workdir=DIR] [--config.a.b=value ...]
#
# The first call makes .venv and installs; env.sh names the variables that change how. The same
# command again goes on from the newest checkpoint.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"

dry || ensure_env "${EXTRAS-$(accelerator)}"
run exec "$VENV/bin/python" -m efficient_nets.main "$@"
