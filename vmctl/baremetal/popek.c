/* Popek and Goldberg's conditions, tried out: which sensitive instructions trap at CPL 3, and which do not.
 *
 * Command line: tries=NAME,… (default all; none for no tries), rounds=N of the workload (default 0: not done),
 * memory=MIB, reach=1 to look beyond the memory, spin=1 to keep the CPU for ever, slow=MS.
 * Says: facts, "try NAME", then for each of the levels "kernel", "user" and, where the CPU has UMIP, "umip": "trap VECTOR" or
 * "silent VALUE" (hex); or "skip WHY". Then "work" and "work_user DIGEST TICKS INTERVENTIONS", "reach LOOKED ANSWERED KEPT", "spin", "done".
 */
#include "apic.h"
#include "sensitive.h"
#include "workload.h"

#define NOTHING (~0UL)

enum { CR4_UMIP = 1 << 11, STEP = 1 << 20, MAPPED_MIB = 1024, TIMES = 20, LONG = 1000000000 };

static void (*volatile tried)(void);

static void user(void) {
    tried();
    resume = (void *)leave_cpl3;
    __asm__ volatile("ud2");
    __builtin_unreachable();
}

static void tell(const char *level, u64 traps_before) {
    print(level);
    if (seen.count != traps_before) {
        print(" trap ");
        print_number(seen.vector);
    } else {
        print(" silent ");
        print_hex(value);
    }
    print("\n");
}

/* Both levels begin with interrupts allowed, so that a change of that shows. */
static int one(const struct attempt *attempt, const char *level, int at_user) {
    const char *why_not = attempt->prepare ? attempt->prepare() : 0;
    if (why_not) {
        print("skip ");
        print(why_not);
        print("\n");
        return 0;
    }
    if (level[0] == 'u' && level[1] == 's' && attempt->prepare == 0)
        scratch[0] = scratch[1] = 0;
    value = NOTHING;
    u64 before = seen.count;
    if (at_user) {
        tried = attempt->once;
        user_flags = 0x202;
        at_cpl3(user);
    } else {
        __asm__ volatile("sti");
        attempt->once();
        __asm__ volatile("cli");
    }
    resume = 0;
    if (attempt->restore)
        attempt->restore();
    tell(level, before);
    return 1;
}

static int umip_there(void) { return cpuid(0, 0).a >= 7 && cpuid(7, 0).c >> 2 & 1; }

static void toggle_umip(void) {
    u64 cr4;
    __asm__ volatile("mov %%cr4, %0" : "=r"(cr4));
    __asm__ volatile("mov %0, %%cr4" ::"r"(cr4 ^ CR4_UMIP) : "memory");
}

static void try_all(const char *wanted) {
    int umip = umip_there();
    say("umip", umip);
    for (const struct attempt *attempt = attempts; attempt->name; attempt++) {
        if (*wanted && !listed(attempt->name, wanted))
            continue;
        print("try ");
        print(attempt->name);
        print("\n");
        pace();
        if (!one(attempt, "kernel", 0))
            continue;
        one(attempt, "user", 1);
        if (umip) {
            toggle_umip();
            one(attempt, "umip", 1);
            toggle_umip();
        }
        print("tried\n");
    }
}

static u64 interventions;

/* What any hypervisor must see: one CPUID, one port. */
static void intervene(void) {
    cpuid(0, 0);
    outb(0x80, 0);
    interventions += 2;
}

static volatile u64 work_rounds, work_digest, work_ticks;

/* The quickest of some times, as the process of the host does it; once where it takes long. */
static void timed_work(void) {
    u64 all = 0;
    workload(work_rounds / 10 + 1, 0); /* warm */
    work_ticks = ~0UL;
    for (int i = 0; i < TIMES && all < LONG; i++) {
        u64 began = ticks();
        work_digest = workload(work_rounds, 0);
        u64 took = ticks() - began;
        all += took;
        if (took < work_ticks)
            work_ticks = took;
    }
}

static void user_work(void) {
    timed_work();
    resume = (void *)leave_cpl3;
    __asm__ volatile("ud2");
    __builtin_unreachable();
}

static void tell_work(const char *level) {
    print(level);
    print(" ");
    print_number(work_digest);
    print(" ");
    print_number(work_ticks);
    print(" ");
    print_number(interventions);
    print("\n");
}

/* At CPL 0 and at CPL 3: a hypervisor may let the CPU run the one and not the other. */
static void work(u64 rounds) {
    work_rounds = rounds;
    timed_work();
    workload(rounds, intervene);
    tell_work("work");
    user_flags = 2;
    at_cpl3(user_work);
    tell_work("work_user");
}

/* Beyond its memory, as far as addresses are mapped: how many looked at, how many answered, how many kept what was written. */
static void reach(u64 memory_mib) {
    u64 looked = 0, answered = 0, kept = 0;
    for (u64 at = memory_mib << 20; at < (u64)MAPPED_MIB << 20; at += STEP) {
        volatile u64 *word = (volatile u64 *)at;
        u64 was = *word;
        *word = 0x5650455354554f42;
        looked++;
        answered += was != ~0UL && was != 0;
        kept += *word == 0x5650455354554f42;
    }
    print("reach ");
    print_number(looked);
    print(" ");
    print_number(answered);
    print(" ");
    print_number(kept);
    print("\n");
}

void guest_main(void) {
    print("vmctl-popek 1\n");
    pace();
    traps_init();
    map_devices();
    apic_on();
    tell_cpu();
    say("vmx", cpuid(1, 0).c >> 5 & 1);
    say("svm", cpuid(0x80000000, 0).a >= 0x80000001 ? cpuid(0x80000001, 0).c >> 2 & 1 : 0);
    const char *wanted = option("tries", "");
    if (!listed("none", wanted))
        try_all(wanted);
    u64 rounds = number_option("rounds", 0);
    if (rounds)
        work(rounds);
    if (number_option("reach", 0))
        reach(number_option("memory", 32));
    if (number_option("spin", 0)) {
        print("spin\n");
        for (;;)
            __asm__ volatile("cli");
    }
    print("done\n");
    say_goodbye();
}
