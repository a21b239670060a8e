#!/usr/bin/env bash
# The benchmark with its own set-up: ./bench/run.sh; arguments go to bench/run.py.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

fail() {
    echo "bench/run.sh: error: $*" >&2
    exit 2
}

# The file itself, and neither a link of another environment nor the shim of a version manager; and its version.
identify() {
    "$1" -c 'import os, sys; sys.version_info < (3, 11) and sys.exit(1); print(os.path.realpath(sys.executable), sys.version)' 2>/dev/null
}

# The Python that people have: nginx and the others are Debian's, so the Python contenders run on Debian's as well.
python=/usr/bin/python3
identify "$python" >/dev/null || python=python3
if [[ " $* " =~ " --python"[=\ ]([^ ]+) ]]; then python=${BASH_REMATCH[1]}; fi
identity=$(identify "$python") || fail "--python $python: Python 3.11 or newer is needed (on Debian: apt-get install python3)"
case " $* " in *" -h "* | *" --help "* | *" --render"*) exec "$python" bench/run.py "$@" ;; esac
# Arguments that are wrong, before anything is installed.
PYTHONPATH=bench "$python" -c 'import sys, run; sys.argv[0] = "run.sh"; run.parse()' "$@" || exit

missing=()
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
for program in nginx haproxy wrk; do
    PATH="$PATH:/usr/sbin" command -v "$program" >/dev/null || missing+=("$program")
done
if [ "${#missing[@]}" -gt 0 ]; then
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        fail "not installed: ${missing[*]} (on Debian: sudo apt-get install ${missing[*]})"
    fi
    echo "Installing ${missing[*]} ..."
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq || fail "apt-get update failed"
    # RUNLEVEL=1: the packages are not to start their services, nothing but the benchmark shall use the CPU.
    RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null || fail "apt-get install failed"
fi

# bench/.venv, made again when interpreter or requirements are others; without the stamp it is not finished.
wanted="$identity $(cat requirements.txt bench/requirements.txt | sha256sum)"
if [ "$(cat bench/.venv/made-of 2>/dev/null)" != "$wanted" ]; then
    echo "Making bench/.venv with ${identity%% *} and installing bench/requirements.txt ..."
    "${identity%% *}" -m venv --clear bench/.venv || fail "could not make bench/.venv with $python"
    bench/.venv/bin/python -m pip --disable-pip-version-check --no-input install -qq -r bench/requirements.txt ||
        fail "could not install bench/requirements.txt"
    echo "$wanted" >bench/.venv/made-of
fi
exec bench/.venv/bin/python bench/run.py "$@"
