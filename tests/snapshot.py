"""Everything of the kernel that offload may set, as a dict that can be compared.

A test that says "and the kernel is as it was" takes one ``snapshot`` before and compares after::

    before = snapshot(lab.host, vm.ns)
    ...
    assert_unchanged(before, lambda: snapshot(lab.host, vm.ns))

Left out is only what changes by itself: counters, timers, addresses that a bridge learns.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from offload.kernel import rcu
from offload.kernel.bpf import Map
from tests.instance import Instance
from tests.lab import Namespace, wait_until

Snapshot = dict[str, str]

_BY_ITSELF = re.compile(r"timer|link_netns|valid_life_time|preferred_life_time|_age$|dadfailed|tentative")
_TCX = {"ingress": 46, "egress": 47}  # BPF_TCX_INGRESS and _EGRESS of include/uapi/linux/bpf.h
_SYSCTLS = ("net/ipv4/conf", "net/ipv6/conf", "net/core", "net/bridge")


def snapshot(*namespaces: Namespace) -> Snapshot:
    """Devices, addresses, bridges, forwarding entries, features, programs, filters and sysctls."""
    found = {f"{ns.name}: {key}": value for ns in namespaces for key, value in _namespace(ns)}
    return found | {"rcu_expedited": rcu.EXPEDITED.read_text()}


def settled(*namespaces: Namespace) -> None:
    """Wait until every device that is up has noticed its carrier: a fresh veth takes a moment."""

    def quiet() -> bool:
        links = [link for ns in namespaces for link in _json(ns, "ip", "-j", "link")]
        return all(link["operstate"] != "DOWN" or "UP" not in link["flags"] for link in links)

    wait_until(quiet, "carriers are noticed")


def snapshot_of(instance: Instance) -> Snapshot:
    """The pins, port tables and files of an instance, and the BPF objects that its daemon holds."""
    found = {f"pin {path}": str(path.lstat().st_ino) for path in pins(instance)}
    paths = instance.paths
    for path in pins(instance):
        if path.name in ("ports", "classifier"):  # arrays that the controller maps into memory
            with Map.pinned(path) as table, table.mapped() as memory:
                found[f"contents of {path}"] = hashlib.sha256(memory).hexdigest()
        if path.name in ("members", "stations", "trunks"):  # hashes
            with Map.pinned(path) as table:
                rows = sorted(f"{key.hex()}: {value.hex()}" for key, value in table.items())
            found[f"contents of {path}"] = "\n".join(rows)
    for directory in (paths.run_dir, paths.state_dir):
        for file in directory.rglob("*"):
            if file.is_file() and paths.cache.name not in file.relative_to(directory).parts:
                found[f"file {file}"] = file.read_text()
    if instance.process:
        found["held by the daemon"] = " ".join(sorted(_held(instance.process.pid)))
    return found


def pins(instance: Instance) -> list[Path]:
    """Every pinned object of an instance."""
    return sorted(path for path in instance.paths.pin_dir.rglob("*") if not path.is_dir())


def difference(before: Snapshot, after: Snapshot) -> list[str]:
    """What is not the same, one line each."""
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def assert_unchanged(before: Snapshot, take: Callable[[], Snapshot], timeout: float = 3.0) -> None:
    """``take()`` gives ``before`` again, if not at once then soon: carriers and addresses take a moment."""
    after = take()

    def same() -> bool:
        nonlocal after
        if after != before:
            after = take()
        return after == before

    try:
        wait_until(same, "the kernel is as it was", timeout)
    except AssertionError:
        raise AssertionError(
            "\n".join(["the kernel is not as it was:", *difference(before, after)])
        ) from None


def _namespace(ns: Namespace) -> Iterator[tuple[str, str]]:
    links = _json(ns, "ip", "-d", "-j", "address")
    for link in links:
        for key, value in _stable(link).items():
            yield f"{link['ifname']}.{key}", json.dumps(value)
        for where in _TCX:
            name = f"tcx {link['ifname']} {where}"
            yield name, str(ns.call(partial(_tcx_programs, link["ifindex"], where)))
    # One shell for all of it: a process of its own for every question would take a second.
    script = [f"ethtool -k {link['ifname']}" for link in links]
    script += [f"tc filter show dev {link['ifname']} {where}" for link in links for where in _TCX]
    script += ["tc qdisc show"]
    answers = ns.run("sh", "-c", "; echo ----; ".join(script)).stdout.split("----\n")
    for command, answer in zip(script, answers, strict=True):
        if command.startswith("ethtool"):
            features = (line.partition(": ") for line in answer.splitlines())
            yield from ((f"{command}: {feature.strip()}", value) for feature, _, value in features)
        else:
            yield command, answer
    for entry in _json(ns, "bridge", "-j", "fdb", "show"):
        if entry["state"]:  # empty for what was learnt
            yield f"fdb {entry['mac']} {entry['ifname']} {entry['flags']}", json.dumps(_stable(entry))
    for port in _json(ns, "bridge", "-d", "-j", "link", "show"):
        yield f"bridge port {port['ifname']}", json.dumps(_stable(port))
    for kind, attached in _json(ns, "bpftool", "-j", "net", "show")[0].items():
        yield f"bpftool net {kind}", json.dumps(attached)
    yield from ns.call(lambda: list(_sysctls()))


def _tcx_programs(ifindex: int, where: str) -> list[int]:
    """Ids of the programs that hang on a device by tcx, which bpftool 7.0 does not show."""
    libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    ids, count = (ctypes.c_uint32 * 64)(), ctypes.c_uint32(64)
    if libbpf.bpf_prog_query(ifindex, _TCX[where], 0, None, ids, ctypes.byref(count)) != 0:
        assert ctypes.get_errno() == errno.EINVAL  # before 6.6 there is no tcx
        return []
    return list(ids[: count.value])


def _json(ns: Namespace, *command: str) -> Any:
    return json.loads(ns.run(*command).stdout or "[]")


def _stable(value: Any) -> Any:
    """``value`` without what changes by itself, at any depth."""
    if isinstance(value, dict):
        return {key: _stable(inner) for key, inner in value.items() if not _BY_ITSELF.search(key)}
    return [_stable(inner) for inner in value] if isinstance(value, list) else value


def _sysctls() -> Iterator[tuple[str, str]]:
    for directory in _SYSCTLS:
        for path in Path("/proc/sys", directory).rglob("*"):
            try:
                value = path.read_text() if path.is_file() else None
            except OSError:  # write-only, or not set yet
                continue
            if value is not None:
                yield str(path), value


def _held(pid: int) -> Iterator[str]:
    """``map_id:7``, ``prog_id:3``, ``link_id:1`` for every BPF object that a process has open."""
    for entry in os.scandir(f"/proc/{pid}/fdinfo"):
        for line in Path(entry.path).read_text().splitlines():
            if re.match(r"(map|prog|link)_id:", line):
                yield "".join(line.split())
