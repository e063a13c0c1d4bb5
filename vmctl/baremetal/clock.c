/* Finding the TSC's rate.
 *
 * In this order: what the hypervisor says (CPUID leaf 0x40000010, then kvmclock's multiplier, see the kernel's
 * Documentation/virt/kvm/x86/msr.rst), then what a clock of known rate says: the HPET, or channel 0 of the PIT.
 * Channel 2 is gated by port 0x61, which small machine types lack.
 */
#include "clock.h"

enum {
    MEASURE_US = 10000,
    HYPERVISOR_LEAF = 0x40000000,
    FREQUENCY_LEAF = 0x40000010,
    KVM_FEATURES = 0x40000001,
    KVM_CLOCK_BIT = 3,
    KVM_CLOCK = 0x4b564d01,
    HPET = 0xfed00000,
    HPET_COUNTER = 0xf0,
    PIT_DATA = 0x40,
    PIT_COMMAND = 0x43,
    PIT_PERIOD_FS = 838095110, /* 1.193182 MHz */
    STOPPED = 2000000000,      /* ticks in which a clock that runs would have come far */
    TRIES = 10
};

struct kvm_clock {
    u32 version, pad;
    u64 tsc, system_ns;
    u32 multiplier;
    signed char shift;
    u8 flags, pad2[2];
} __attribute__((packed));

static struct kvm_clock kvm_clock __attribute__((aligned(64)));

static u64 said_by_cpuid(void) {
    if (!(cpuid(1, 0).c >> 31) || cpuid(HYPERVISOR_LEAF, 0).a < FREQUENCY_LEAF)
        return 0;
    return cpuid(FREQUENCY_LEAF, 0).a;
}

static int kvm_clock_offered(void) {
    struct leaf who = cpuid(HYPERVISOR_LEAF, 0);
    if (!(cpuid(1, 0).c >> 31) || who.b != 0x4b4d564b || who.a < KVM_FEATURES) /* "KVMK" */
        return 0;
    return cpuid(KVM_FEATURES, 0).a >> KVM_CLOCK_BIT & 1;
}

/* ns = (ticks << shift) * multiplier >> 32 */
static u64 said_by_kvm_clock(void) {
    if (!kvm_clock_offered())
        return 0;
    wrmsr(KVM_CLOCK, (u64)&kvm_clock | 1);
    volatile struct kvm_clock *seen = &kvm_clock;
    u64 khz = seen->multiplier ? (1000000UL << 32) / seen->multiplier : 0;
    wrmsr(KVM_CLOCK, 0);
    return seen->shift < 0 ? khz << -seen->shift : khz >> seen->shift;
}

static volatile u32 *hpet(u32 at) { return (volatile u32 *)(u64)(HPET + at); }

int hpet_there(void) {
    u32 period_fs = *hpet(4);
    return period_fs && period_fs <= 0x05f5e100; /* at most 100 ns, by its specification */
}

/* The TSC and another clock at one moment: of some looks, the one least disturbed. */
struct moment {
    u64 ticks;
    u32 count;
};

static struct moment now(u32 (*count)(void)) {
    struct moment best = {0, 0};
    u64 least = ~0UL;
    for (int i = 0; i < TRIES; i++) {
        u64 before = ticks();
        u32 counted = count();
        u64 took = ticks() - before;
        if (took < least) {
            least = took;
            best = (struct moment){before + took / 2, counted};
        }
    }
    return best;
}

/* By a clock that counts up, with so many femtoseconds between two counts and as many bits as the mask. */
static u64 khz_by(u32 (*count)(void), u32 mask, u64 period_fs) {
    u32 wanted = MEASURE_US * 1000000000UL / period_fs, passed;
    struct moment first = now(count), last;
    do {
        last = now(count);
        passed = (last.count - first.count) & mask;
    } while (passed < wanted && last.ticks - first.ticks < STOPPED);
    return passed < wanted ? 0 : (last.ticks - first.ticks) * 1000000000UL / (passed * period_fs / 1000);
}

static u32 hpet_low(void) { return *hpet(HPET_COUNTER); }

static u64 by_hpet(void) {
    if (!hpet_there())
        return 0;
    *hpet(0x10) |= 1; /* let it count */
    return khz_by(hpet_low, 0xffffffff, *hpet(4));
}

static u32 pit_up(void) {
    outb(PIT_COMMAND, 0); /* latch channel 0, which counts down */
    u32 low = inb(PIT_DATA);
    return -(low | inb(PIT_DATA) << 8);
}

static u64 by_pit(void) {
    outb(PIT_COMMAND, 0x34); /* channel 0, both bytes, from 65536 down again and again: 55 ms */
    outb(PIT_DATA, 0);
    outb(PIT_DATA, 0);
    return khz_by(pit_up, 0xffff, PIT_PERIOD_FS);
}

struct clock calibrate(const char *sources) {
    static const struct {
        const char *name;
        u64 (*khz)(void);
    } known[] = {{"cpuid", said_by_cpuid}, {"kvmclock", said_by_kvm_clock}, {"hpet", by_hpet}, {"pit", by_pit}};
    for (u64 i = 0; i < sizeof known / sizeof *known; i++) {
        u64 khz = listed(known[i].name, sources) ? known[i].khz() : 0;
        if (khz)
            return (struct clock){known[i].name, khz};
    }
    return (struct clock){"", 0};
}

/* Time never passes twice alike to the tick over 100,000 instructions; a count of instructions always does. */
int ticks_count_instructions(void) {
    u64 first = 0;
    for (int i = 0; i < TRIES; i++) {
        u64 began = ticks(), turns = 50000;
        __asm__ volatile("1: dec %0; jnz 1b" : "+r"(turns));
        u64 took = ticks() - began;
        if (i && took != first)
            return 0;
        first = took;
    }
    return 1;
}
