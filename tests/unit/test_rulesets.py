"""Whose frames rules are for, from what nft 1.0.6 and ebtables printed. No privileges."""

from __future__ import annotations

import json
from typing import Any

import pytest

from offload.rulesets import Chain, Names, Rule, Table, of_ebtables, of_nft

# Made by ebtables 1.8.9 (nf_tables) as libvirt does it, and shown by `nft --json list ruleset bridge`.
LIBVIRT = """{"nftables": [
{"metainfo": {"version": "1.0.6", "release_name": "Lester Gooch #5", "json_schema_version": 1}},
{"table": {"family": "bridge", "name": "nat", "handle": 4}},
{"chain": {"family": "bridge", "table": "nat", "name": "libvirt-I-web1", "handle": 1}},
{"chain": {"family": "bridge", "table": "nat", "name": "PREROUTING", "handle": 3, "type": "filter",
"hook": "prerouting", "prio": -300, "policy": "accept"}},
{"rule": {"family": "bridge", "table": "nat", "chain": "libvirt-I-web1", "handle": 7, "expr":
[{"match": {"op": "!=", "left": {"payload": {"protocol": "ether", "field": "saddr"}}, "right":
"02:15:5d:00:00:01"}}, {"counter": {"packets": 0, "bytes": 0}}, {"drop": null}]}},
{"rule": {"family": "bridge", "table": "nat", "chain": "libvirt-I-web1", "handle": 8, "expr":
[{"counter": {"packets": 0, "bytes": 0}}, {"accept": null}]}},
{"rule": {"family": "bridge", "table": "nat", "chain": "PREROUTING", "handle": 4, "expr":
[{"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "web1"}}, {"counter":
{"packets": 0, "bytes": 0}}, {"jump": {"target": "libvirt-I-web1"}}]}}]}"""

# Shown by nft 1.0.6: sets, maps and wildcards in every place where a rule can have an interface.
NAMES = """{"nftables": [{"table": {"family": "bridge", "name": "guard", "handle": 7}},
{"set": {"family": "bridge", "name": "guests", "table": "guard", "type": "ifname", "elem": ["db1", "web1"]}},
{"map": {"family": "bridge", "name": "perport", "table": "guard", "type": "ifname", "map": "verdict",
"elem": [["web1", {"jump": {"target": "inner"}}], ["web2", {"drop": null}]]}},
{"chain": {"family": "bridge", "table": "guard", "name": "inner", "handle": 1}},
{"rule": {"family": "bridge", "table": "guard", "chain": "inner", "expr": [{"drop": null}]}}]}"""

FORWARD = {
    "family": "bridge",
    "table": "guard",
    "name": "forward",
    "type": "filter",
    "hook": "forward",
    "policy": "accept",
}


def meta(key: str) -> dict[str, Any]:
    return {"meta": {"key": key}}


def match(left: Any, right: Any, op: str = "==") -> dict[str, Any]:
    return {"match": {"op": op, "left": left, "right": right}}


SADDR = {"payload": {"protocol": "ether", "field": "saddr"}}
DROP = {"drop": None}


def with_rule(*expressions: Any) -> Table:
    """The table of ``NAMES`` with a hooked chain that has this one rule."""
    document = json.loads(NAMES)
    rule = {"family": "bridge", "table": "guard", "chain": "forward", "expr": list(expressions)}
    document["nftables"] += [{"chain": FORWARD}, {"rule": rule}]
    (table,) = of_nft(json.dumps(document))
    return table


def concerned(table: Table) -> set[str]:
    """Which of four ports on ext0, whose uplink is eth1, the table does something to."""
    around = ("ext0", "eth1")
    return {name for name in ("web1", "web2", "db1", "vnet0") if table.concerning(name, around)}


EVERYBODY = {"web1", "web2", "db1", "vnet0"}


