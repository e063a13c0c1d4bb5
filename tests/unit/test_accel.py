"""What follows from what was seen: verdicts, choices, and the cache."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest

from vmctl import accel
from vmctl.accel import Check, KvmFindings, Observations, Verdict, choose, judge
from vmctl.accel_probe import End, ProbeRun
from vmctl.errors import Unsupported
from vmctl.spec import Accel, AccelChoice

WELL = ("vmctl-probe 1", "nops_1000_cycles 310", "ud ok", "pf ok", "cpl3 ok", "done")
GOOD_RUN = ProbeRun(End.DONE, 99, WELL, "")
GOOD = Observations("svm", True, "/dev/kvm: owner 0:108, mode 0660", "libvirt-qemu", 0, 0, 0, GOOD_RUN)


def run_of(*lines: str, end: End = End.DONE, status: int = 99, complaint: str = "") -> Observations:
    return replace(GOOD, probe=ProbeRun(end, status, lines, complaint))


CASES = [
    (GOOD, Verdict.WORKS),
    (replace(GOOD, flag=""), Verdict.WORKS),
    (replace(GOOD, device_there=False, open_by_qemu=None, open_by_us=None, create_vm=None, probe=None), Verdict.ABSENT),
    (replace(GOOD, open_by_us=errno.ENODEV, open_by_qemu=None, create_vm=None, probe=None), Verdict.ABSENT),
    (replace(GOOD, open_by_us=errno.EACCES, create_vm=None, probe=None), Verdict.PERMISSION),
    (replace(GOOD, open_by_qemu=errno.EACCES, create_vm=None, probe=None), Verdict.PERMISSION),
    (replace(GOOD, create_vm=errno.EBUSY, probe=None), Verdict.BUSY),
    (replace(GOOD, create_vm=errno.ENOMEM, probe=None), Verdict.FAILS),
    (run_of("vmctl-probe 1", "nops_1000_cycles 1434134", "ud ok", end=End.EXIT, status=3), Verdict.INTERPRETED),
    (run_of("vmctl-probe 1", "nops_1000_cycles 1434134", end=End.TIMEOUT), Verdict.INTERPRETED),
    (run_of(end=End.TIMEOUT), Verdict.HANGS),
    (run_of(*WELL[:3], end=End.TIMEOUT), Verdict.HANGS),
    (run_of(end=End.TIMEOUT, status=-9, complaint="KVM internal error. Suberror: 1"), Verdict.FAILS),
    (run_of(*WELL[:2], end=End.EXIT, status=0), Verdict.FAILS),
    (run_of(*WELL, end=End.EXIT, status=0), Verdict.FAILS),
    (run_of(*WELL[:4], "cpl3 failed", "done"), Verdict.FAILS),
    (run_of("done"), Verdict.FAILS),
    (run_of(end=End.NOT_STARTED, status=-1, complaint="no such file"), Verdict.FAILS),
]


@pytest.mark.parametrize(("seen", "verdict"), CASES)
def test_verdicts(seen: Observations, verdict: Verdict) -> None:
    findings = judge(seen)
    assert findings.verdict is verdict
    assert findings.evidence[0].name == "cpu-flags"
    for check in findings.evidence:
        assert check.result in {"ok", "warning", "failed", "skipped"} and check.detail
        assert check.mend or check.result in {"ok", "skipped"}
    assert any(check.result == "failed" for check in findings.evidence) == (verdict is not Verdict.WORKS)


def test_the_order_of_checks() -> None:
    names = [check.name for check in judge(GOOD).evidence]
    assert names == ["cpu-flags", "device", "open-qemu-user", "open-self", "create-vm", "guest-probe"]


def findings(verdict: Verdict) -> KvmFindings:
    return KvmFindings(verdict, (Check("guest-probe", "failed", "detail", "the mend"),))


def test_auto_takes_kvm_only_when_proven_and_says_why_not() -> None:
    for verdict in Verdict:
        decision = choose(AccelChoice.AUTO, findings(verdict))
        assert decision.chosen is (Accel.KVM if verdict is Verdict.WORKS else Accel.TCG)
        assert decision.reason and (verdict is Verdict.WORKS or decision.mend == "the mend")


def test_require_kvm_never_falls_back() -> None:
    for verdict in Verdict:
        if verdict is Verdict.WORKS:
            assert choose(AccelChoice.REQUIRE_KVM, findings(verdict)).chosen is Accel.KVM
        else:
            with pytest.raises(Unsupported) as caught:
                choose(AccelChoice.REQUIRE_KVM, findings(verdict))
            assert caught.value.exit_code == 8 and caught.value.hint == "the mend"


def test_kvm_is_taken_unproven_but_not_where_it_cannot_be() -> None:
    for verdict in (Verdict.INTERPRETED, Verdict.HANGS, Verdict.FAILS, Verdict.WORKS):
        assert choose(AccelChoice.KVM, findings(verdict)).chosen is Accel.KVM
    for verdict in (Verdict.ABSENT, Verdict.PERMISSION, Verdict.BUSY):
        with pytest.raises(Unsupported):
            choose(AccelChoice.KVM, findings(verdict))


def test_tcg_asks_nothing() -> None:
    assert {choose(AccelChoice.TCG, findings(verdict)).chosen for verdict in Verdict} == {Accel.TCG}


def test_the_documented_json() -> None:
    found = choose(AccelChoice.AUTO, judge(GOOD)).to_json()
    assert json.loads(json.dumps(found)) == found
    assert found["chosen"] == "kvm" and found["kvm"]["verdict"] == "works"
    assert all(set(check) == {"name", "result", "detail", "mend"} for check in found["kvm"]["evidence"])


def test_waits_are_longer_under_tcg() -> None:
    assert accel.timeout_scale(Accel.TCG) > accel.timeout_scale(Accel.KVM) == 1.0


class Lab:
    """examine() with the looking replaced, to see when it looks."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.looks = 0
        self.seen = GOOD
        self.qemu = tmp_path / "qemu"
        self.qemu.write_text("x")
        self.device = tmp_path / "kvm"
        self.device.write_text("")
        self.cache = tmp_path / "cache"
        self.nested = tmp_path / "module/kvm_intel/parameters/nested"
        self.nested.parent.mkdir(parents=True)
        self.nested.write_text("N\n")
        monkeypatch.setattr(accel, "_MODULES", tmp_path / "module")
        monkeypatch.setattr(accel, "observe", self.observe)

    def observe(self, **_: object) -> Observations:
        self.looks += 1
        return self.seen

    def examine(self, **changes: object) -> KvmFindings:
        values = {"qemu_user": None, "qemu_binary": self.qemu, "cache_dir": self.cache, "device": self.device} | changes
        return accel.examine(**values)  # type: ignore[arg-type]


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    return Lab(tmp_path, monkeypatch)


