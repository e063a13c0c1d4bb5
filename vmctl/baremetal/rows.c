/* What each row does. Why it is done, and who answers for it, stands beside its figure: vmctl/bench/rows.py. */
#include "rows.h"

#include "apic.h"
#include "clock.h"

enum {
    APIC_BASE_MSR = 0x1b,
    TSC_ADJUST = 0x3b,
    KERNEL_GS_BASE = 0xc0000102,
    CR0_WP = 1 << 16,
    CR4_PGE = 1 << 7,
    PORT_OF_NOBODY = 0x1234,
    PORT_OF_PIC = 0x4d0, /* edge or level: plain registers of the interrupt controller */
    SCRATCH_OF_SERIAL = 0x3ff,
    PM_TIMER = 8,
    ADDRESS_OF_NOBODY = 0xfed90000,
    LAPIC = 0xfee00000,
    HPET_MAIN_COUNTER = 0xfed000f0,
    UD = 6,
    PF = 14,
    SOFTWARE_VECTOR = 0x90,
    NOT_MAPPED = 0x40000000,
    FIRST_PAGE = 16 << 20,
    PAGES_OF_HUGE_ONE = 512,
    TIMER_NS = 50000
};

volatile u64 lost;

static u32 pm_timer;

/* --- nothing, and next to nothing ------------------------------------------------------------------- */

static void loop(void) {}
static void nops(void) { __asm__ volatile(".rept 1000; nop; .endr"); }
static void rdtsc_once(void) { __asm__ volatile("rdtsc" ::: "rax", "rdx"); }
static void pause_once(void) { __asm__ volatile("pause"); }

/* --- instructions that a hypervisor may want to see ---------------------------------------------------- */

static void cpuid_once(void) { __asm__ volatile("cpuid" : : "a"(0), "c"(0) : "rbx", "rdx", "cc"); }
static void rdmsr_apic_base(void) { rdmsr(APIC_BASE_MSR); }
static void rdmsr_kernel_gs(void) { rdmsr(KERNEL_GS_BASE); }
static void wrmsr_kernel_gs(void) { wrmsr(KERNEL_GS_BASE, 0); }
static void rdmsr_tsc_adjust(void) { rdmsr(TSC_ADJUST); }
static void wrmsr_tsc_adjust(void) { wrmsr(TSC_ADJUST, 0); }

static const char *has_tsc_adjust(void) {
    return cpuid(0, 0).a >= 7 && cpuid(7, 0).b >> 1 & 1 ? 0 : "this CPU has no TSC_ADJUST";
}

static void cr0_read(void) { __asm__ volatile("mov %%cr0, %%rax" ::: "rax"); }

static void cr0_toggle_wp(void) {
    u64 value;
    __asm__ volatile("mov %%cr0, %0; and %1, %0; mov %0, %%cr0; or %2, %0; mov %0, %%cr0"
                     : "=&r"(value)
                     : "r"(~(u64)CR0_WP), "r"((u64)CR0_WP)
                     : "memory");
}

static void wp_off(void) {
    u64 value;
    __asm__ volatile("mov %%cr0, %0; and %1, %0; mov %0, %%cr0" : "=&r"(value) : "r"(~(u64)CR0_WP) : "memory");
}

static void cr3_reload(void) { __asm__ volatile("mov %%cr3, %%rax; mov %%rax, %%cr3" ::: "rax", "memory"); }

static void cr4_toggle_pge(void) {
    u64 value;
    __asm__ volatile("mov %%cr4, %0; xor %1, %0; mov %0, %%cr4; xor %1, %0; mov %0, %%cr4"
                     : "=&r"(value)
                     : "r"((u64)CR4_PGE)
                     : "memory");
}

static void cr8_read(void) { __asm__ volatile("mov %%cr8, %%rax" ::: "rax"); }
static void cr8_write(void) { __asm__ volatile("mov %0, %%cr8" ::"r"(0UL)); }
static void dr7_write(void) { __asm__ volatile("mov %0, %%dr7" ::"r"(0x400UL)); }
static void invlpg(void) { __asm__ volatile("invlpg (%0)" ::"r"(0x200000UL) : "memory"); }

/* --- ports --------------------------------------------------------------------------------------- */

