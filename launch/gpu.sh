#!/usr/bin/env bash
# Trains on all NVIDIA GPUs of this host; CUDA_VISIBLE_DEVICES=0,1 chooses some.
#
#   ./launch/gpu.sh --config=configs/imagenet_resnet.py --workdir=DIR
#
#   XLA_PYTHON_CLIENT_MEM_FRACTION  share of each GPU's memory that JAX takes at start: here 0.9,
#                                   room for the CUDA libraries alone; JAX's own default is 0.75
#   DETERMINISTIC=1                 bit-equal runs, slower: no atomic adds, no timing of kernels
#   XLA_FLAGS                       comes after the flags set here, and so overrides them
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"

dry || [[ $(nvidia-smi -L 2>/dev/null) == GPU* ]] ||
  die "nvidia-smi lists no GPU; ./launch/local.sh trains on a CPU"

# Gradients are summed across the GPUs while the backward pass is still computing.
flags=--xla_gpu_enable_latency_hiding_scheduler=true
[[ -z ${DETERMINISTIC:-} ]] || flags+=' --xla_gpu_deterministic_ops=true'

# With the platform named, a GPU that cannot start is an error and not a slow run on the CPU.
run exec env JAX_PLATFORMS="${JAX_PLATFORMS:-cuda,cpu}" \
  XLA_FLAGS="$flags${XLA_FLAGS:+ $XLA_FLAGS}" \
  XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}" \
  EXTRAS="${EXTRAS-cuda}" "$ROOT/launch/local.sh" "$@"
