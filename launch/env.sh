# Sourced by the launchers: finds a Python, makes the environment and installs the project, once.
#
#   PYTHON   makes a new environment with this Python; else the newest from 3.11 on that really runs
#   VENV     the environment's folder, else .venv; a relative path starts at the project's folder
#   EXTRAS   extras of pyproject.toml to install, comma-separated; else what this machine needs
#   DRY_RUN  if set, the launchers print their command in place of installing and running
#
# Every launcher works in the project's folder, so paths in its arguments start there.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$ROOT" || exit
VENV=${VENV:-.venv}
[[ $VENV == /* ]] || VENV=$ROOT/$VENV

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*" && exit 1; }
dry() { [[ -n ${DRY_RUN:-} ]]; }

# run COMMAND...: runs it, or prints it on a dry run. `run exec ...` lets signals reach the program.
run() {
  if dry; then
    [[ $1 != exec ]] || shift
    printf '%q ' "$@" && echo
  else
    "$@"
  fi
}

# Prints the version of the Python $1 as one number (3.12.1 is 3012001). Fails if it does not run
# (as a pyenv shim whose version is not selected), if it cannot make an environment (Debian packs
# venv apart), or if it is of a kind that the dependencies have no wheels for.
python_version() {
  "$1" -I -c '
import sys, sysconfig, venv, ensurepip
version, threads = sys.version_info, sysconfig.get_config_var("Py_GIL_DISABLED")
fits = version >= (3, 11) and version.releaselevel in ("candidate", "final")
fits = fits and sys.implementation.name == "cpython" and not threads
sys.exit(print("%d%03d%03d" % version[:3]) if fits else 1)' 2>/dev/null
}

# Prints the path of the Python for a new environment.
find_python() {
  local python version folders folder newest=0 best=''
  if [[ -n ${PYTHON:-} ]]; then
    if python=$(type -P "$PYTHON") && python_version "$python" >/dev/null; then
      echo "$python" && return
    fi
    die "PYTHON=$PYTHON does not run, is older than 3.11, or lacks venv and ensurepip"
  fi
  IFS=: read -ra folders <<<"$PATH"
  for folder in "${folders[@]}" "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/*/bin \
    "${HOME:-}"/.local/share/uv/python/*/bin "${HOME:-}"/{miniconda3,miniforge3,anaconda3}/bin; do
    for python in "$folder"/python3 "$folder"/python3.[1-9][0-9]; do
      if [[ -x $python ]] && version=$(python_version "$python") && ((version > newest)); then
        newest=$version best=$python
      fi
    done
  done
  [[ -n $best ]] || die "found no Python from 3.11 on that runs and has venv and ensurepip" \
    "(on Debian and Ubuntu: apt install python3-venv); PYTHON=/path/to/python3 names one"
  echo "$best"
}

# Prints the extra that this machine's accelerator needs, if any.
accelerator() {
  if [[ $(nvidia-smi -L 2>/dev/null) == GPU* ]]; then
    echo cuda
  elif compgen -G '/dev/accel[0-9]*' >/dev/null; then
    echo tpu
  # Newer TPUs sit behind vfio, as other devices may; 0x1ae0 is Google's PCI vendor number.
  elif compgen -G '/dev/vfio/[0-9]*' >/dev/null &&
    grep -qs 0x1ae0 /sys/bus/pci/devices/*/vendor; then
    echo tpu
  fi
}

# Sees that $VENV holds a Python that runs and pip. Removes nothing but a broken environment.
make_venv() {
  local python found wanted minor='import sys; print("%d.%d" % sys.version_info[:2])'
  if found=$("$VENV/bin/python" -c "$minor" 2>/dev/null); then
    wanted=${PYTHON:+$("$PYTHON" -c "$minor")}
    [[ $found == "${wanted:-$found}" ]] ||
      die "$VENV holds Python $found, PYTHON=$PYTHON is $wanted: remove it or name another VENV"
    "$VENV/bin/python" -c 'import pip' 2>/dev/null || "$VENV/bin/python" -m ensurepip >/dev/null
    return
  fi
  if [[ -n $(ls -A "$VENV" 2>/dev/null) ]]; then
    [[ -e $VENV/pyvenv.cfg ]] || die "VENV=$VENV is no Python environment; name another folder"
    say "$VENV is broken: making it anew"
  fi
  python=$(find_python)
  say "Making $VENV with $python"
  "$python" -m venv --clear "$VENV"
}

# pip_install EXTRAS: shows a dot for each package; pip's own output goes to install.log.
pip_install() {
  local line log=$VENV/install.log
  printf '%s' "Installing efficient_nets${1:+[$1]} into $VENV (minutes, the first time) " >&2
  "$VENV/bin/python" -m pip install --progress-bar off --disable-pip-version-check \
    -e ".${1:+[$1]}" 2>&1 | while IFS= read -r line; do
    printf '%s\n' "$line" >&3
    case $line in
      Collecting*) printf . >&2 ;;
      'Installing collected'*) printf ' unpacking' >&2 ;;
    esac
  done 3>"$log" || {
    say '' && tail -n 20 "$log" >&2
    die "the installation failed ($log has it all); the same command tries again. If a package" \
      "has no build for this Python, remove $VENV and name another, as PYTHON=python3.12"
  }
  say " done in $SECONDS s"
}

# ensure_env EXTRAS: after it, $VENV holds the project with these extras. The stamp, which names
# what is installed, is written last: an interrupted installation is repaired by the next call, and
# a whole one costs no time. A subshell, so that the lock ends with it.
ensure_env() (
  SECONDS=0 stamp=$VENV/.installed
  IFS=, read -ra extras <<<"$1"
  known=$(sed -n '/^\[project.optional-dep/,/^\[tool/s/^\([a-z]*\) = .*/\1/p' pyproject.toml)
  for extra in "${extras[@]}"; do
    grep -qx -- "$extra" <<<"$known" ||
      die "EXTRAS=$1: pyproject.toml has no extra '$extra'; it has ${known//$'\n'/, }"
  done

  exec 9<"$ROOT"
  flock -n 9 || { say "Another launcher is installing; waiting for it" && flock 9; }
  make_venv
  key=$({ cat pyproject.toml && "$VENV/bin/python" -VV && pwd; } | sha256sum | cut -d ' ' -f 1)
  missing=''
  for word in "$key" "${extras[@]}"; do grep -qsx -- "$word" "$stamp" || missing=yes; done
  [[ -n $missing ]] || return 0

  # The extras of an earlier installation stay, and so stay in step with the rest.
  [[ ! -e $stamp ]] || mapfile -t -O "${#extras[@]}" extras < <(tail -n +2 "$stamp")
  mapfile -t extras < <(printf '%s\n' "${extras[@]}" | sort -u | sed '/^$/d')
  rm -f "$stamp"
  pip_install "$(IFS=, && echo "${extras[*]}")"
  printf '%s\n' "$key" "${extras[@]}" >"$stamp"
)
