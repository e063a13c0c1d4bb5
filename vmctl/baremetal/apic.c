/* Local APIC and second CPU. Intel SDM volume 3, chapter "Advanced Programmable Interrupt Controller". */
#include "apic.h"

enum {
    APIC_BASE_MSR = 0x1b,
    APIC_BASE = 0xfee00000,
    X2APIC_ENABLE = 1 << 10,
    X2APIC_MSRS = 0x800,
    X2APIC_SELF = 0x83f,
    ENABLE = 0x100,
    SPURIOUS_VECTOR = 0xff,
    ASSERT = 1 << 14,
    TO_SELF = 1 << 18,
    INIT = 5 << 8,
    STARTUP = 6 << 8,
    PENDING = 1 << 12,
    DIVIDE_BY_1 = 0xb,
    STARTUP_PAGE = 8, /* the code is copied to 0x8000 */
    PATIENCE = 200000000
};

struct interrupted;

volatile u64 interrupts_here, interrupts_there;

static volatile int x2apic, second_cpu_runs, other_spins;
static u32 second_cpu_id;

static void write(u32 at, u32 value) {
    if (x2apic)
        wrmsr(X2APIC_MSRS + (at >> 4), value);
    else
        *(volatile u32 *)(u64)(APIC_BASE + at) = value;
}

static u32 read(u32 at) {
    return x2apic ? rdmsr(X2APIC_MSRS + (at >> 4)) : *(volatile u32 *)(u64)(APIC_BASE + at);
}

static void command(u32 to, u32 what) {
    if (x2apic) {
        wrmsr(X2APIC_MSRS + (APIC_COMMAND >> 4), (u64)to << 32 | what);
        return;
    }
    while (read(APIC_COMMAND) & PENDING)
        __asm__ volatile("pause");
    write(APIC_COMMAND + 0x10, to << 24);
    write(APIC_COMMAND, what);
}

__attribute__((interrupt)) static void on_self(struct interrupted *frame) {
    (void)frame;
    interrupts_here++;
    write(APIC_END, 0);
}

__attribute__((interrupt)) static void on_other(struct interrupted *frame) {
    (void)frame;
    interrupts_there++;
    write(APIC_END, 0);
}

__attribute__((interrupt)) static void on_spurious(struct interrupted *frame) { (void)frame; }

static void on_this_cpu(void) {
    if (x2apic)
        wrmsr(APIC_BASE_MSR, rdmsr(APIC_BASE_MSR) | X2APIC_ENABLE);
    write(APIC_SPURIOUS, ENABLE | SPURIOUS_VECTOR);
}

void apic_on(void) {
    outb(0x21, 0xff);
    outb(0xa1, 0xff);
    gate(SELF_VECTOR, on_self);
    gate(OTHER_VECTOR, on_other);
    gate(SPURIOUS_VECTOR, on_spurious);
    on_this_cpu();
}

int x2apic_on(void) {
    if (!x2apic && cpuid(1, 0).c >> 21 & 1) {
        x2apic = 1;
        on_this_cpu();
    }
    return x2apic;
}

void interrupt_self(void) {
    if (x2apic)
        wrmsr(X2APIC_SELF, SELF_VECTOR);
    else
        command(0, ASSERT | TO_SELF | SELF_VECTOR);
}

void interrupt_other(void) { command(second_cpu_id, ASSERT | OTHER_VECTOR); }

int deadline_timer(void) { return cpuid(1, 0).c >> 24 & 1; }

void timer_on(u32 mode) {
    write(APIC_TIMER_DIVIDE, DIVIDE_BY_1);
    write(APIC_TIMER, mode | SELF_VECTOR);
}

void timer_in(u32 ticks_of_bus) { write(APIC_TIMER_COUNT, ticks_of_bus); }

/* The second CPU's whole life: started by smp.S on a stack of its own. */
void other_main(void) {
    traps_load();
    on_this_cpu();
    second_cpu_runs = 1;
    for (;;) {
        /* sti takes effect after the next instruction: no interrupt can slip in before hlt. */
        if (!other_spins)
            __asm__ volatile("sti; hlt; cli" ::: "memory");
        else
            __asm__ volatile("sti; nop; pause; cli" ::: "memory");
    }
}

extern char startup[], startup_end[];

int second_cpu(void) {
    if (second_cpu_runs)
        return 1;
    volatile char *page = (volatile char *)((u64)STARTUP_PAGE << 12);
    for (char *from = startup; from < startup_end; from++)
        *page++ = *from;
    u32 self = x2apic ? read(APIC_ID) : read(APIC_ID) >> 24;
    second_cpu_id = self ^ 1;
    command(second_cpu_id, ASSERT | INIT);
    for (u64 until = ticks() + 20000000; ticks() < until;) /* the 10 ms of the SDM's example, at up to 2 GHz */
        ;
    command(second_cpu_id, ASSERT | STARTUP | STARTUP_PAGE);
    for (u64 until = ticks() + PATIENCE; ticks() < until && !second_cpu_runs;)
        __asm__ volatile("pause");
    return second_cpu_runs;
}

void let_other_spin(int spin) {
    other_spins = spin;
    if (second_cpu_runs)
        interrupt_other(); /* out of its hlt, to see it */
}