static void in_nobody(void) { inl(PORT_OF_NOBODY); }
static void in_kernel(void) { inb(PORT_OF_PIC); }
static void out_kernel(void) { outb(PORT_OF_PIC, 0); }
static void in_user(void) { inb(SCRATCH_OF_SERIAL); }
static void in_pm_timer(void) { inl(pm_timer); }

static const char *has_pm_timer(void) {
    pm_timer = power_management() + PM_TIMER;
    return pm_timer > PM_TIMER ? 0 : "the chipset's power management has no ports";
}

/* --- memory of devices, and of nobody ------------------------------------------------------------------ */

static void mmio_lapic(void) { *(volatile u32 *)(u64)(LAPIC + APIC_VERSION); }
static void mmio_hpet(void) { *(volatile u32 *)(u64)HPET_MAIN_COUNTER; }
static void mmio_nobody(void) { *(volatile u32 *)(u64)ADDRESS_OF_NOBODY; }
static const char *has_hpet(void) { return hpet_there() ? 0 : "this machine has no HPET"; }

/* --- doorbells: QEMU's pci-testdev, docs/specs/pci-testdev.rst -------------------------------------------- */

enum {
    TEST_DEVICE = 0x00051b36,
    COMMAND = 4,
    MEMORY_AND_PORTS = 3,
    FIRST_BAR = 0x10,
    SECOND_BAR = 0x14,
    NO_EVENTFD = 0,
    ANY_VALUE_EVENTFD = 1,
    OFFSET = 4,
    DATA = 8,
    COUNT = 12
};

static u32 bell_memory, bell_ports, bell;
static u8 bell_data;

static int find_bell(void) {
    for (u32 device = 0; device < 256; device += 8)
        if (pci_read(device, 0) == TEST_DEVICE) {
            pci_read(device, COMMAND);
            outl(0xcfc, pci_read(device, COMMAND) | MEMORY_AND_PORTS);
            bell_memory = pci_read(device, FIRST_BAR) & ~15u;
            bell_ports = pci_read(device, SECOND_BAR) & ~3u;
            return bell_memory && bell_ports;
        }
    return 0;
}

static u8 bell_byte(int by_port, u32 at) {
    return by_port ? inb(bell_ports + at) : *(volatile u8 *)(u64)(bell_memory + at);
}

static const char *bell_at(int by_port, u8 test) {
    if (!find_bell())
        return "QEMU has no pci-testdev there";
    if (by_port)
        outb(bell_ports, test);
    else
        *(volatile u8 *)(u64)bell_memory = test;
    bell = by_port ? bell_ports : bell_memory;
    for (u32 i = 0; i < 4; i++)
        bell += (u32)bell_byte(by_port, OFFSET + i) << 8 * i;
    bell_data = bell_byte(by_port, DATA);
    return 0;
}

static const char *bell_mmio(void) { return bell_at(0, NO_EVENTFD); }
static const char *bell_mmio_eventfd(void) { return bell_at(0, ANY_VALUE_EVENTFD); }
static const char *bell_port(void) { return bell_at(1, NO_EVENTFD); }
static const char *bell_port_eventfd(void) { return bell_at(1, ANY_VALUE_EVENTFD); }
static void ring_mmio(void) { *(volatile u8 *)(u64)bell = bell_data; }
static void ring_port(void) { outb(bell, bell_data); }

/* --- traps within the guest --------------------------------------------------------------------------- */

struct interrupted {
    u64 rip, cs, flags, rsp, ss;
};

__attribute__((interrupt)) static void on_ud(struct interrupted *frame) { frame->rip += 2; }
__attribute__((interrupt)) static void on_pf(struct interrupted *frame, u64 error) {
    (void)error;
    frame->rip += 2;
}
__attribute__((interrupt)) static void on_software(struct interrupted *frame) { (void)frame; }

static void ud(void) { __asm__ volatile("ud2"); }
static void pf(void) { __asm__ volatile(".byte 0x88, 0x00" ::"a"((u64)NOT_MAPPED) : "memory"); /* mov %al, (%rax) */ }
static void software_interrupt(void) { __asm__ volatile("int %0" ::"i"(SOFTWARE_VECTOR)); }

/* The stubs of machine.c tell of any trap; these take no detour. They are put back after the row. */
extern char stubs[];
static const char *ud_gate(void) {
    gate(UD, on_ud);
    return 0;
}
static void ud_stub(void) { gate(UD, stubs + 16 * UD); }
static const char *pf_gate(void) {
    gate(PF, on_pf);
    return 0;
}
static void pf_stub(void) { gate(PF, stubs + 16 * PF); }

