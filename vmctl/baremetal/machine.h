/* The machine a bare-metal guest finds: ports, traps, time. Shared by all of vmctl's guests. */
#ifndef MACHINE_H
#define MACHINE_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

static inline void outb(u16 port, u8 value) { __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }

static inline u8 inb(u16 port) {
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

/* Fenced by lfence on both sides, not by cpuid: cpuid itself leaves the guest. */
static inline u64 ticks(void) {
    u32 low, high;
    __asm__ volatile("lfence; rdtsc; lfence" : "=a"(low), "=d"(high)::"memory");
    return (u64)high << 32 | low;
}

/* What a trap leaves on the stack: our registers, then what the CPU pushed. */
struct frame {
    u64 r15, r14, r13, r12, r11, r10, r9, r8, rdi, rsi, rbp, rbx, rdx, rcx, rax;
    u64 vector, error, rip, cs, flags, rsp, ss;
};

/* The last trap seen. Set resume before doing what traps: execution goes on there. */
struct seen {
    u64 count, vector, error, cr2, cs;
};
extern volatile struct seen seen;
extern void *volatile resume;

void traps_init(void);
void at_cpl3(void (*code)(void));

void print(const char *text);
void print_number(u64 value);
void print_hex(u64 value);
void leave(u8 code) __attribute__((noreturn)); /* QEMU exits with 2 * code + 1 */

#endif
