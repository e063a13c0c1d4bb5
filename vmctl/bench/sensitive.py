"""The sensitive instructions of x86-64, what makes each sensitive, and what a try of it proves. Pure.

Popek and Goldberg, "Formal Requirements for Virtualizable Third Generation Architectures", CACM 17(7), 1974: an
instruction is *privileged* when it traps in user mode and does not in supervisor mode; *sensitive* when it changes the
machine's resources or mode (control), or when what it does depends on them (behaviour); else it is innocuous. The list:
Robin and Irvine, USENIX Security 2000, whose text says 17 and whose mnemonics count 18; and what came later.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Origin(StrEnum):
    """Where the list has it from."""

    ROBIN_IRVINE = "Robin & Irvine 2000"
    NEWER = "newer"
    PRIVILEGED = "privileged by design"
    INNOCUOUS = "innocuous, for control"


class Kind(StrEnum):
    """What makes it sensitive, and so what proves that it was executed without a trap all the same."""

    READS = "reads the real machine's state"  # proof: user code was told what the kernel is told
    MODE = "does otherwise in user mode"  # proof: the result differs from the kernel's
    CONTROL = "changes the machine's state"
    NONE = "neither"


class Finding(StrEnum):
    """What a try shows."""

    PRIVILEGED = "privileged"  # it traps in user mode, not in the kernel
    SILENT = "sensitive and silent"  # no trap, and the values prove that it mattered
    FOREIGN = "silent, and not the guest's"  # no trap, and another value than a CPU would show: the host's, say
    INNOCUOUS = "innocuous"
    UNPROVED = "unproved"  # the values do not show what the list says
    FAULTY = "traps in the kernel too"
    ABSENT = "absent"  # this CPU has none
    FAILED = "ended the guest"


@dataclass(frozen=True, slots=True)
class Instruction:
    """One of the list. ``user`` is whether it is sensitive in user mode already, which theorem 3 asks about.

    ``shows`` is the value that a CPU gives at CPL 3; None: the same as at CPL 0.
    """

    name: str
    mnemonic: str
    origin: Origin
    kind: Kind
    user: bool
    why: str
    shows: int | None = None


@dataclass(frozen=True, slots=True)
class Try:
    """What happened: the vector of the trap, or the value found; neither: it was not tried."""

    vector: int | None = None
    value: int | None = None

    @property
    def trapped(self) -> bool:
        """Whether it trapped."""
        return self.vector is not None


_RI, _NEW = Origin.ROBIN_IRVINE, Origin.NEWER
_READS, _MODE, _CONTROL, _NONE = Kind.READS, Kind.MODE, Kind.CONTROL, Kind.NONE


def _privileged(names: str) -> tuple[Instruction, ...]:
    return tuple(
        Instruction(
            name, name.upper().replace("_", " "), Origin.PRIVILEGED, _CONTROL, True, "traps in user mode, as it should"
        )
        for name in names.split()
    )


INSTRUCTIONS: tuple[Instruction, ...] = (
    Instruction("sgdt", "SGDT", _RI, _READS, True, "the address of the real GDT"),
    Instruction("sidt", "SIDT", _RI, _READS, True, "the address of the real IDT"),
    Instruction("sldt", "SLDT", _RI, _READS, True, "the real LDT's selector"),
    Instruction("smsw", "SMSW", _RI, _READS, True, "the lower half of the real CR0"),
    Instruction("pushf", "PUSHF", _RI, _READS, True, "the real interrupt flag"),
    Instruction("popf", "POPF", _RI, _MODE, False, "the kernel forbids interrupts, user code is ignored", 0x200),
    Instruction("lar", "LAR", _RI, _MODE, True, "rights of a kernel segment, from the real GDT; hidden from CPL 3", 0),
    Instruction("lsl", "LSL", _RI, _MODE, True, "limit of a kernel segment, from the real GDT; hidden from CPL 3", 0),
    Instruction("verr", "VERR", _RI, _MODE, True, "whether a kernel segment can be read, by the real CPL", 0),
    Instruction("verw", "VERW", _RI, _MODE, True, "whether a kernel segment can be written, by the real CPL", 0),
    Instruction("pop_fs", "POP FS", _RI, _READS, True, "loads a descriptor of the real GDT"),
    Instruction("push_cs", "PUSH CS", _RI, _MODE, False, "shows the real CPL (in 32-bit code)", 3),
    Instruction("call_far", "CALL far", _RI, _MODE, False, "saves CS with the real CPL", 0x23),
    Instruction("jmp_far", "JMP far", _RI, _MODE, False, "CS bears the real CPL afterwards", 0x23),
    Instruction("int_n", "INT n", _RI, _MODE, False, "through the real IDT, with the real CPL in the frame", 0x23),
    Instruction("ret_far", "RET far", _RI, _MODE, False, "CS bears the real CPL afterwards", 0x23),
    Instruction("iret", "IRET", _RI, _MODE, False, "the kernel forbids interrupts, user code is ignored", 0x200),
    Instruction("str", "STR", _RI, _READS, True, "the real task register"),
    Instruction("mov_cs", "MOV from CS", _RI, _MODE, False, "shows the real CPL", 0x23),
    Instruction("mov_fs", "MOV to FS", _RI, _READS, True, "loads a descriptor of the real GDT"),
    Instruction("cpuid", "CPUID", _NEW, _READS, True, "which CPU it really is"),
    Instruction("rdtsc", "RDTSC", _NEW, _READS, True, "the real time: lies between two readings of the kernel's"),
    Instruction("rdtsc_tsd", "RDTSC, CR4.TSD", _NEW, _READS, True, "the same once the kernel has forbidden it"),
    Instruction("rdtscp", "RDTSCP", _NEW, _READS, True, "the real time"),
    Instruction("rdpid", "RDPID", _NEW, _READS, True, "the real TSC_AUX"),
    Instruction("xgetbv", "XGETBV", _NEW, _READS, True, "the real XCR0"),
    Instruction("rdpmc_pce", "RDPMC, CR4.PCE", _NEW, _READS, True, "a real counter, once the kernel allows it"),
    Instruction("syscall", "SYSCALL", _NEW, _CONTROL, False, "enters the kernel that the real LSTAR names"),
    Instruction("rdfsbase", "RDFSBASE", _NEW, _READS, False, "the real FS base"),
    Instruction(
        "wrgsbase",
        "WRGSBASE",
        _NEW,
        _CONTROL,
        False,
        "changes the real GS base, which the kernel is entered with",
        0x1000,
    ),
    Instruction("rdpkru", "RDPKRU", _NEW, _READS, False, "the real rights to pages, by their keys"),
    Instruction("wrpkru", "WRPKRU", _NEW, _CONTROL, False, "changes them, for the kernel too", 0x55555550),
    *_privileged("hlt cli sti mov_from_cr0 mov_to_cr0 mov_from_cr3 mov_from_cr8 mov_from_dr7 lmsw clts lgdt lidt lldt"),
    *_privileged("rdmsr wrmsr invlpg wbinvd in out swapgs rdpmc xsetbv clac invpcid"),
    Instruction("add", "ADD", Origin.INNOCUOUS, _NONE, False, "the same everywhere"),
    Instruction("mul", "MUL", Origin.INNOCUOUS, _NONE, False, "the same everywhere"),
    Instruction("xchg", "XCHG", Origin.INNOCUOUS, _NONE, False, "the same everywhere"),
)
BY_NAME = {one.name: one for one in INSTRUCTIONS}
_VECTORS = {6: "#UD", 13: "#GP", 14: "#PF"}


def finding(instruction: Instruction, kernel: Try, user: Try) -> Finding:
    """What a try at CPL 3 shows, beside the same at CPL 0."""
    if kernel.trapped:
        return Finding.FAULTY
    if user.trapped:
        return Finding.PRIVILEGED
    as_on_cpu = user.value == (kernel.value if instruction.shows is None else instruction.shows)
    if instruction.kind is Kind.NONE:
        return Finding.INNOCUOUS if as_on_cpu else Finding.UNPROVED
    if instruction.kind is Kind.MODE and user.value == kernel.value:
        return Finding.UNPROVED
    return Finding.SILENT if as_on_cpu else Finding.FOREIGN


def told(tried: Try | None) -> str:
    """A try in words."""
    if tried is None or (tried.vector is None and tried.value is None):
        return ""
    if tried.vector is not None:
        return f"trap {_VECTORS.get(tried.vector, tried.vector)}"
    return f"{tried.value:#x}"
