#!/bin/bash
# For developers: runs a command of this repository on a Debian 12 that has nothing of ours.
#   sudo deploy/clean-room.sh [--worktree] [COMMAND [ARGUMENT ...]]
#   sudo deploy/clean-room.sh deploy/demo.sh
#
# COMMAND (deploy/setup.sh by default) runs in the root of a clean clone of HEAD; with --worktree, in a copy
# of the files as they are now. The machine is a debootstrap tree in memory (about 1.5 GB), in namespaces of
# its own for mounts, network, processes, host name and IPC; its network is a user-space NAT. All of it is
# gone with the script, however that ends. What the command leaves there is reported, and makes the run fail.
#
# Package sources, pip's configuration, proxies and certificates are those of the machine that this runs on.
# The bare tree is kept as a tar file in /var/cache/offload/ (or $XDG_CACHE_HOME/offload/) for the next run.
set -euo pipefail

suite=bookworm
uplink=uplink0
network=198.51.100.0/24 # slirp4netns takes .2 for the gateway and .3 for its name server
name_server=198.51.100.3

fail() {
    printf 'clean-room: %s\n' "$2" >&2
    exit "$1"
}

say() { printf 'clean-room: %s\n' "$*"; }

seconds_since() { awk -v a="$1" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.1f s", b - a }'; }

# The mirror that apt is configured to fetch this suite from.
mirror() {
    # shellcheck disable=SC2016  # apt's own placeholders
    apt-get indextargets --format '$(REPO_URI) $(CODENAME) $(COMPONENT)' 'Identifier: Packages' |
        awk -v suite="$suite" '$2 == suite && $3 == "main" { print $1; exit }'
}

make_tree() { # in a mount namespace of its own: TAR MIRROR PLACE
    mount -t tmpfs -o mode=755 clean-room "$3"
    debootstrap --variant=minbase "$suite" "$3" "$2" >"$3.log" 2>&1 || {
        tail -n 20 "$3.log" >&2
        exit 1
    }
    rm -f "$3"/var/cache/apt/archives/*.deb
    tar -C "$3" --numeric-owner --one-file-system -cf "$1.new" .
    mv "$1.new" "$1"
}

# Only what concerns where packages come from: hooks of the machine's apt would call programs that are not there.
carry_over_apt() { # PLACE
    rm -rf "$1"/etc/apt/sources.list "$1"/etc/apt/sources.list.d
    (cd / && tar -c --ignore-failed-read etc/apt/sources.list etc/apt/sources.list.d etc/apt/keyrings \
        etc/apt/trusted.gpg.d etc/apt/auth.conf etc/apt/auth.conf.d etc/apt/preferences.d usr/share/keyrings \
        2>/dev/null) | tar -x -C "$1"
    apt-config dump | grep '^Acquire::' >"$1/etc/apt/apt.conf.d/99clean-room"
}

carry_over_pip() { # PLACE
    (cd / && tar -c --ignore-failed-read etc/pip.conf etc/ssl/certs/ca-certificates.crt \
        usr/local/share/ca-certificates 2>/dev/null) | tar -x -C "$1"
    mkdir -p "$1/root/.config/pip"
    cp "${HOME-/root}/.config/pip/pip.conf" "$1/root/.config/pip/" 2>/dev/null || true
}

copy_repository() { # WHAT REPOSITORY PLACE
    if [ "$1" = HEAD ]; then
        git clone -q --no-hardlinks "$2" "$3"
        return
    fi
    mkdir -p "$3"
    (cd "$2" && git ls-files -z --cached --others --exclude-standard |
        tar -c --null --verbatim-files-from --ignore-failed-read --files-from=- 2>/dev/null) | tar -x -C "$3"
}

# Sets `found`. Globs only: a child process would be in the list.
look() {
    found=(/sys/class/net/* /run/netns/* /sys/fs/bpf/* /run/offload* /var/lib/offload* /tmp/* /proc/[0-9]*)
}

inside() { # TAR WHAT REPOSITORY PLACE COMMAND ...
    local tar=$1 what=$2 repository=$3 place=$4 start=$EPOCHREALTIME status=0 setting self thing known=' ' found
    shift 4
    mount -t tmpfs -o mode=755,size=80% clean-room "$place"
    tar -C "$place" -xf "$tar"
    carry_over_apt "$place"
    carry_over_pip "$place"
    copy_repository "$what" "$repository" "$place/root/offload"
    printf '127.0.0.1 localhost clean-room\n' >"$place/etc/hosts"
    printf 'clean-room\n' >"$place/etc/hostname"
    hostname clean-room
    rm -f "$place/etc/resolv.conf"
    printf 'nameserver %s\n' "$name_server" >"$place/etc/resolv.conf"

    # Tells our process id, as it is outside, to whoever connects the network, and waits for that.
    read -r self _ </proc/self/stat
    printf '%s\n' "$self" >"$place.pid"
    [ "$(head -c 1 <"$place.network")" = 1 ] || fail 1 "slirp4netns could not connect the network:
$(cat "${place%/room}/slirp.log")"

    mount --rbind /dev "$place/dev"
    mount -t proc proc "$place/proc"
    mount -t sysfs sysfs "$place/sys"
    mount -t bpf bpf "$place/sys/fs/bpf" -o mode=700
    local environment=(HOME=/root LANG=C.UTF-8 TERM="${TERM-dumb}" PATH=/usr/sbin:/usr/bin:/sbin:/bin)
    while read -r setting; do
        environment+=("$setting")
    done < <(env | grep -E '^(PIP_[A-Z_]+|(http|https|no|ftp)_proxy|(HTTP|HTTPS|NO|FTP)_PROXY)=')
    mkdir "$place/.outside"
    cd "$place"
    pivot_root . .outside
    umount -l /.outside
    rmdir /.outside
    cd /root/offload
    shopt -s nullglob
    look
    known=" ${found[*]} "
    say "a bare Debian $(cat /etc/debian_version) with $what of the repository: $(seconds_since "$start")"

    start=$EPOCHREALTIME
    env -i "${environment[@]}" "$@" || status=$?
    look
    say "$*: exit $status, $(seconds_since "$start"); $(du -xsh --exclude=/proc --exclude=/sys / 2>/dev/null | cut -f 1) in the tree"
    for thing in "${found[@]}"; do
        # pytest keeps the files of its last runs on purpose.
        [[ $known != *" $thing "* && $thing != /tmp/pytest-of-* ]] || continue
        # A process that has ended and whose parent has too is reaped by this shell, in its own time.
        [[ $thing != /proc/* ]] || grep -qs '^State:[[:space:]]*[^Z[:space:]]' "$thing/status" || continue
        say "left behind: $thing $(tr '\0' ' ' 2>/dev/null <"$thing/cmdline" || true)"
        status=$((status ? status : 1))
    done
    exit "$status"
}

outside() {
    local what=HEAD repository address start=$EPOCHREALTIME status=0 program
    if [ "${1-}" = --worktree ]; then
        what=worktree
        shift
    fi
    case ${1-} in -*)
        sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
        exit 2
        ;;
    esac
    [ $# -gt 0 ] || set -- deploy/setup.sh
    [ "$(id -u)" = 0 ] || fail 4 "root is needed for namespaces and mounts"
    for program in debootstrap slirp4netns git; do
        command -v "$program" >/dev/null || fail 1 "$program is missing; run: apt-get install $program"
    done
    repository=$(cd "$(dirname "$0")/.." && pwd -P)
    address=$(mirror)
    [ -n "$address" ] || fail 1 "apt has no source for Debian $suite on this machine"
    cache=${XDG_CACHE_HOME:-/var/cache}/offload
    tree=$cache/$suite-$(dpkg --print-architecture)-$(sha256sum <<<"$address" | head -c 8).tar
    mkdir -p "$cache"

    work=$(mktemp -d)
    place=$work/room
    mkdir "$place"
    mkfifo "$place.pid" "$place.network"
    slirp=
    trap '[ -z "$slirp" ] || kill "$slirp" 2>/dev/null || true; rm -rf "$work"' EXIT
    if [ ! -e "$tree" ]; then
        unshare --mount bash "$0" --make-tree "$tree" "$address" "$place"
        say "a tree for this and later runs: $(seconds_since "$start")"
    fi

    {
        read -r pid <"$place.pid"
        exec setpriv --pdeathsig KILL slirp4netns --configure --mtu 1500 --cidr "$network" \
            --disable-host-loopback --ready-fd 3 "$pid" "$uplink" 3>"$place.network" >"$work/slirp.log" 2>&1
    } &
    slirp=$!
    setpriv --pdeathsig KILL unshare --mount --net --pid --uts --ipc --fork --kill-child \
        bash "$0" --inside "$tree" "$what" "$repository" "$place" "$@" || status=$?
    exit "$status"
}

case ${1-} in
    --inside) inside "${@:2}" ;;
    --make-tree) make_tree "${@:2}" ;;
    *) outside "$@" ;;
esac
