"""What a guest's agent may answer, and that nothing else gets further."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmctl.errors import GuestCommandFailed
from vmctl.hypervisor import agent, answers

INTERFACES = [
    {"name": "lo"},
    {
        "name": "eth0",
        "hardware-address": "52:54:00:00:00:01",
        "ip-addresses": [{"ip-address": "10.0.0.2", "ip-address-type": "ipv4", "prefix": 24}],
        "statistics": {"rx-bytes": 1},
    },
]
SOUND = {
    "guest-exec": {"pid": 7},
    "guest-exec-status": {"exited": True, "exitcode": 3, "out-data": "eA=="},
    "guest-file-open": 1000,
    "guest-file-read": {"count": 1, "buf-b64": "eA==", "eof": True},
    "guest-fsfreeze-freeze": 1,
    "guest-fsfreeze-status": "thawed",
    "guest-fsfreeze-thaw": 0,
    "guest-fstrim": {"paths": [{"path": "/", "trimmed": 5, "minimum": 0}, {"path": "/b", "error": "no"}]},
    "guest-get-time": 1_700_000_000_000_000_000,
    "guest-network-get-interfaces": INTERFACES,
    "guest-ping": {},
}


@pytest.mark.parametrize("command", SOUND)
def test_what_qemus_agent_answers_is_sound(command: str) -> None:
    assert answers.is_sound(command, SOUND[command])


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("guest-exec", {}),
        ("guest-exec", {"pid": True}),
        ("guest-exec-status", {"exited": 1}),
        ("guest-exec-status", {"exited": True, "out-data": "x"}),
        ("guest-file-open", 1 << 70),
        ("guest-file-read", {"count": 1}),
        ("guest-fsfreeze-status", None),
        ("guest-fstrim", {"paths": ["/"]}),
        ("guest-fstrim", {"paths": {"path": "/"}}),
        ("guest-get-time", "now"),
        ("guest-network-get-interfaces", [1]),
        ("guest-network-get-interfaces", [{"name": "x", "ip-addresses": [{}]}]),
        ("guest-network-get-interfaces", [{"name": "x", "ip-addresses": [{"ip-address": "-oX=.", "prefix": 1}]}]),
    ],
)
def test_what_no_agent_answers_is_not(command: str, answer: object) -> None:
    assert not answers.is_sound(command, answer)


_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(command=st.sampled_from([*SOUND]), answer=_ANYTHING)
def test_no_answer_is_a_surprise(command: str, answer: object) -> None:
    answers.is_sound(command, answer)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"error": {}}', "[" * 100_000, '{"return": [1]}', '{"return": 9' + "9" * 5000]
)
def test_an_answer_without_sense_is_the_guests_fault(text: str) -> None:
    with pytest.raises(GuestCommandFailed, match="cannot look into VM a: its guest agent's answer to guest-get-time"):
        agent._read(text, "guest-get-time", "a", "look into")
    assert agent._read(json.dumps({"return": 5}), "guest-get-time", "a", "look into") == 5
