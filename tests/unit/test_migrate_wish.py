"""What of a wish a stopped VM can have."""

from __future__ import annotations

from vmctl.hypervisor.migration import Copying, Way
from vmctl.migrate_policy import Policy
from vmctl.migrate_wish import Wish, of_stopped


def test_what_is_usual_is_not_told_of() -> None:
    assert of_stopped("a", Wish()) == ()
    assert of_stopped("a", Wish(way=Way.DIRECT, copying=Copying.FULL, persistent=True, bandwidth=1 << 20)) == ()


def test_a_stopped_vm_without_a_definition_would_be_nowhere() -> None:
    (found,) = of_stopped("a", Wish(persistent=False))
    assert "would have nothing of it" in found.what and not found.note


def test_what_has_to_do_with_memory_is_told_of_at_once() -> None:
    policy = Policy(downtime_ms=5000, max_downtime_ms=5000, give_up_s=5)
    (found,) = of_stopped("a", Wish(live=False, policy=policy, tls=True, compress=True, auto_converge=False))
    said = "nothing is done for --held, --tls, --compress, --no-auto-converge, --downtime, --timeout"
    assert found.note and found.what.endswith(said)
