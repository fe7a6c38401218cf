#!/bin/bash
# Installs what offload needs into the distribution and into .venv/ of this checkout.
# Safe to run again and at the same time as another one; says nothing but one line when all is there.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: sudo deploy/setup.sh [--dev] [--with prometheus] [--list]

  --dev               also what the tests need (pytest, mypy, ruff, an emulator for other kernels ...)
  --with prometheus   also Debian's Prometheus, unpacked into .cache/prometheus/ and not installed
  --list              only name the distribution's packages that this would see to
USAGE
}

say() { printf 'setup: %s\n' "$*"; }
fail() {
    printf 'setup: %s\n' "$2" >&2
    exit "$1"
}

dev=0 prometheus=0 list=0
while [ $# -gt 0 ]; do
    case $1 in
        --dev) dev=1 ;;
        --list) list=1 ;;
        --with)
            [ "${2-}" = prometheus ] || fail 2 "--with takes: prometheus"
            prometheus=1
            shift
            ;;
        -h | --help)
            usage
            exit
            ;;
        *)
            usage >&2
            exit 2
            ;;
    esac
    shift
done

# The caller's interpreter, search path and locale must not decide what is installed.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV PIP_TARGET PIP_PREFIX PIP_USER
umask 022

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$repo/.venv

# Package, and what it is for.
packages() {
    cat <<'LIST'
python3-bpfcc       compiles the BPF programs (bcc, with LLVM)
python3-venv        makes .venv for the Python part
libbpf1             loads and links the BPF programs
libatomic1          orders accesses to the rings of AF_XDP sockets
linux-libc-dev      the kernel's user-space headers, which the BPF programs include
iproute2            network namespaces, bridges and tc, for demo and tests
ethtool             NIC features, for demo and tests
iputils-ping        traffic for demo and tests
iperf3              traffic for demo and tests (its service stays off)
tcpdump             looking at traffic
LIST
    [ "$dev" = 1 ] || return 0
    cat <<'LIST'
bpftool             another's view of what is attached, for the tests
qemu-system-x86     boots other kernels, for the tests
busybox-static      starts them
kmod                loads their modules
zstd                unpacks some of them
e2fsprogs           makes their disks
dnsmasq-base        gives guests their addresses, for the tests
nftables            rules that the fast path passes by, for the tests
tshark              reads what the port mirror wrote, for the tests
gcc                 builds the C program that a benchmark compares with
libc6-dev           headers for that
LIST
}
if [ "$list" = 1 ]; then
    packages | cut -d ' ' -f 1
    exit
fi

[ "$(uname -s)" = Linux ] || fail 3 "this needs Linux"
# shellcheck source=/dev/null
distribution=$(. /etc/os-release && printf '%s %s' "${ID-}" "${VERSION_ID-}") || distribution=unknown
[ "$distribution" = "debian 12" ] ||
    fail 3 "this is written for Debian 12 and found '$distribution'; elsewhere install the packages named in deploy/setup.sh by hand"
[ "$(id -u)" = 0 ] || fail 4 "root is needed to install packages; run: sudo deploy/setup.sh"

apt() {
    # The lock on descriptor 9 must not outlive this script in something that a package starts.
    DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 \
        apt-get -q -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 "$@" 9>&-
}

missing_packages() {
    local name purpose
    local installed
    installed=$(dpkg-query -W -f '${Package} ${db:Status-Status}\n' | sed -n 's/ installed$//p')
    while read -r name purpose; do
        grep -qxF "$name" <<<"$installed" || printf '%s %s\n' "$name" "$purpose"
    done < <(packages)
}

log=$(mktemp)
trap 'rm -rf "$log" "$log.d"' EXIT
quietly() {
    "$@" >"$log" 2>&1 || {
        cat "$log" >&2
        fail 1 "failed: $*"
    }
}

fresh_index=0
refresh_index() {
    [ "$fresh_index" = 1 ] && return
    say "apt-get update (the index of the configured package sources)"
    quietly apt update
    fresh_index=1
}

install_packages() {
    local missing name purpose
    missing=$(missing_packages)
    [ -n "$missing" ] || return 0
    refresh_index
    while read -r name purpose; do
        say "installing $name: $purpose"
    done <<<"$missing"
    # shellcheck disable=SC2046  # one word for each package
    quietly apt install -y --no-install-recommends $(cut -d ' ' -f 1 <<<"$missing")
}

make_venv() {
    local what=$repo extras='' stamp want
    stamp=$venv/.offload-setup
    # What the tests need stays when a set-up without --dev comes after one with it.
    if [ "$dev" = 1 ] || [ "$(tail -n 1 "$stamp" 2>/dev/null)" = dev ]; then
        extras=dev what="${repo}[dev]"
    fi
    want=$(sha256sum "$repo/pyproject.toml" | cut -d ' ' -f 1; readlink -f /usr/bin/python3; echo "$repo"; echo "$extras")
    [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && [ -x "$venv/bin/offload" ] && return

    # Debian's own interpreter, because python3-bpfcc is built for it; and a venv that sees it.
    if [ "$(readlink -f "$venv/bin/python")" != "$(readlink -f /usr/bin/python3)" ] ||
        ! grep -qx "command = .* --system-site-packages $venv" "$venv/pyvenv.cfg" ||
        ! "$venv/bin/python" -Im pip --version >/dev/null 2>&1; then
        say "making .venv from $(/usr/bin/python3 --version), with the system's packages visible for bcc"
        rm -rf "$venv"
        quietly /usr/bin/python3 -Im venv --system-site-packages "$venv"
    fi
    rm -f "$stamp"
    say "pip install -e .${extras:+[$extras]} into .venv"
    quietly "$venv/bin/python" -Im pip install --disable-pip-version-check --no-input -e "$what"
    "$venv/bin/python" -Ic 'import bcc' || fail 1 "bcc cannot be imported in .venv"
    printf '%s\n' "$want" >"$stamp"
}

# Installing the package would add an account and a service that starts at boot; unpacking it adds nothing.
unpack_prometheus() {
    local target=$repo/.cache/prometheus
    [ -x "$target/usr/bin/prometheus" ] && return
    refresh_index
    say "unpacking Debian's prometheus into .cache/prometheus/: scrapes the demo's metrics; no service, no account"
    mkdir -p "$log.d" "$repo/.cache"
    chmod 755 "$log.d"
    cd "$log.d"
    quietly apt -o APT::Sandbox::User=root download prometheus
    quietly dpkg -x prometheus_*.deb tree
    cd "$repo"
    rm -rf "$target"
    mv "$log.d/tree" "$target"
}

mount_bpffs() {
    [ "$(stat -f -c %T /sys/fs/bpf 2>/dev/null)" = bpf_fs ] && return
    say "mounting bpffs at /sys/fs/bpf: pinned BPF programs outlive the process that loaded them"
    mount -t bpf bpf /sys/fs/bpf -o mode=700 ||
        fail 3 "bpffs cannot be mounted at /sys/fs/bpf; this kernel lacks it, or a container forbids it"
}

exec 9>/run/lock/offload-setup.lock
if ! flock -n 9; then
    say "waiting for another set-up to finish"
    flock 9
fi
install_packages
make_venv
[ "$prometheus" = 0 ] || unpack_prometheus
mount_bpffs
say "ready: ${venv#"$PWD/"}/bin/offload"
