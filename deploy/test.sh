#!/bin/bash
# Installs what is missing, then runs the static checks and every test tier.
#   sudo deploy/test.sh [--fast] [--vm KERNEL] [--nic DRIVER] [--long] [pytest arguments]
# --fast        leaves out the booted kernels and the files marked slow: those that take more than half a minute.
# --vm KERNEL   boots this kernel (6.1, 6.12 ..., all; several times) for a choice of the tests; default: all, for a few.
# --nic DRIVER  tries this emulated network card (igb, virtio_net ..., all); likewise.
# --long        whole products where a choice would do, and every test on every kernel that is booted (hours).
# The machines run beside the tests out here, with what these leave of the CPUs. What they said is in .cache/vm/logs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

arguments=()
for argument in "$@"; do
    if [ "$argument" = --fast ]; then
        arguments+=(-m 'not slow and not vm')
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
# BPF programs are compiled once, out here; the booted machines get them from there (tests/vm/image.py).
export OFFLOAD_COMPILED=$PWD/.cache/vm/compiled
mkdir -p "$OFFLOAD_COMPILED"
find "$OFFLOAD_COMPILED" -type f ! -newer offload/kernel/compile.py -delete

timed set-up deploy/setup.sh --dev
timed 'ruff check' ruff check .
timed 'ruff format' ruff format --check .
timed 'mypy --strict' mypy --strict
exec python -m pytest -p tests.tiers "${arguments[@]}"
