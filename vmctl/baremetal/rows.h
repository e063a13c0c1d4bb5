/* The rows of the trap table. */
#ifndef ROWS_H
#define ROWS_H

#include "machine.h"

struct row {
    const char *name;
    void (*once)(void);
    const char *(*prepare)(void); /* says why the row cannot be had here, or 0 */
    void (*restore)(void);
    u64 asked_ns;                 /* of its time, so much it asked for */
    u64 calls;                    /* in a part; 0: as many as fill its time */
    u64 (*parts)(void);           /* so many at most, where calls are given: for what can be done once only */
};

extern volatile u64 lost; /* interrupts that a row sent and that did not come at once: its figures mean nothing then */
extern const struct row rows[]; /* the last has no name */
void rows_init(void);

#endif
