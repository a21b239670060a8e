#!/bin/sh
# Starts the demo: three backends and the load balancer. See ./start_all.sh --help
# This only finds a Python and becomes it; start_all.py does the work, the same on every system.
set -eu

script="$(readlink -f -- "$0" 2>/dev/null || printf '%s' "$0")"
here="$(CDPATH='' cd -- "$(dirname -- "$script")" && pwd)"
found=none

for python in python3.14 python3.13 python3.12 python3.11 python3 python; do
    check='import platform, sys; print(platform.python_version()); sys.exit(sys.version_info < (3, 11))'
    if version="$("$python" -c "$check" 2>/dev/null)"; then
        exec "$python" "$here/start_all.py" "$@"
    elif [ -n "$version" ]; then
        found="$version ($python)"
    fi
done

echo "start_all: error: Python 3.11 or newer is needed, found: $found; install it from python.org or your system's packages" >&2
exit 2
