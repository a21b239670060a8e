#!/usr/bin/env bash
# Every check and every test, with their own set-up: ./tests/run.sh
# With arguments only pytest runs, and gets them: ./tests/run.sh tests/test_backend_server.py -k faults
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

# Programs that the tests call, and the Debian packages that bring them.
missing=()
for pair in chromium-headless-shell firefox-esr curl wrk nginx h2load:nghttp2-client shellcheck openssl systemd-analyze:systemd redis-server; do
    PATH="$PATH:/usr/sbin" command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
done
python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)

if [ "${#missing[@]}" -gt 0 ]; then
    if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
        echo "Installing ${missing[*]} ..."
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq
        # RUNLEVEL=1: the packages are not to start their services.
        RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
    elif [ "$#" -gt 0 ]; then
        echo "tests/run.sh: warning: not installed: ${missing[*]}" >&2
    else
        echo "tests/run.sh: error: not installed: ${missing[*]} (on Debian: sudo apt-get install ${missing[*]})" >&2
        exit 2
    fi
fi

# The demo's own .venv, with the test packages on top; the stamp is written last, as in demo/running.py.
./start_all.sh setup
stamp=.venv/requirements-dev.sha256
wanted="$(cat requirements.txt requirements-dev.txt | .venv/bin/python -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing requirements-dev.txt into .venv ..."
    .venv/bin/python -m pip --disable-pip-version-check --no-input install -qq -r requirements-dev.txt
    echo "$wanted" >"$stamp"
fi

# promtool checks metrics and alert rules. Debian's package would also start a server, so only the program is taken.
fetch_promtool() {
    local place
    place="$(mktemp -d)"
    if [ "$(id -u)" -eq 0 ]; then apt-get update -qq; fi
    (cd "$place" && apt-get download -qq prometheus) && dpkg-deb -x "$place"/prometheus_*.deb "$place" &&
        mv "$place/usr/bin/promtool" .venv/bin/
    rm -rf "$place"
}
export PATH="$PATH:$PWD/.venv/bin"
if ! command -v promtool >/dev/null && ! { command -v apt-get >/dev/null && fetch_promtool 2>/dev/null; }; then
    echo "tests/run.sh: $([ "$#" -gt 0 ] && echo warning || echo error): not installed: promtool (a part of Prometheus)" >&2
    [ "$#" -gt 0 ] || exit 2
fi

if [ "$#" -gt 0 ]; then
    exec .venv/bin/python -m pytest "$@"
fi

run() {
    echo "+ $*"
    "$@"
}

run .venv/bin/ruff format --check .
run .venv/bin/ruff check .
run .venv/bin/mypy
run shellcheck start_all.sh tests/run.sh bench/run.sh .ci/run
# Half of a test's time is waiting, so that two workers for each of two CPUs keep these busy.
run .venv/bin/python -m pytest --numprocesses 4 --dist loadfile
