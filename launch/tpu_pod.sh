#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU slice. Run it on a computer where gcloud is logged in, best
# within tmux, since the training ends with the connection:
#
#   NAME=my-slice ZONE=us-west4-a [PROJECT=my-project] ./launch/tpu_pod.sh \
#     --config=configs/imagenet_resnet.py --workdir=/mnt/shared/run
#
# Copies the source to ~/efficient_nets on every host and starts launch/local.sh there; --workdir is
# a folder that all hosts see. The same command again goes on from the newest checkpoint. A host
# without Python 3.11, as under Ubuntu 22.04, gets it from its package registry.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"

usage='usage: NAME=SLICE ZONE=ZONE ./launch/tpu_pod.sh --config=FILE.py --workdir=SHARED_DIR'
for variable in NAME ZONE; do
  [[ -n ${!variable:-} ]] || die "$variable is not set; $usage"
done
for flag in --config --workdir; do
  [[ " $*" == *" $flag"[=\ ]* ]] || die "$flag=... is missing; $usage"
done
dry || type -P gcloud >/dev/null || die "there is no gcloud on PATH: install the Google Cloud CLI"

hosts=(--zone="$ZONE" --worker=all ${PROJECT:+--project="$PROJECT"})
archive=efficient_nets.tar.gz
remote="set -e
mkdir -p efficient_nets && tar -xzf $archive -C efficient_nets && cd efficient_nets
(source launch/env.sh && find_python) >/dev/null 2>&1 || {
  sudo apt-get update -qq
  sudo apt-get install -y -qq python3.11-venv || sudo apt-get install -y -qq python3-venv
}
EXTRAS=tpu exec ./launch/local.sh --distributed$(printf ' %q' "$@")"

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
run tar --exclude=__pycache__ -czf "$folder/$archive" \
  pyproject.toml README.md LICENSE efficient_nets configs launch
run gcloud compute tpus tpu-vm scp "$folder/$archive" "$NAME:$archive" "${hosts[@]}"
run gcloud compute tpus tpu-vm ssh "$NAME" "${hosts[@]}" --command="$remote"