/* --- the first touch of a page -------------------------------------------------------------------------- */

static u64 next_page, end_of_memory;

/* A part is 2 MiB, for where the host gives memory in huge pages, one first touch in 512 pays for all. */
static u64 huge_pages(void) { return (end_of_memory - FIRST_PAGE) >> 21; }

static void touch(void) {
    *(volatile u8 *)next_page = 1;
    next_page += 4096;
}

static void touch_again(void) {
    *(volatile u8 *)next_page = 1;
    next_page += 4096;
    if (next_page >= end_of_memory)
        next_page = FIRST_PAGE;
}

static const char *from_first_page(void) {
    next_page = FIRST_PAGE;
    return 0;
}

static const char *all_touched(void) {
    for (next_page = FIRST_PAGE; next_page < end_of_memory;)
        touch();
    return from_first_page();
}

/* --- interrupts ---------------------------------------------------------------------------------------- */

static const char *self_ready(void) {
    x2apic_on();
    return 0;
}

static void self_ipi(void) {
    u64 before = interrupts_here;
    interrupt_self();
    __asm__ volatile("sti; nop; cli" ::: "memory");
    lost += interrupts_here != before + 1;
}

static const char *other_halts(void) {
    x2apic_on();
    if (!second_cpu())
        return "the second CPU did not start";
    let_other_spin(0);
    return 0;
}

static const char *other_looks_on(void) {
    const char *why_not = other_halts();
    if (!why_not)
        let_other_spin(1);
    return why_not;
}

static void other_rests(void) { let_other_spin(0); }

static void ipi(void) {
    u64 before = interrupts_there;
    interrupt_other();
    while (interrupts_there == before)
        __asm__ volatile("pause");
}

static void ipi_halted(void) {
    ipi();
    for (u64 until = ticks() + 2000; ticks() < until;) /* time for it to halt again, as in kvm-unit-tests */
        ;
}

static const char *deadline(void) {
    if (!deadline_timer())
        return "this CPU's APIC timer has no TSC deadline";
    x2apic_on();
    timer_on(TIMER_DEADLINE);
    __asm__ volatile("sti");
    return 0;
}

static void deadline_done(void) {
    __asm__ volatile("cli");
    timer_on(TIMER_ONCE);
}

static void deadline_passed(void) {
    wrmsr(TSC_DEADLINE, ticks());
    __asm__ volatile("nop");
}

static void deadline_soon(void) {
    u64 before = interrupts_here;
    wrmsr(TSC_DEADLINE, ticks() + 3000); /* as in kvm-unit-tests */
    while (interrupts_here == before)
        __asm__ volatile("" ::: "memory");
}

static const char *timer_ready(void) {
    x2apic_on();
    timer_on(TIMER_ONCE);
    return 0;
}

static void timer_wakes(void) {
    u64 before = interrupts_here;
    timer_in(TIMER_NS); /* the APIC's bus has 1 GHz in QEMU and KVM */
    __asm__ volatile("sti; hlt; cli" ::: "memory");
    lost += interrupts_here != before + 1;
}

/* --- calls to the hypervisor ------------------------------------------------------------------------------ */

enum { DOES_NOTHING = 1 }; /* KVM_HC_VAPIC_POLL_IRQ, Documentation/virt/kvm/x86/hypercalls.rst */

static void call_intel(void) {
    u64 a = DOES_NOTHING;
    __asm__ volatile("vmcall" : "+a"(a)::"memory");
}

static void call_amd(void) {
    u64 a = DOES_NOTHING;
    __asm__ volatile("vmmcall" : "+a"(a)::"memory");
}

static const char *on_kvm(u32 vendor) {
    struct leaf below = cpuid(0x40000000, 0);
    if (!(cpuid(1, 0).c >> 31) || below.b != 0x4b4d564b) /* "KVMK" */
        return "no hypervisor that takes calls: CPUID names no KVM";
    return cpuid(0, 0).b == vendor ? 0 : "the other vendor's instruction";
}

static const char *calls_intel(void) { return on_kvm(0x756e6547); /* "Genu" */ }
static const char *calls_amd(void) { return on_kvm(0x68747541); /* "Auth" */ }

