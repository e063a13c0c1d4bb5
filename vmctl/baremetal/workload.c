/* Innocuous work: primes by a sieve, numbers sorted, products and quotients, flags, bits; all of it goes into a digest. */
#include "workload.h"

enum { SIEVE = 2048, NUMBERS = 128 };

static unsigned long digest;

static void mix(unsigned long value) { digest = (digest ^ value) * 0x100000001b3UL + (digest >> 29); }

static void primes(void) {
    static unsigned char composite[SIEVE];
    for (int i = 0; i < SIEVE; i++)
        composite[i] = 0;
    for (int i = 2; i < SIEVE; i++) {
        if (composite[i])
            continue;
        mix(i);
        for (int k = i * i; k < SIEVE; k += i)
            composite[k] = 1;
    }
}

static void sorting(unsigned long seed) {
    static unsigned long numbers[NUMBERS];
    for (int i = 0; i < NUMBERS; i++)
        numbers[i] = seed = seed * 6364136223846793005UL + 1442695040888963407UL;
    for (int i = 1; i < NUMBERS; i++) {
        unsigned long one = numbers[i];
        int at = i;
        for (; at && numbers[at - 1] > one; at--)
            numbers[at] = numbers[at - 1];
        numbers[at] = one;
    }
    for (int i = 0; i < NUMBERS; i++)
        mix(numbers[i]);
}

/* Instructions whose results depend on the CPU's own wiring: flags, carries, wide products, shifts by more than 63. */
static void wiring(unsigned long seed) {
    for (unsigned long i = 1; i <= 64; i++) {
        unsigned long a = seed * i, b = seed ^ (i << 40 | 1), flags;
        __asm__("mul %1" : "+a"(a), "+d"(b)::"cc");
        mix(a ^ b);
        __asm__("xor %%edx, %%edx; div %1" : "+a"(a) : "r"(i) : "rdx", "cc");
        mix(a);
        __asm__("add %2, %0; adc $0, %0; lahf; movzbl %%ah, %%eax" : "+r"(b), "=a"(flags) : "r"(a) : "cc");
        mix(b ^ (flags & 0xd5));
        __asm__("mov %%ebx, %%ecx; rol %%cl, %0; bsf %0, %%rcx; bswap %0; add %%rcx, %0" : "+r"(a) : "b"(i * 3) : "rcx", "cc");
        mix(a);
    }
}

unsigned long workload(unsigned long rounds, void (*between)(void)) {
    digest = 0xcbf29ce484222325UL;
    for (unsigned long round = 1; round <= rounds; round++) {
        primes();
        sorting(round);
        wiring(round * 0x9e3779b97f4a7c15UL | 1);
        if (between)
            between();
    }
    return digest;
}
