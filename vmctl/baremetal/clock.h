/* How fast the TSC ticks, by the best witness this machine has. */
#ifndef CLOCK_H
#define CLOCK_H

#include "machine.h"

struct clock {
    const char *source; /* "" for none */
    u64 khz;
};

struct clock calibrate(const char *sources); /* the first of these that can be had, names with commas between */
int ticks_count_instructions(void);          /* whether the TSC counts instructions and not time: QEMU's -icount */

int hpet_there(void);

#endif
