"""Which cards ask for an address anew, when their machine has come to another host."""

from __future__ import annotations

from vmctl.migrate_cards import cards

XML = """<domain><devices>
  <interface type='network'><mac address='02:1'/><source network='vmctl' portid='x' bridge='vb'/></interface>
  <interface type='network'><mac address='02:2'/><source network='vmctl'/><link state='up'/></interface>
  <interface type='network'><mac address='02:3'/><source network='vmctl'/><link state='down'/></interface>
  <interface type='network'><mac address='02:4'/><source network='lan'/></interface>
  <interface type='bridge'><mac address='02:5'/><source bridge='vmctl'/></interface>
  <interface type='network'><mac address='02:6'/><source network='routed'/></interface>
</devices></domain>"""


def test_those_that_are_plugged_in_to_a_network_with_addresses() -> None:
    assert cards(XML, {"vmctl", "routed"}) == {"02:1": "vmctl", "02:2": "vmctl", "02:6": "routed"}
    assert cards(XML, set()) == {}


def test_those_whose_cables_were_left_pulled_whatever_network_they_are_on() -> None:
    assert cards(XML, {"routed"}, ["02:3", "02:4", "02:9"]) == {"02:3": "vmctl", "02:4": "lan", "02:6": "routed"}