/* What may end the guest comes late; so does what changes others' conditions: much memory touched, for a translator's TLB
 * grows with it, and costs more to throw away; a second CPU; x2APIC. */
const struct row rows[] = {
    {"loop", loop, 0, 0, 0, 0, 0},
    {"nops", nops, 0, 0, 0, 0, 0},
    {"rdtsc", rdtsc_once, 0, 0, 0, 0, 0},
    {"pause", pause_once, 0, 0, 0, 0, 0},
    {"cpuid", cpuid_once, 0, 0, 0, 0, 0},
    {"rdmsr_apic_base", rdmsr_apic_base, 0, 0, 0, 0, 0},
    {"rdmsr_kernel_gs", rdmsr_kernel_gs, 0, 0, 0, 0, 0},
    {"wrmsr_kernel_gs", wrmsr_kernel_gs, 0, 0, 0, 0, 0},
    {"rdmsr_tsc_adjust", rdmsr_tsc_adjust, has_tsc_adjust, 0, 0, 0, 0},
    {"wrmsr_tsc_adjust", wrmsr_tsc_adjust, has_tsc_adjust, 0, 0, 0, 0},
    {"cr0_read", cr0_read, 0, 0, 0, 0, 0},
    {"cr0_toggle_wp", cr0_toggle_wp, 0, wp_off, 0, 0, 0},
    {"cr3_reload", cr3_reload, 0, 0, 0, 0, 0},
    {"cr4_toggle_pge", cr4_toggle_pge, 0, 0, 0, 0, 0},
    {"cr8_read", cr8_read, 0, 0, 0, 0, 0},
    {"cr8_write", cr8_write, 0, 0, 0, 0, 0},
    {"dr7_write", dr7_write, 0, 0, 0, 0, 0},
    {"invlpg", invlpg, 0, 0, 0, 0, 0},
    {"in_nobody", in_nobody, 0, 0, 0, 0, 0},
    {"in_kernel", in_kernel, 0, 0, 0, 0, 0},
    {"out_kernel", out_kernel, 0, 0, 0, 0, 0},
    {"in_user", in_user, 0, 0, 0, 0, 0},
    {"in_pm_timer", in_pm_timer, has_pm_timer, 0, 0, 0, 0},
    {"mmio_lapic", mmio_lapic, 0, 0, 0, 0, 0},
    {"mmio_hpet", mmio_hpet, has_hpet, 0, 0, 0, 0},
    {"mmio_nobody", mmio_nobody, 0, 0, 0, 0, 0},
    {"bell_mmio", ring_mmio, bell_mmio, 0, 0, 0, 0},
    {"bell_mmio_eventfd", ring_mmio, bell_mmio_eventfd, 0, 0, 0, 0},
    {"bell_port", ring_port, bell_port, 0, 0, 0, 0},
    {"bell_port_eventfd", ring_port, bell_port_eventfd, 0, 0, 0, 0},
    {"ud", ud, ud_gate, ud_stub, 0, 0, 0},
    {"pf", pf, pf_gate, pf_stub, 0, 0, 0},
    {"int", software_interrupt, 0, 0, 0, 0, 0},
    {"touch_first", touch, from_first_page, 0, 0, PAGES_OF_HUGE_ONE, huge_pages},
    {"touch_again", touch_again, all_touched, 0, 0, 0, 0},
    {"vmcall", call_intel, calls_intel, 0, 0, 0, 0},
    {"vmmcall", call_amd, calls_amd, 0, 0, 0, 0},
    {"self_ipi", self_ipi, self_ready, 0, 0, 0, 0},
    {"timer_wake", timer_wakes, timer_ready, 0, TIMER_NS, 0, 0},
    {"deadline_passed", deadline_passed, deadline, deadline_done, 0, 0, 0},
    {"deadline_soon", deadline_soon, deadline, deadline_done, 0, 0, 0},
    {"ipi", ipi, other_looks_on, other_rests, 0, 0, 0},
    {"ipi_halted", ipi_halted, other_halts, 0, 0, 0, 0},
    {0, 0, 0, 0, 0, 0, 0},
};

void rows_init(void) {
    end_of_memory = number_option("memory", 32) << 20;
    if (end_of_memory > 1UL << 30)
        end_of_memory = 1UL << 30; /* all that is mapped */
    gate(SOFTWARE_VECTOR, on_software);
    apic_on();
}
