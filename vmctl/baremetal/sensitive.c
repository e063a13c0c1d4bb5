/* The instructions. Each leaves in "value" what it found out; what that means stands in vmctl/bench/sensitive.py.
 *
 * John Scott Robin and Cynthia Irvine, "Analysis of the Intel Pentium's Ability to Support a Secure Virtual Machine
 * Monitor", USENIX Security 2000, tables of sensitive, unprivileged instructions; then what is newer, then privileged
 * and innocuous ones, by which to see that the method tells them apart.
 */
#include "sensitive.h"

#include "apic.h"

enum {
    CR4_TSD = 1 << 2,
    CR4_PCE = 1 << 8,
    CR4_FSGSBASE = 1 << 16,
    CR4_OSXSAVE = 1 << 18,
    CR4_PKE = 1 << 22,
    OPEN_VECTOR = 0x82
};

enum {
    EFER = 0xc0000080,
    STAR,
    LSTAR,
    SYSCALL_MASK = 0xc0000084,
    FS_BASE = 0xc0000100,
    GS_BASE,
    EFER_SYSCALL = 1
};

volatile u64 value, scratch[2];

static u64 cr0_copy;
static volatile u64 ticks_before;

/* On a trap the machine goes on at 9, behind the instructions, and value stays what it was: rdi is its address, rsi a
 * place to write to. */
#define ATTEMPT(name, code)                                                                                          \
    static void name(void) {                                                                                         \
        __asm__ volatile("lea 9f(%%rip), %%rax; mov %%rax, resume(%%rip);" code "9:" ::"D"(&value), "S"(scratch),    \
                         "b"(cr0_copy)                                                                               \
                         : "rax", "rcx", "rdx", "r10", "r11", "memory", "cc");                                                     \
    }
#define TELL "mov %%rax, (%%rdi);"
#define TELL_ZERO_FLAG "setz %%al; movzbl %%al, %%eax;" TELL
#define TELL_IF "pushfq; pop %%rax; and $0x200, %%eax;" TELL

/* Reads of system registers. */
ATTEMPT(sgdt, "sgdt (%%rsi); mov 2(%%rsi), %%rax;" TELL)
ATTEMPT(sidt, "sidt (%%rsi); mov 2(%%rsi), %%rax;" TELL)
ATTEMPT(sldt, "xor %%eax, %%eax; sldt %%ax;" TELL)
ATTEMPT(smsw, "smsw %%rax; movzwl %%ax, %%eax;" TELL)
ATTEMPT(str, "xor %%eax, %%eax; str %%ax;" TELL)

/* Flags. Each begins with interrupts allowed and tries to forbid them. */
ATTEMPT(pushf, TELL_IF)
ATTEMPT(popf, "pushfq; andq $~0x200, (%%rsp); popfq;" TELL_IF)
ATTEMPT(iret,
        "mov %%rsp, %%rcx; mov %%ss, %%eax; push %%rax; push %%rcx; pushfq; andq $~0x200, (%%rsp);"
        "mov %%cs, %%eax; push %%rax; lea 1f(%%rip), %%rax; push %%rax; iretq; 1:" TELL_IF)

/* Checks against the descriptor tables, of a segment that is the kernel's. */
ATTEMPT(lar, "mov $0x10, %%ecx; lar %%ecx, %%eax;" TELL_ZERO_FLAG)
ATTEMPT(lsl, "mov $0x10, %%ecx; lsl %%ecx, %%eax;" TELL_ZERO_FLAG)
ATTEMPT(verr, "mov $0x10, %%ecx; verr %%cx;" TELL_ZERO_FLAG)
ATTEMPT(verw, "mov $0x10, %%ecx; verw %%cx;" TELL_ZERO_FLAG)

