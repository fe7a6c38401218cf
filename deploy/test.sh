#!/bin/bash
# Installs what is missing, then runs the static checks and every test tier.
#   sudo deploy/test.sh [--fast] [pytest arguments]
# --fast leaves out the files marked slow: those that take more than half a minute.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

arguments=()
for argument in "$@"; do
    if [ "$argument" = --fast ]; then
        arguments+=(-m 'not slow')
    else
        arguments+=("$argument")
    fi
done

timed() {
    local what=$1 start=$EPOCHREALTIME
    shift
    printf '== %s\n' "$what"
    "$@"
    awk -v what="$what" -v start="$start" -v end="$EPOCHREALTIME" \
        'BEGIN { printf "== %s: %.1f s\n", what, end - start }'
}

# The distribution's tools, whatever else the caller has on its path.
export PATH=$PWD/.venv/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8

timed set-up deploy/setup.sh --dev
timed 'ruff check' ruff check .
timed 'ruff format' ruff format --check .
timed 'mypy --strict' mypy --strict
exec python -m pytest -p tests.tiers "${arguments[@]}"
