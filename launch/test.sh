#!/usr/bin/env bash
# Checks the source and runs the tests; arguments go to pytest.
#
#   ./launch/test.sh                                    all but the slow tests, 2 cases of each
#   ./launch/test.sh --cases 0                          all of their cases
#   ./launch/test.sh --part 0/4 --cases 1               each fourth of them, one case of each
#   ./launch/test.sh -m slow                            the slow ones alone
#   ./launch/test.sh tests/launch_test.py -k stamp      some
#   VENV=.venv-3.12 PYTHON=python3.12 ./launch/test.sh  on another Python
#   EXTRAS=test,tpu ./launch/test.sh -m slow            with libtpu, to compile for a TPU
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"

dry || ensure_env "${EXTRAS-test}"
run "$VENV/bin/python" -m ruff check
run "$VENV/bin/python" -m ruff format --check
run exec "$VENV/bin/python" -m pytest -n 2 "$@"
