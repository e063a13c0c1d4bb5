"""What the rows of the trap table are: what is done, which kind of exit it is, and who answers for it. Pure.

Exits by the names of Intel's SDM, volume 3, appendix C, and Linux's arch/x86/kvm/vmx/vmx.c; of the translator by QEMU's
target/i386/tcg and accel/tcg.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Handler(StrEnum):
    """Who does what the instruction asks for."""

    CPU = "CPU"  # no exit
    KERNEL = "kernel"  # KVM, without a return to user space
    VMM = "QEMU"  # the VMM's user space
    CODE = "translated code"
    HELPER = "translator's helper"
    DEVICE = "device model"


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its name, what is done once, the exit under KVM with who handles it, and who does under TCG.

    ``vmexit`` names the same thing in kvm-unit-tests' x86/vmexit, done the same way.
    """

    name: str
    title: str
    exit: str
    kvm: Handler
    tcg: Handler
    why: str
    vmexit: str = ""


_CPU, _KERNEL, _VMM = Handler.CPU, Handler.KERNEL, Handler.VMM
_CODE, _HELPER, _DEVICE = Handler.CODE, Handler.HELPER, Handler.DEVICE
_NONE = "none"

BASE = "loop"
ROWS: tuple[Row, ...] = (
    Row("loop", "a call of nothing", _NONE, _CPU, _CODE, "what every gross figure contains"),
    Row(
        "nops", "1000 NOPs", _NONE, _CPU, _CODE, "the canary: a CPU takes some hundred cycles, an interpreter a million"
    ),
    Row("rdtsc", "read the time stamp counter", _NONE, _CPU, _HELPER, "KVM exits only where offsetting is off"),
    Row("pause", "spin-wait hint", "PAUSE (in long loops)", _CPU, _HELPER, "TCG leaves its loop to let others run"),
    Row("cpuid", "CPUID leaf 0", "CPUID", _KERNEL, _HELPER, "always exits, does little: the classical trap", "cpuid"),
    Row("rdmsr_apic_base", "read an MSR that KVM watches", "RDMSR", _KERNEL, _HELPER, "IA32_APIC_BASE"),
    Row("rdmsr_kernel_gs", "read an MSR that KVM lets through", _NONE, _CPU, _HELPER, "KERNEL_GS_BASE"),
    Row(
        "wrmsr_kernel_gs",
        "write an MSR that KVM lets through",
        _NONE,
        _CPU,
        _HELPER,
        "KERNEL_GS_BASE; TCG ends its block",
        "wr_kernel_gs_base",
    ),
    Row("rdmsr_tsc_adjust", "read TSC_ADJUST", "RDMSR", _KERNEL, _HELPER, "kept by KVM", "rd_tsc_adjust_msr"),
    Row("wrmsr_tsc_adjust", "write TSC_ADJUST", "WRMSR", _KERNEL, _HELPER, "kept by KVM", "wr_tsc_adjust_msr"),
    Row("cr0_read", "read CR0", _NONE, _CPU, _CODE, "from the read shadow, without an exit"),
    Row(
        "cr0_toggle_wp",
        "CR0.WP off and on",
        "CR access, twice",
        _KERNEL,
        _HELPER,
        "TCG throws its TLB away, twice",
        "toggle_cr0_wp",
    ),
    Row("cr3_reload", "load CR3 again", _NONE, _CPU, _HELPER, "free with EPT; TCG throws its TLB away"),
    Row(
        "cr4_toggle_pge",
        "CR4.PGE off and on",
        "CR access, twice",
        _KERNEL,
        _HELPER,
        "TCG throws its TLB away, twice",
        "toggle_cr4_pge",
    ),
    Row("cr8_read", "read the task priority", _NONE, _CPU, _HELPER, "from the virtual APIC page", "mov_from_cr8"),
    Row("cr8_write", "write the task priority", _NONE, _CPU, _HELPER, "to the virtual APIC page", "mov_to_cr8"),
    Row("dr7_write", "write DR7", "DR access", _KERNEL, _HELPER, "debug registers are switched lazily", "mov_dr"),
    Row("invlpg", "forget one translation", _NONE, _CPU, _HELPER, "free with EPT"),
    Row("in_nobody", "read a port of nobody's", "I/O", _VMM, _DEVICE, "user space finds no device", "inl_from_qemu"),
    Row("in_kernel", "read a port of the PIC", "I/O", _KERNEL, _DEVICE, "KVM's own PIC", "inl_from_kernel"),
    Row("out_kernel", "write a port of the PIC", "I/O", _KERNEL, _DEVICE, "KVM's own PIC", "outl_to_kernel"),
    Row("in_user", "read the serial line's scratch register", "I/O", _VMM, _DEVICE, "a device of QEMU's"),
    Row(
        "in_pm_timer",
        "read the PM timer",
        "I/O",
        _VMM,
        _DEVICE,
        "a device that asks the host's clock",
        "inl_from_pmtimer",
    ),
    Row("mmio_lapic", "read the local APIC's version", "APIC access", _KERNEL, _DEVICE, "KVM's own APIC"),
    Row("mmio_hpet", "read the HPET's counter", "EPT misconfiguration", _VMM, _DEVICE, "asks the host's clock"),
    Row("mmio_nobody", "read memory of nobody's", "EPT misconfiguration", _VMM, _DEVICE, "user space finds no device"),
    Row(
        "bell_mmio",
        "write a register in memory",
        "EPT misconfiguration",
        _VMM,
        _DEVICE,
        "an emulated device's way",
        "mmio-no-eventfd:pci-mem",
    ),
    Row(
        "bell_mmio_eventfd",
        "ring a doorbell in memory",
        "EPT misconfiguration",
        _KERNEL,
        _DEVICE,
        "virtio's way: the kernel signals an eventfd",
        "mmio-wildcard-eventfd:pci-mem",
    ),
    Row(
        "bell_port",
        "write a register at a port",
        "I/O",
        _VMM,
        _DEVICE,
        "an emulated device's way",
        "portio-no-eventfd:pci-io",
    ),
    Row(
        "bell_port_eventfd",
        "ring a doorbell at a port",
        "I/O",
        _KERNEL,
        _DEVICE,
        "virtio's way before version 1",
        "portio-wildcard-eventfd:pci-io",
    ),
    Row("ud", "invalid opcode and back", "exception (#UD)", _KERNEL, _HELPER, "KVM looks whether it can emulate it"),
    Row("pf", "page fault and back", _NONE, _CPU, _HELPER, "the guest's own affair with EPT"),
    Row("int", "software interrupt and back", _NONE, _CPU, _HELPER, "the guest's own affair"),
    Row("touch_first", "first write to a page", "EPT violation", _KERNEL, _HELPER, "the host's allocator finds memory"),
    Row("touch_again", "write to a page touched before", _NONE, _CPU, _HELPER, "a TLB miss and no more"),
    Row("vmcall", "hypercall of Intel's", "VMCALL", _KERNEL, _HELPER, "valid under KVM only", "vmcall"),
    Row("vmmcall", "hypercall of AMD's", "VMMCALL", _KERNEL, _HELPER, "valid under KVM only"),
    Row("self_ipi", "interrupt oneself", "APIC write or WRMSR", _KERNEL, _DEVICE, "none at all with APICv"),
    Row("timer_wake", "sleep 50 us by the APIC timer", "HLT, timer", _KERNEL, _DEVICE, "net: how late one wakes"),
    Row("deadline_passed", "TSC deadline in the past", "WRMSR", _KERNEL, _HELPER, "fires at once", "tscdeadline_immed"),
    Row("deadline_soon", "TSC deadline in 3000 ticks", "WRMSR, timer", _KERNEL, _HELPER, "waits for it", "tscdeadline"),
    Row("ipi", "interrupt a vCPU that looks on", "APIC write or WRMSR", _KERNEL, _DEVICE, "until it has come there"),
    Row("ipi_halted", "wake a vCPU that sleeps", "APIC write, HLT", _KERNEL, _DEVICE, "and 2000 ticks"),
)
BY_NAME = {row.name: row for row in ROWS}
# Rows whose cost is the host's state as much as its making: what a page costs depends on what memory is at hand.
OF_THE_MOMENT = frozenset({"touch_first"})


def handled_by(row: Row, accelerator: str, *, interpreted: bool) -> str:
    """Who answers for the row under this accelerator; where a kernel interprets its guests, it does all but QEMU's."""
    if accelerator == "tcg":
        return row.tcg
    if interpreted:
        return "kernel's interpreter" + (" and QEMU" if row.kvm is Handler.VMM else "")
    return row.kvm