/* Segment registers, and transfers that load or save CS. */
ATTEMPT(mov_cs, "xor %%eax, %%eax; mov %%cs, %%eax;" TELL)
ATTEMPT(mov_fs, "mov $0x1b, %%eax; mov %%eax, %%fs; xor %%eax, %%eax; mov %%fs, %%eax;" TELL)
ATTEMPT(pop_fs, "pushq $0x1b; popq %%fs; xor %%eax, %%eax; mov %%fs, %%eax;" TELL)
ATTEMPT(call_far,
        "lea 1f(%%rip), %%rax; mov %%eax, (%%rsi); mov %%cs, %%eax; mov %%ax, 4(%%rsi); lcall *(%%rsi);"
        "1: mov 4(%%rsp), %%eax; add $8, %%rsp; movzwl %%ax, %%eax;" TELL)
ATTEMPT(jmp_far,
        "lea 1f(%%rip), %%rax; mov %%eax, (%%rsi); mov %%cs, %%eax; mov %%ax, 4(%%rsi); ljmp *(%%rsi);"
        "1: xor %%eax, %%eax; mov %%cs, %%eax;" TELL)
ATTEMPT(ret_far,
        "mov %%cs, %%eax; push %%rax; lea 1f(%%rip), %%rax; push %%rax; lretq;"
        "1: xor %%eax, %%eax; mov %%cs, %%eax;" TELL)
ATTEMPT(int_n, "int $0x82;")

/* PUSH CS is valid outside 64-bit code only: to a 32-bit segment of the same level, and back. */
ATTEMPT(push_cs,
        "mov %%cs, %%eax; mov $0x38, %%edx; test $3, %%eax; jz 3f; mov $0x43, %%edx; 3: lea 1f(%%rip), %%rax; mov %%eax, (%%rsi); mov %%dx, 4(%%rsi);"
        "lea 2f(%%rip), %%rax; mov %%eax, 8(%%rsi); mov %%cs, %%eax; mov %%ax, 12(%%rsi); ljmp *(%%rsi);"
        ".code32; 1: push %%cs; pop %%eax; ljmp *8(%%esi); .code64; 2: and $3, %%eax;" TELL)

/* Newer than that list. */
ATTEMPT(cpuid_leaf, "mov $1, %%eax; xor %%ecx, %%ecx; push %%rbx; cpuid; pop %%rbx; mov %%eax, %%eax;" TELL)
ATTEMPT(rdtsc, "rdtsc; shl $32, %%rdx; or %%rdx, %%rax;" TELL)
ATTEMPT(rdtscp, "rdtscp; shl $32, %%rdx; or %%rdx, %%rax;" TELL)
ATTEMPT(rdpid, "rdpid %%rax;" TELL)
ATTEMPT(xgetbv, "xor %%ecx, %%ecx; xgetbv; shl $32, %%rdx; or %%rdx, %%rax;" TELL)
ATTEMPT(rdpmc, "xor %%ecx, %%ecx; rdpmc; shl $32, %%rdx; or %%rdx, %%rax;" TELL)
ATTEMPT(syscall, "mov %%cs, %%r10d; syscall;")
ATTEMPT(rdfsbase, "rdfsbase %%rax;" TELL)
ATTEMPT(wrgsbase, "mov $0x1000, %%eax; wrgsbase %%rax; xor %%eax, %%eax;" TELL)
ATTEMPT(rdpkru, "xor %%ecx, %%ecx; rdpkru; mov %%eax, %%eax;" TELL)
ATTEMPT(wrpkru, "xor %%ecx, %%ecx; xor %%edx, %%edx; mov $0x55555550, %%eax; wrpkru; xor %%eax, %%eax;" TELL)

