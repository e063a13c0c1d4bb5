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

static inline void outl(u16 port, u32 value) { __asm__ volatile("outl %0, %1" ::"a"(value), "Nd"(port)); }

static inline u32 inl(u16 port) {
    u32 value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline void outw(u16 port, u16 value) { __asm__ volatile("outw %0, %1" ::"a"(value), "Nd"(port)); }

static inline u64 rdmsr(u32 number) {
    u32 low, high;
    __asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(number));
    return (u64)high << 32 | low;
}

static inline void wrmsr(u32 number, u64 value) {
    __asm__ volatile("wrmsr" ::"c"(number), "a"((u32)value), "d"((u32)(value >> 32)) : "memory");
}

struct leaf {
    u32 a, b, c, d;
};

static inline struct leaf cpuid(u32 number, u32 part) {
    struct leaf leaf;
    __asm__ volatile("cpuid" : "=a"(leaf.a), "=b"(leaf.b), "=c"(leaf.c), "=d"(leaf.d) : "a"(number), "c"(part));
    return leaf;
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
void traps_load(void);                            /* the same table, on another CPU */
void gate(u8 vector, const void *handler);        /* past the stubs, straight to a handler */
void open_gate(u8 vector);                        /* may be called from CPL 3 as well */
void at_cpl3(void (*code)(void));
void leave_cpl3(void);                            /* as resume: the next trap ends the stay, as int 0x80 does */
extern u64 user_flags;                            /* that it begins with */

void print(const char *text);
void print_number(u64 value);
void print_hex(u64 value);
int heard(char letter); /* whether the other side has typed it */
void leave(u8 code) __attribute__((noreturn)); /* QEMU exits with 2 * code + 1 */
void power_off(void) __attribute__((noreturn));
void say_goodbye(void) __attribute__((noreturn)); /* and power off */

void pace(void); /* with slow=MS on the command line: time for the other side to hear what was said, before what may end us */
void say(const char *key, u64 value); /* a line of both */
void tell_cpu(void);

void map_devices(void);                           /* the addresses from 2 to 4 GiB, where devices are */
u32 pci_read(u32 device, u32 at);                 /* device: slot << 3 | function, on bus 0 */
u32 power_management(void);                       /* base of the chipset's power management ports, 0 for none */

/* The word after NAME= on the kernel's command line, up to a blank; or the one given. */
const char *option(const char *name, const char *otherwise);
u64 number_option(const char *name, u64 otherwise);
/* Whether a word is in a list with commas between. */
int listed(const char *word, const char *list);

#endif
