/* Local APIC: interrupts to oneself and to the second CPU, and the timer. */
#ifndef APIC_H
#define APIC_H

#include "machine.h"

enum {
    APIC_ID = 0x20,
    APIC_VERSION = 0x30,
    APIC_END = 0xb0,
    APIC_SPURIOUS = 0xf0,
    APIC_COMMAND = 0x300,
    APIC_TIMER = 0x320,
    APIC_TIMER_COUNT = 0x380,
    APIC_TIMER_DIVIDE = 0x3e0,
    TSC_DEADLINE = 0x6e0
};

enum { SELF_VECTOR = 0xb0, OTHER_VECTOR = 0xb1 };

extern volatile u64 interrupts_here, interrupts_there; /* taken so far, by us and by the second CPU */

void apic_on(void);       /* as xAPIC, PICs masked */
int x2apic_on(void);      /* once on, it cannot be read by MMIO again; 0 where the CPU has none */
void interrupt_self(void);
void interrupt_other(void);
void timer_on(u32 mode);
void timer_in(u32 ticks_of_bus);
int deadline_timer(void); /* whether the CPU has it */

enum { TIMER_ONCE = 0, TIMER_AGAIN = 1 << 17, TIMER_DEADLINE = 2 << 17 };

int second_cpu(void);     /* starts it once; 0 when none came */
void let_other_spin(int spin); /* it halts between interrupts, or looks on with interrupts allowed */

#endif
