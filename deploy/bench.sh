#!/usr/bin/env bash
# Usage: deploy/bench.sh [--quick] [--json FILE]
# Installs what is missing and compares the paths from the wire to a VM, in namespaces of its own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
deploy/setup.sh --dev >&2
exec .venv/bin/python -m tests.bench.wire_to_vm "$@"
