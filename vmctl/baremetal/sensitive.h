/* Instructions to be tried at CPL 0 and at CPL 3. */
#ifndef SENSITIVE_H
#define SENSITIVE_H

#include "machine.h"

struct attempt {
    const char *name;
    void (*once)(void);
    const char *(*prepare)(void); /* at CPL 0, before each try; says why it cannot be had here, or 0 */
    void (*restore)(void);
};

extern const struct attempt attempts[]; /* the last has no name */
extern volatile u64 value;              /* what the last one found out */
extern volatile u64 scratch[2];

#endif
