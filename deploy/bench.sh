#!/usr/bin/env bash
# Usage: deploy/bench.sh [--quick] [--json FILE] [PART ...]
# Installs what is missing and compares offload with what Linux has, side by side, in namespaces of its own:
# half an hour, or with --quick a few minutes. Charts are written beside FILE. PART: only such parts
# (classification, wire, vm, tcp, latency, isolation, guest, control, control-10000).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
deploy/setup.sh --dev >&2
exec .venv/bin/python -m tests.bench "$@"
