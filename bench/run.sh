#!/usr/bin/env bash
# The benchmark with its own set-up: ./bench/run.sh; arguments go to bench/run.py.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

missing=()
for program in nginx haproxy caddy wrk; do
    PATH="$PATH:/usr/sbin" command -v "$program" >/dev/null || missing+=("$program")
done

if [ "${#missing[@]}" -gt 0 ]; then
    if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
        echo "Installing ${missing[*]} ..."
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq
        # RUNLEVEL=1: the packages are not to start their services, nothing but the benchmark shall use the CPU.
        RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
    else
        echo "bench/run.sh: error: not installed: ${missing[*]} (on Debian: sudo apt-get install ${missing[*]})" >&2
        exit 2
    fi
fi

./start_all.sh setup
stamp=.venv/requirements-bench.sha256
wanted="$(cat requirements.txt bench/requirements.txt | .venv/bin/python -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing bench/requirements.txt into .venv ..."
    .venv/bin/python -m pip --disable-pip-version-check --no-input install -qq -r bench/requirements.txt
    echo "$wanted" >"$stamp"
fi

exec .venv/bin/python bench/run.py "$@"