/* Privileged by design. */
ATTEMPT(hlt, "hlt; xor %%eax, %%eax;" TELL)
ATTEMPT(cli, "cli;" TELL_IF)
ATTEMPT(sti, "sti;" TELL_IF)
ATTEMPT(mov_from_cr0, "mov %%cr0, %%rax;" TELL)
ATTEMPT(mov_to_cr0, "mov %%rbx, %%cr0; mov %%rbx, %%rax;" TELL)
ATTEMPT(mov_from_cr3, "mov %%cr3, %%rax;" TELL)
ATTEMPT(mov_from_cr8, "mov %%cr8, %%rax;" TELL)
ATTEMPT(mov_from_dr7, "mov %%dr7, %%rax;" TELL)
ATTEMPT(lmsw, "lmsw %%bx; xor %%eax, %%eax;" TELL)
ATTEMPT(clts, "clts; xor %%eax, %%eax;" TELL)
ATTEMPT(lgdt, "lgdt (%%rsi); xor %%eax, %%eax;" TELL)
ATTEMPT(lidt, "lidt (%%rsi); xor %%eax, %%eax;" TELL)
ATTEMPT(lldt, "xor %%eax, %%eax; lldt %%ax;" TELL)
ATTEMPT(rdmsr_one, "mov $0xc0000102, %%ecx; rdmsr; mov %%eax, %%eax;" TELL)
ATTEMPT(wrmsr_one, "mov $0xc0000102, %%ecx; xor %%eax, %%eax; xor %%edx, %%edx; wrmsr;" TELL)
ATTEMPT(invlpg, "invlpg (%%rdi); xor %%eax, %%eax;" TELL)
ATTEMPT(wbinvd, "wbinvd; xor %%eax, %%eax;" TELL)
ATTEMPT(in, "in $0x80, %%al; xor %%eax, %%eax;" TELL)
ATTEMPT(out, "xor %%eax, %%eax; out %%al, $0x80;" TELL)
ATTEMPT(swapgs, "swapgs; swapgs; xor %%eax, %%eax;" TELL)
ATTEMPT(xsetbv, "xor %%ecx, %%ecx; xgetbv; xsetbv; xor %%eax, %%eax;" TELL)
ATTEMPT(clac, "clac; xor %%eax, %%eax;" TELL)
ATTEMPT(invpcid, "movq $0, (%%rsi); movq $0, 8(%%rsi); mov $2, %%eax; invpcid (%%rsi), %%rax; xor %%eax, %%eax;" TELL)

/* Innocuous. */
ATTEMPT(add, "mov $40, %%eax; add $2, %%eax;" TELL)
ATTEMPT(mul, "mov $6, %%eax; mov $7, %%ecx; mul %%ecx;" TELL)
ATTEMPT(xchg, "mov $42, %%eax; xchg %%rax, (%%rsi); mov (%%rsi), %%rax;" TELL)

struct interrupted {
    u64 rip, cs, flags, rsp, ss;
};

/* What INT pushes tells the level. */
__attribute__((interrupt)) static void on_open_vector(struct interrupted *frame) { value = frame->cs; }

/* Where SYSCALL leads: the level that it is at now is told, and it is left for the one in r10, not by SYSRET, which is one
 * more thing that an accelerator may not have. */
void syscall_entry(void);
__asm__(".globl syscall_entry; syscall_entry: mov %cs, %eax; mov %rax, (%rdi); test $3, %r10d; jz 1f;"
        "mov %rsp, %rax; push $0x1b; push %rax; push %r11; push $0x23; push %rcx; iretq;"
        "1: push %r11; popfq; jmp *%rcx");

static const char *open_vector(void) {
    gate(OPEN_VECTOR, on_open_vector);
    open_gate(OPEN_VECTOR);
    return 0;
}

static const char *cr0_known(void) {
    __asm__ volatile("mov %%cr0, %0" : "=r"(cr0_copy));
    return 0;
}

static const char *gdt_known(void) {
    __asm__ volatile("sgdt %0" : "=m"(scratch));
    return 0;
}

static const char *idt_known(void) {
    __asm__ volatile("sidt %0" : "=m"(scratch));
    return 0;
}

/* A timer wakes who may halt, again and again: on a busy host the first alarm may come before the halt. */
static const char *alarm(void) {
    timer_on(TIMER_AGAIN);
    timer_in(1000000);
    return 0;
}

