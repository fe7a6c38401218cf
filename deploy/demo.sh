#!/bin/bash
# Installs what is missing, then shows the main job on a network of its own: a NIC with four queues, a peer
# behind it, four VMs, real traffic through VM queues and then through the bridge alone.
#   sudo deploy/demo.sh
# No interface of this machine is touched. It takes about a minute once everything is installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH=$PWD/.venv/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8

# In a mount namespace of its own: namespaces, pins and directories have their usual places, cannot be
# taken for those of this machine, and go with the last process, however it ends.
if [ "${1-}" = --inside ]; then
    mount -t tmpfs -o mode=755 offload-demo /run
    mount -t bpf -o mode=700 offload-demo /sys/fs/bpf
    unset OFFLOAD_RUN_DIR OFFLOAD_PIN_DIR
    export OFFLOAD_STATE_DIR=/run/demo/state
    exec python -u deploy/demo.py
fi
if [ $# -gt 0 ]; then
    sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
    exit 2
fi

# The demo works without Prometheus too.
deploy/setup.sh --with prometheus || deploy/setup.sh
exec unshare --mount deploy/demo.sh --inside