def test_looked_once_then_remembered(lab: Lab) -> None:
    assert lab.examine() == lab.examine() == judge(GOOD)
    assert lab.looks == 1


def test_refresh_looks_again(lab: Lab) -> None:
    lab.examine()
    lab.examine(refresh=True)
    assert lab.looks == 2


def test_whatever_matters_invalidates(lab: Lab) -> None:
    lab.examine()
    lab.qemu.write_text("another qemu")
    lab.examine()
    lab.device.chmod(0o600)
    lab.examine()
    lab.nested.write_text("Y\n")
    lab.examine()
    (lab.nested.parents[2] / "kvm_amd").mkdir()
    lab.examine()
    lab.examine(qemu_user="root")
    assert lab.looks == 6


def test_a_broken_cache_is_no_cache(lab: Lab) -> None:
    lab.examine()
    (path,) = lab.cache.glob("accel-*.json")
    for rubbish in ("", "{", "[]", '{"key": 1}', path.read_text().replace('"works"', '"wonders"')):
        path.write_text(rubbish)
        assert lab.examine().verdict is Verdict.WORKS
    assert lab.looks == 6


def test_what_may_pass_is_not_remembered(lab: Lab) -> None:
    lab.seen = replace(GOOD, create_vm=errno.EBUSY, probe=None)
    assert lab.examine().verdict is Verdict.BUSY
    lab.seen = GOOD
    assert lab.examine().verdict is Verdict.WORKS


def test_a_cache_that_cannot_be_written_is_no_error(lab: Lab) -> None:
    lab.cache.write_text("a file, not a folder")
    assert lab.examine().verdict is Verdict.WORKS