static void alarm_off(void) {
    timer_in(0);
    timer_on(TIMER_ONCE);
}

static const char *before_ticks(void) {
    ticks_before = ticks();
    return 0;
}

/* Two readings are never alike: what counts is that it lies between two of the kernel's. */
static void between_ticks(void) {
    if (value != ~0UL)
        value = value >= ticks_before && value <= ticks();
}

static u64 cr4_toggle(u64 bits) {
    u64 cr4;
    __asm__ volatile("mov %%cr4, %0" : "=r"(cr4));
    __asm__ volatile("mov %0, %%cr4" ::"r"(cr4 ^ bits) : "memory");
    return cr4;
}

static const char *ticks_forbidden(void) {
    cr4_toggle(CR4_TSD);
    return before_ticks();
}

static void ticks_allowed(void) {
    cr4_toggle(CR4_TSD);
    between_ticks();
}

static const char *has_rdtscp(void) {
    if (cpuid(0x80000000, 0).a < 0x80000001 || !(cpuid(0x80000001, 0).d >> 27 & 1))
        return "this CPU has no RDTSCP";
    return before_ticks();
}

static const char *has_xgetbv(void) {
    if (!(cpuid(1, 0).c >> 26 & 1))
        return "this CPU has no XSAVE";
    cr4_toggle(CR4_OSXSAVE);
    return 0;
}

static void xsave_off(void) { cr4_toggle(CR4_OSXSAVE); }

static struct leaf features(void) { return cpuid(0, 0).a >= 7 ? cpuid(7, 0) : (struct leaf){0, 0, 0, 0}; }

static const char *has_rdpid(void) { return features().c >> 22 & 1 ? 0 : "this CPU has no RDPID"; }

static const char *has_smap(void) { return features().b >> 20 & 1 ? 0 : "this CPU has no SMAP"; }

static const char *has_invpcid(void) { return features().b >> 10 & 1 ? 0 : "this CPU has no INVPCID"; }

static const char *has_fsgsbase(void) {
    if (!(features().b & 1))
        return "this CPU has no FSGSBASE";
    cr4_toggle(CR4_FSGSBASE);
    wrmsr(FS_BASE, (u64)scratch);
    return 0;
}

static void fsgsbase_off(void) {
    wrmsr(FS_BASE, 0);
    cr4_toggle(CR4_FSGSBASE);
}

/* What was written counts when the kernel sees it. */
static void gs_seen(void) {
    value = rdmsr(GS_BASE);
    wrmsr(GS_BASE, 0);
    fsgsbase_off();
}

/* Rights to the pages of keys that no page here has. */
static const char *has_pkru(void) {
    if (!(features().c >> 3 & 1))
        return "this CPU has no protection keys";
    cr4_toggle(CR4_PKE);
    __asm__ volatile("wrpkru" ::"a"(0xfffffff0), "c"(0), "d"(0));
    return 0;
}

static void pkru_off(void) { cr4_toggle(CR4_PKE); }

static void pkru_seen(void) {
    if (value != ~0UL)
        rdpkru();
    pkru_off();
}

/* Counter 0 is not set going: each reading of it is alike. */
static const char *has_counters(void) {
    int intels = cpuid(0, 0).a >= 0xa && cpuid(0xa, 0).a & 0xff;
    int amds = cpuid(0x80000000, 0).a >= 0x80000001 && cpuid(0x80000001, 0).c >> 23 & 1;
    return intels || amds ? 0 : "this CPU tells of no performance counter";
}

static const char *counters_open(void) {
    const char *why_not = has_counters();
    if (!why_not)
        cr4_toggle(CR4_PCE);
    return why_not;
}

static void counters_closed(void) { cr4_toggle(CR4_PCE); }

