/* The accelerator probe: does this accelerator really run a guest, and at native speed?
 *
 * Prints "KEY VALUE" lines on the serial line and leaves with status 0x31. A reader accepts it only when all
 * proofs are "ok" and the last line is "done".
 */
#include "machine.h"

enum { BATCHES = 40, DONE = 0x31, INVALID_OPCODE = 6, GENERAL_PROTECTION = 13, PAGE_FAULT = 14, BEYOND_THE_MAP = 0x40000000 };

static void report(const char *key, u64 value) {
    print(key);
    print(" ");
    print_number(value);
    print("\n");
}

static void proof(const char *key, int ok) {
    print(key);
    print(ok ? " ok\n" : " failed\n");
}

/* The canary: a thousand instructions that do nothing. A CPU runs them in some hundred cycles; a kernel that
 * interprets its guest takes over a thousand cycles for each. The least of many, for others share the machine. */
static u64 thousand_nops(void) {
    u64 least = ~0UL;
    for (int i = 0; i < BATCHES; i++) {
        u64 began = ticks();
        __asm__ volatile(".rept 1000; nop; .endr");
        u64 took = ticks() - began;
        if (took < least)
            least = took;
    }
    return least;
}

static int invalid_opcode(void) {
    u64 before = seen.count;
    resume = &&after;
    __asm__ goto("ud2" :: :: after);
after:
    return seen.count == before + 1 && seen.vector == INVALID_OPCODE;
}

static int page_fault(void) {
    u64 before = seen.count;
    resume = &&after;
    __asm__ goto("movb $1, (%0)" ::"r"((u64)BEYOND_THE_MAP) : "memory" : after);
after:
    /* Error code 2: a write, by the kernel, to a page that is not there. */
    return seen.count == before + 1 && seen.vector == PAGE_FAULT && seen.cr2 == BEYOND_THE_MAP && seen.error == 2;
}

static volatile u64 level, denied, denied_from;

/* At CPL 3: read the level from CS, try what only CPL 0 may, and come back by int 0x80. */
static void user(void) {
    u64 selector;
    __asm__ volatile("mov %%cs, %0" : "=r"(selector));
    level = selector & 3;
    resume = &&after;
    __asm__ goto("hlt" :: :: after);
after:
    denied = seen.vector;
    denied_from = seen.cs & 3;
    __asm__ volatile("int $0x80");
}

static int user_mode(void) {
    at_cpl3(user);
    return level == 3 && denied == GENERAL_PROTECTION && denied_from == 3;
}

void guest_main(void) {
    print("vmctl-probe 1\n");
    traps_init();
    report("nops_1000_cycles", thousand_nops());
    proof("ud", invalid_opcode());
    proof("pf", page_fault());
    proof("cpl3", user_mode());
    print("done\n");
    leave(DONE);
}