@pytest.mark.parametrize(
    ("expressions", "expected"),
    [
        pytest.param([match(meta("iifname"), "web1"), DROP], {"web1"}, id="name"),
        pytest.param([match(meta("iif"), "web1"), DROP], {"web1"}, id="index"),
        pytest.param([match(meta("iifname"), {"set": ["web1", "db1"]}), DROP], {"web1", "db1"}, id="set"),
        pytest.param([match(meta("oifname"), "@guests"), DROP], {"web1", "db1"}, id="named-set"),
        pytest.param([match(meta("oifname"), "vnet*"), DROP], {"vnet0"}, id="wildcard"),
        pytest.param([match(meta("ibrname"), "ext0"), DROP], EVERYBODY, id="our-bridge"),
        pytest.param([match(meta("ibrname"), "br0"), DROP], set(), id="another-bridge"),
        pytest.param([match(SADDR, "02:15:5d:00:00:01"), DROP], EVERYBODY, id="no-interface"),
        pytest.param([match(meta("iifname"), "web1", "!="), DROP], EVERYBODY, id="all-others-and-to-it"),
        pytest.param([match(meta("iifname"), "web1"), match(meta("oifname"), "db1"), DROP], {"web1", "db1"}),
        pytest.param([match(meta("iifname"), "eth1"), match(meta("oifname"), "db1"), DROP], {"db1"}),
        pytest.param([match(meta("iifname"), "eth2"), match(meta("oifname"), "eth1"), DROP], set()),
        pytest.param(
            [match({"concat": [meta("iifname"), SADDR]}, {"set": [{"concat": ["web1", "02:15"]}]}), DROP],
            {"web1"},
            id="concatenation",
        ),
        pytest.param(
            [match(meta("iifname"), {"set": [{"elem": {"val": "web1", "timeout": 60}}]}), DROP],
            {"web1"},
            id="element-with-timeout",
        ),
        pytest.param([{"vmap": {"key": meta("iifname"), "data": "@perport"}}], {"web1", "web2"}, id="map"),
        pytest.param(
            [{"vmap": {"key": meta("oifname"), "data": {"set": [["db1", {"goto": {"target": "inner"}}]]}}}],
            {"db1"},
            id="map-in-place",
        ),
        pytest.param(
            [{"vmap": {"key": meta("iifname"), "data": {"set": [["db1", {"accept": None}]]}}}],
            set(),
            id="map-that-lets-pass",
        ),
        pytest.param([match(meta("iifname"), "web1"), {"jump": {"target": "inner"}}], {"web1"}, id="jump"),
        pytest.param([{"jump": {"target": "forward"}}], set(), id="jump-in-a-circle"),
        pytest.param([match(meta("iifname"), "web1"), {"goto": {"target": "inner"}}], {"web1"}, id="goto"),
        pytest.param([{"goto": {"target": "forward"}}], set(), id="goto-in-a-circle"),
        pytest.param([match(meta("iifname"), "web1"), {"accept": None}], set(), id="lets-pass"),
        pytest.param([match(meta("iifname"), "web1"), {"counter": {"packets": 0}}], {"web1"}, id="counts"),
        pytest.param([match(meta("iifname"), "web1"), "drop"], {"web1"}, id="bare-word"),
    ],
)
def test_whom_a_rule_concerns(expressions: list[Any], expected: set[str]) -> None:
    assert concerned(with_rule(*expressions)) == expected


def test_all_names_but_some() -> None:
    others = Names(frozenset({"web1"}), ("vnet",), other=True)
    assert [others.admit(name) for name in ("web1", "vnet0", "db1")] == [False, False, True]
    spared = {"set": ["web1", "ext0", "eth1"]}
    assert concerned(with_rule(match(meta("iifname"), spared, "!="), DROP)) == EVERYBODY - {"web1"}


def test_libvirt_s_chains_concern_their_port_alone() -> None:
    (table,) = of_nft(LIBVIRT)
    assert (table.name, concerned(table)) == ("nat", {"web1"})
    assert table.concerning("web1", ("ext0", "eth1")) == ["PREROUTING"]


def test_a_policy_that_drops_concerns_everybody() -> None:
    document = json.loads(NAMES)
    document["nftables"].append({"chain": FORWARD | {"policy": "drop"}})
    (table,) = of_nft(json.dumps(document))
    assert concerned(table) == EVERYBODY


@pytest.mark.parametrize("document", ["", "{}", "[]", '{"nftables": [{"rule": {}}]}', '{"nftables": [{}]}'])
def test_another_form_is_not_taken_for_no_rules(document: str) -> None:
    with pytest.raises(ValueError, match="unexpected form of nft's output"):
        of_nft(document)


# The form is that of list_em() in ebtables' useful_functions.c; the development kernel has no such tables.
EBTABLES = """\
Bridge table: filter

Bridge chain: INPUT, entries: 0, policy: ACCEPT

Bridge chain: FORWARD, entries: 4, policy: ACCEPT
-p ARP -i web1 -j inner
-o ! web2 --logical-out br0 -j DROP
-i vnet+ -j CONTINUE
-o db+ -j DROP

Bridge chain: OUTPUT, entries: 0, policy: {policy}

Bridge chain: inner, entries: 1, policy: RETURN
-s ! 2:15:5d:0:0:1 -j DROP
"""


def test_the_old_ebtables() -> None:
    table = of_ebtables(EBTABLES.replace("{policy}", "ACCEPT"))
    assert table.concerning("web1", ("ext0", "eth1")) == ["FORWARD"]
    assert concerned(table) == {"web1", "db1"}
    assert concerned(of_ebtables(EBTABLES.replace("{policy}", "DROP"))) == EVERYBODY
    with pytest.raises(ValueError, match="unexpected form"):
        of_ebtables("The kernel doesn't support the ebtables 'filter' table.")


def test_the_index_finds_what_a_search_finds() -> None:
    names = ["a", "b", "c"]
    asks = [Names(frozenset({name})) for name in names] + [Names(beginnings=("a",)), Names(other=True)]
    rules = [Rule(()), *(Rule((ask,)) for ask in asks), *(Rule((x, y)) for x in asks for y in asks)]
    for device in names:
        found = set(Chain(rules).concerning(device, ("b",)))
        assert found == {rule for rule in rules if rule.concerns(device, ("b",))}
