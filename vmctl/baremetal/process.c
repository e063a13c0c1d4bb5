/* The same work in a process of the host: prints its digest and the ticks it took. No library: two system calls of Linux. */
#include "workload.h"

static long call(long number, long a, long b, long c) {
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return result;
}

static unsigned long ticks(void) {
    unsigned low, high;
    __asm__ volatile("lfence; rdtsc; lfence" : "=a"(low), "=d"(high)::"memory");
    return (unsigned long)high << 32 | low;
}

static char *number(char *end, unsigned long value) {
    do
        *--end = '0' + value % 10;
    while (value /= 10);
    return end;
}

/* argv[1]: rounds. The stack begins with argc and then argv, by the x86-64 System V ABI. */
__asm__(".globl _start\n_start: mov %rsp, %rdi\nandq $-16, %rsp\ncall process_main");

__attribute__((noreturn, used)) void process_main(long *stack) {
    unsigned long rounds = 0;
    for (const char *digits = stack[0] > 1 ? (const char *)stack[2] : ""; *digits >= '0' && *digits <= '9'; digits++)
        rounds = 10 * rounds + *digits - '0';
    workload(rounds / 10 + 1, 0); /* warm */
    unsigned long began = ticks(), digest = workload(rounds, 0), took = ticks() - began;
    char text[64], *at = text + sizeof text;
    *--at = '\n';
    at = number(at, took);
    *--at = ' ';
    at = number(at, digest);
    call(1, 1, (long)at, text + sizeof text - at);
    for (;;)
        call(60, 0, 0, 0);
}