/* CS and SS of the kernel at 0x08; all flags are kept. */
static const char *has_syscall(void) {
    if (cpuid(0x80000000, 0).a < 0x80000001 || !(cpuid(0x80000001, 0).d >> 11 & 1))
        return "this CPU has no SYSCALL";
    wrmsr(EFER, rdmsr(EFER) | EFER_SYSCALL);
    wrmsr(STAR, (u64)0x08 << 32);
    wrmsr(LSTAR, (u64)syscall_entry);
    wrmsr(SYSCALL_MASK, 0);
    return 0;
}

static void syscall_off(void) { wrmsr(EFER, rdmsr(EFER) & ~(u64)EFER_SYSCALL); }

const struct attempt attempts[] = {
    {"sgdt", sgdt, 0, 0},
    {"sidt", sidt, 0, 0},
    {"sldt", sldt, 0, 0},
    {"smsw", smsw, 0, 0},
    {"pushf", pushf, 0, 0},
    {"popf", popf, 0, 0},
    {"lar", lar, 0, 0},
    {"lsl", lsl, 0, 0},
    {"verr", verr, 0, 0},
    {"verw", verw, 0, 0},
    {"pop_fs", pop_fs, 0, 0},
    {"push_cs", push_cs, 0, 0},
    {"call_far", call_far, 0, 0},
    {"jmp_far", jmp_far, 0, 0},
    {"int_n", int_n, open_vector, 0},
    {"ret_far", ret_far, 0, 0},
    {"iret", iret, 0, 0},
    {"str", str, 0, 0},
    {"mov_cs", mov_cs, 0, 0},
    {"mov_fs", mov_fs, 0, 0},
    {"cpuid", cpuid_leaf, 0, 0},
    {"rdtsc", rdtsc, before_ticks, between_ticks},
    {"rdtsc_tsd", rdtsc, ticks_forbidden, ticks_allowed},
    {"rdtscp", rdtscp, has_rdtscp, between_ticks},
    {"rdpid", rdpid, has_rdpid, 0},
    {"xgetbv", xgetbv, has_xgetbv, xsave_off},
    {"rdpmc_pce", rdpmc, counters_open, counters_closed},
    {"syscall", syscall, has_syscall, syscall_off},
    {"rdfsbase", rdfsbase, has_fsgsbase, fsgsbase_off},
    {"wrgsbase", wrgsbase, has_fsgsbase, gs_seen},
    {"rdpkru", rdpkru, has_pkru, pkru_off},
    {"wrpkru", wrpkru, has_pkru, pkru_seen},
    {"hlt", hlt, alarm, alarm_off},
    {"cli", cli, 0, 0},
    {"sti", sti, 0, 0},
    {"mov_from_cr0", mov_from_cr0, 0, 0},
    {"mov_to_cr0", mov_to_cr0, cr0_known, 0},
    {"mov_from_cr3", mov_from_cr3, 0, 0},
    {"mov_from_cr8", mov_from_cr8, 0, 0},
    {"mov_from_dr7", mov_from_dr7, 0, 0},
    {"lmsw", lmsw, cr0_known, 0},
    {"clts", clts, 0, 0},
    {"lgdt", lgdt, gdt_known, 0},
    {"lidt", lidt, idt_known, 0},
    {"lldt", lldt, 0, 0},
    {"rdmsr", rdmsr_one, 0, 0},
    {"wrmsr", wrmsr_one, 0, 0},
    {"invlpg", invlpg, 0, 0},
    {"wbinvd", wbinvd, 0, 0},
    {"in", in, 0, 0},
    {"out", out, 0, 0},
    {"swapgs", swapgs, 0, 0},
    {"rdpmc", rdpmc, has_counters, 0},
    {"xsetbv", xsetbv, has_xgetbv, xsave_off},
    {"clac", clac, has_smap, 0},
    {"invpcid", invpcid, has_invpcid, 0},
    {"add", add, 0, 0},
    {"mul", mul, 0, 0},
    {"xchg", xchg, 0, 0},
    {0, 0, 0, 0},
};
