#!/usr/bin/env bash
# The benchmark with its own set-up: ./bench/run.sh; arguments go to bench/run.py.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

# The Python that people have: nginx and the others are Debian's, so the Python contenders run on Debian's as well.
is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
can_make_environments() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }
python=/usr/bin/python3
missing=()
if ! is_new_enough "$python"; then
    python=python3
    if ! is_new_enough "$python"; then
        echo "bench/run.sh: error: Python 3.11 or newer is needed (on Debian: sudo apt-get install python3)" >&2
        exit 2
    fi
elif ! can_make_environments "$python"; then
    missing+=(python3-venv)
fi
for program in nginx haproxy caddy wrk; do
    PATH="$PATH:/usr/sbin" command -v "$program" >/dev/null || missing+=("$program")
done

case " $* " in *" -h "* | *" --help "* | *" --render"*) exec "$python" bench/run.py "$@" ;; esac

if [ "${#missing[@]}" -gt 0 ]; then
    if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
        echo "Installing ${missing[*]} ..."
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq
        # RUNLEVEL=1: the packages are not to start their services, nothing but the benchmark shall use the CPU.
        RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
    elif [ "${missing[*]}" != python3-venv ]; then
        echo "bench/run.sh: error: not installed: ${missing[*]} (on Debian: sudo apt-get install ${missing[*]})" >&2
        exit 2
    fi
fi
if [ "$python" = /usr/bin/python3 ] && ! can_make_environments "$python"; then
    echo "bench/run.sh: warning: $python needs the package python3-venv; measuring with $(command -v python3) instead" >&2
    python=python3
elif [ "$python" = python3 ]; then
    echo "bench/run.sh: warning: no /usr/bin/python3 of version 3.11 or newer; measuring with $(command -v python3)" >&2
fi

exec "$python" bench/run.py --python "$python" "$@"
