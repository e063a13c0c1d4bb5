/* Work that any x86-64 does alike, in a guest and in a process: the same code is compiled into both. */
#ifndef WORKLOAD_H
#define WORKLOAD_H

unsigned long workload(unsigned long rounds, void (*between)(void)); /* a digest of all that was computed */

#endif
