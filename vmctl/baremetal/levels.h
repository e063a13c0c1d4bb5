/* What the rows and the sheet of an instance have in common. */
#ifndef LEVELS_H
#define LEVELS_H

enum { MOST_PARTS = 1000, FLOP = 32, STEPS = 64 };

unsigned long now_ns(void);
unsigned long timed(void (*work)(unsigned long), unsigned long calls);
unsigned long calls_for(void (*work)(unsigned long), unsigned long part_ns);

void floating(unsigned long calls);   /* FLOP operations each, in double precision */
void chase(unsigned long calls);      /* STEPS reads each, every one at an address that the one before has read */
const char *make_chain(void);         /* before it; returns why not, or 0 */

void fill_sheet(const char *folder);  /* of a file system to measure the disk by */

#endif
