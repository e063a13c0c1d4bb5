/* Serial line, exit, interrupt table. */
#include "machine.h"

enum { COM1 = 0x3f8, LINE_STATUS = COM1 + 5, TRANSMITTER_EMPTY = 0x20, DATA_READY = 1, DEBUG_EXIT = 0xf4 };

static void put(char letter) {
    /* Bounded: a machine without that port must not stop us here. */
    for (int i = 0; i < 10000 && !(inb(LINE_STATUS) & TRANSMITTER_EMPTY); i++)
        ;
    outb(COM1, letter);
}

void print(const char *text) {
    while (*text)
        put(*text++);
}

int heard(char letter) { return inb(LINE_STATUS) & DATA_READY && inb(COM1) == (u8)letter; }

static void print_in_base(u64 value, u64 base) {
    char digits[24];
    int at = sizeof digits;
    digits[--at] = 0;
    do
        digits[--at] = "0123456789abcdef"[value % base];
    while (value /= base);
    print(digits + at);
}

void print_number(u64 value) { print_in_base(value, 10); }

void print_hex(u64 value) {
    print("0x");
    print_in_base(value, 16);
}

void leave(u8 code) {
    outb(DEBUG_EXIT, code);
    for (;;)
        __asm__ volatile("cli; hlt");
}

struct gate_descriptor {
    u16 low, selector;
    u8 stack, kind;
    u16 middle;
    u32 high, zero;
} __attribute__((packed));

struct task_state {
    u32 reserved;
    u64 rsp0, rsp1, rsp2, unused, ist[7], unused2;
    u16 unused3, io_map;
} __attribute__((packed));

struct pointer {
    u16 limit;
    u64 base;
} __attribute__((packed));

extern char stubs[], trap_stack_top[];
extern u64 gdt[];

static struct gate_descriptor idt[256];
static struct task_state task;

volatile struct seen seen;
void *volatile resume;

void trap(struct frame *frame) {
    if (frame->vector == 0x80 || resume == (void *)leave_cpl3) {
        seen.cs = frame->cs;
        resume = 0;
        leave_cpl3();
    }
    seen.count++;
    seen.vector = frame->vector;
    seen.error = frame->error;
    seen.cs = frame->cs;
    __asm__ volatile("mov %%cr2, %0" : "=r"(seen.cr2));
    if (!resume) {
        print("unexpected trap ");
        print_number(frame->vector);
        print(" at ");
        print_hex(frame->rip);
        print("\n");
        leave(1);
    }
    frame->rip = (u64)resume;
    resume = 0;
}

void gate(u8 vector, const void *handler) {
    u64 at = (u64)handler;
    idt[vector] = (struct gate_descriptor){at, 0x08, 0, 0x8e, at >> 16, at >> 32, 0}; /* a 64-bit interrupt gate */
}

void open_gate(u8 vector) { idt[vector].kind = 0xee; }

void traps_load(void) {
    struct pointer table = {sizeof idt - 1, (u64)idt};
    __asm__ volatile("lidt %0" ::"m"(table));
}

void traps_init(void) {
    for (int i = 0; i < 256; i++)
        gate(i, stubs + 16 * i);
    open_gate(0x80);
    traps_load();

    /* The I/O map lies past the segment's limit, or CPL 3 could do port I/O. */
    task.rsp0 = (u64)trap_stack_top;
    task.io_map = sizeof task;
    u64 base = (u64)&task;
    gdt[5] = (sizeof task - 1) | (base & 0xffffff) << 16 | 0x89UL << 40 | (base >> 24 & 0xff) << 56;
    gdt[6] = base >> 32;
    __asm__ volatile("ltr %w0" ::"r"(0x28));
}
