/* What a level of virtualization makes of ordinary work: one static program of Linux's, run as a process, as the first
   process of a container, by qemu-user, and as the first process of a guest.

   levels [rounds=N] [parts=N] [part=MICROSECONDS] [rows=A,B] [machine=1] [hold=1]   the rows
   levels sheet=FOLDER                                                               what a machine has and does
   levels machine=1 nest=1                                                           what the file /nest says, in a guest

   Says on its output, a line each: "round N", then of each row "row NAME", "units N" (in each part), "waited NS", "ns T T
   T …" (what each part took) or "skip REASON". Each round is a process of its own. */
#define _GNU_SOURCE
#include "levels.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

unsigned long now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000UL + t.tv_nsec;
}

/* --- the rows: work(n) does n times what has so many units -------------------------------------------------- */

static volatile unsigned long sink; /* results go here, or the compiler would leave the work out */

/* Ten operations on integers a turn: a generator of Marsaglia's, and a multiplication that needs its result. */
static void integer(unsigned long n) {
    unsigned long x = 88172645463325252UL, y = 1, z = 0;
    while (n--) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        y = y * 6364136223846793005UL + x;
        z += y >> 33;
    }
    sink = z;
}

/* Eight sums in pairs of doubles, none of which waits for another: what SSE2 can do, which every x86-64 has. */
typedef double Pair __attribute__((vector_size(16)));
void floating(unsigned long n) {
    Pair a = {1, 2}, b = a, c = a, d = a, e = a, f = a, g = a, h = a;
    const Pair factor = {0.999999, 0.999998}, term = {1e-6, 2e-6};
    while (n--) {
        a = a * factor + term, b = b * factor + term, c = c * factor + term, d = d * factor + term;
        e = e * factor + term, f = f * factor + term, g = g * factor + term, h = h * factor + term;
    }
    a = a + b + c + d + e + f + g + h;
    sink = (unsigned long)(a[0] + a[1]);
}

enum { BUFFER = 16 << 20, SLICE = 256 << 10, CACHE_LINE = 64 };
static Pair *from, *to;
static const char *map_buffers(void) {
    from = mmap(0, 2 * BUFFER, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (from == MAP_FAILED)
        return "there is no memory for it";
    to = from + BUFFER / sizeof *from;
    memset(from, 1, 2 * BUFFER);
    return 0;
}
static void unmap_buffers(void) {
    munmap(from, 2 * BUFFER);
}

/* As STREAM's copy: each byte counts twice, read and written. */
static void bandwidth(unsigned long n) {
    static unsigned long at;
    while (n--) {
        const Pair *source = from + at;
        Pair *target = to + at;
        for (unsigned long i = 0; i < SLICE / sizeof *source; i += 4) {
            target[i] = source[i], target[i + 1] = source[i + 1];
            target[i + 2] = source[i + 2], target[i + 3] = source[i + 3];
        }
        __asm__ volatile("" ::: "memory");
        at = (at + SLICE / sizeof *source) % (BUFFER / sizeof *source);
    }
}

/* One cycle through all lines in random order (Sattolo 1986): each address is known only when the one before was read. */
static void **place;
const char *make_chain(void) {
    const char *why = map_buffers();
    if (why)
        return why;
    unsigned long lines = BUFFER / CACHE_LINE, step = CACHE_LINE / sizeof(void *), x = 88172645463325252UL;
    void **chain = (void **)from;
    unsigned *order = (unsigned *)to;
    for (unsigned long i = 0; i < lines; i++)
        order[i] = i;
    for (unsigned long i = lines - 1; i > 0; i--) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        unsigned long j = x % i;
        unsigned other = order[i];
        order[i] = order[j], order[j] = other;
    }
    for (unsigned long i = 0; i < lines; i++)
        chain[order[i] * step] = &chain[order[(i + 1) % lines] * step];
    place = chain;
    return 0;
}
void chase(unsigned long n) {
    void **p = place;
    while (n--)
        for (int i = 0; i < 64; i++)
            p = *p;
    place = p;
    sink = (unsigned long)p;
}

static void system_call(unsigned long n) {
    while (n--)
        syscall(SYS_getppid);
}

enum { PAGES = 64, PAGE = 4096 };
static char *pages;
static const char *map_pages(void) {
    pages = mmap(0, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED)
        return "there is no memory for it";
    madvise(pages, PAGES * PAGE, MADV_NOHUGEPAGE); /* a huge one would be one fault for all of them */
    return 0;
}
static void unmap_pages(void) {
    munmap(pages, PAGES * PAGE);
}
static void page_fault(unsigned long n) {
    while (n--) {
        madvise(pages, PAGES * PAGE, MADV_DONTNEED);
        for (int i = 0; i < PAGES; i++)
            ((volatile char *)pages)[i * PAGE] = 1;
    }
}

/* Two processes that share one CPU and pass a byte to and fro: each must be switched to before it can answer. */
static int there[2], back[2];
static pid_t partner;
static cpu_set_t cpus_before;
static const char *start_partner(void (*serve)(void)) {
    if (pipe(there) || pipe(back))
        return "there is no pipe";
    partner = fork();
    if (partner < 0)
        return "there is no second process";
    if (partner == 0) {
        close(there[1]), close(back[0]);
        serve();
        _exit(0);
    }
    close(there[0]), close(back[1]);
    return 0;
}
static void end_partner(void) {
    close(there[1]), close(back[0]);
    waitpid(partner, 0, 0);
    sched_setaffinity(0, sizeof cpus_before, &cpus_before);
}
static void answer(void) {
    char byte;
    while (read(there[0], &byte, 1) == 1)
        if (write(back[1], &byte, 1) != 1)
            break;
}
static const char *start_answering(void) {
    cpu_set_t one;
    int cpu = sched_getcpu();
    CPU_ZERO(&one);
    CPU_SET(cpu < 0 ? 0 : cpu, &one);
    if (sched_getaffinity(0, sizeof cpus_before, &cpus_before) || sched_setaffinity(0, sizeof one, &one))
        return "a process cannot be kept on one CPU";
    return start_partner(answer);
}
static void context_switch(unsigned long n) {
    char byte = 0;
    while (n--)
        if (write(there[1], &byte, 1) != 1 || read(back[0], &byte, 1) != 1)
            _exit(1);
}

enum { PIECE = 64 << 10 };
static char piece[PIECE];
static void drain(void) {
    static char taken[PIECE];
    while (read(there[0], taken, PIECE) > 0)
        ;
}
static const char *start_draining(void) {
    sched_getaffinity(0, sizeof cpus_before, &cpus_before);
    return start_partner(drain);
}
static void through_pipe(unsigned long n) {
    while (n--)
        for (long done = 0, wrote; done < PIECE; done += wrote)
            if ((wrote = write(there[1], piece + done, PIECE - done)) <= 0)
                _exit(1);
}

/* Files on a tmpfs, so that the kernel is measured and not a disk. */
static char file_name[64];
static void when_asked_to_end(int how) { /* not while there is a file */
    sigset_t asked;
    sigemptyset(&asked);
    sigaddset(&asked, SIGINT), sigaddset(&asked, SIGTERM), sigaddset(&asked, SIGHUP);
    sigprocmask(how, &asked, 0);
}
static void let_end(void) {
    when_asked_to_end(SIG_UNBLOCK);
}
static const char *find_tmpfs(void) {
    const char *folders[] = {"/dev/shm", "/tmp", "/run", "/dev"};
    for (unsigned i = 0; i < sizeof folders / sizeof *folders; i++) {
        struct statfs found;
        if (!statfs(folders[i], &found) && found.f_type == 0x01021994 && !access(folders[i], W_OK)) {
            snprintf(file_name, sizeof file_name, "%s/vmctl-levels-%d", folders[i], getpid());
            when_asked_to_end(SIG_BLOCK);
            return 0;
        }
    }
    return "there is no tmpfs to make files in";
}
static void file_create(unsigned long n) {
    while (n--) {
        int file = open(file_name, O_CREAT | O_EXCL | O_WRONLY, 0600);
        if (file < 0)
            _exit(1);
        close(file);
        unlink(file_name);
    }
}

static const struct Row {
    const char *name;
    unsigned long units; /* of one call */
    void (*work)(unsigned long calls);
    const char *(*prepare)(void); /* returns why it cannot be, or 0 */
    void (*clear)(void);
} ROWS[] = {
    {"integer", 10, integer, 0, 0},
    {"float", FLOP, floating, 0, 0},
    {"memory_bandwidth", 2 * SLICE, bandwidth, map_buffers, unmap_buffers},
    {"memory_latency", STEPS, chase, make_chain, unmap_buffers},
    {"syscall", 1, system_call, 0, 0},
    {"page_fault", PAGES, page_fault, map_pages, unmap_pages},
    {"context_switch", 2, context_switch, start_answering, end_partner},
    {"pipe", PIECE, through_pipe, start_draining, end_partner},
    {"file_create", 1, file_create, find_tmpfs, let_end},
};

/* --- measuring -------------------------------------------------------------------------------------------------- */

unsigned long timed(void (*work)(unsigned long), unsigned long calls) {
    unsigned long began = now_ns();
    work(calls);
    return now_ns() - began;
}

/* Calls that take so long: doubled until the quickest of three looks does, and what that took is thrown away. One look
   may have been long for another reason: code that was translated for the first time, a neighbour who had the CPU. */
unsigned long calls_for(void (*work)(unsigned long), unsigned long part_ns) {
    for (unsigned long calls = 1;; calls *= 2) {
        int long_enough = 1;
        for (int look = 0; look < 3 && long_enough; look++)
            long_enough = timed(work, calls) >= part_ns;
        if (long_enough || calls >= 1UL << 40)
            return calls;
    }
}

/* For how long this process was ready and had no CPU, as far as the kernel counts that; that of the host it knows not. */
static unsigned long waited_ns(void) {
    unsigned long ran = 0, waited = 0;
    FILE *file = fopen("/proc/self/schedstat", "r");
    if (file) {
        if (fscanf(file, "%lu %lu", &ran, &waited) != 2)
            waited = 0;
        fclose(file);
    }
    return waited;
}

static void measure(const struct Row *row, unsigned long parts, unsigned long part_ns) {
    printf("row %s\n", row->name);
    const char *why = row->prepare ? row->prepare() : 0;
    if (why) {
        printf("skip %s\n", why);
        return;
    }
    unsigned long calls = calls_for(row->work, part_ns), took[MOST_PARTS], before = waited_ns();
    for (unsigned long i = 0; i < parts; i++)
        took[i] = timed(row->work, calls);
    printf("units %lu\n", calls * row->units);
    if (row->clear != end_partner) /* which must wait for each other */
        printf("waited %lu\n", waited_ns() - before);
    printf("ns");
    for (unsigned long i = 0; i < parts; i++)
        printf(" %lu", took[i]);
    printf("\n");
    if (row->clear)
        row->clear();
}

static int wanted(const char *rows, const char *name) {
    size_t length = strlen(name);
    for (const char *at = rows; *at; at += strcspn(at, ","), at += *at == ',')
        if (!strncmp(at, name, length) && (at[length] == ',' || !at[length]))
            return 1;
    return !*rows;
}

static void all_rows(const char *rows, unsigned long parts, unsigned long part_us) {
    for (unsigned i = 0; i < sizeof ROWS / sizeof *ROWS; i++)
        if (wanted(rows, ROWS[i].name))
            measure(&ROWS[i], parts, part_us * 1000);
}

/* --- as the first process of a machine ---------------------------------------------------------------------- */

static void furnish(void) {
    mkdir("/proc", 0755), mkdir("/sys", 0755), mkdir("/dev", 0755), mkdir("/tmp", 0755);
    mount("proc", "/proc", "proc", 0, 0);
    mount("sysfs", "/sys", "sysfs", 0, 0);
    mount("devtmpfs", "/dev", "devtmpfs", 0, 0);
    mount("tmpfs", "/tmp", "tmpfs", 0, 0);
}

/* Run the command that the file /nest has, one word a line: a QEMU with a guest of its own. */
static void run_nested(void) {
    static char text[8192];
    char *argv[100] = {0}, *rest = text;
    int file = open("/nest", O_RDONLY), count = 0;
    if (file < 0 || read(file, text, sizeof text - 1) <= 0) {
        printf("wrong there is nothing to run in it\n");
        return;
    }
    for (char *word; count < 99 && (word = strsep(&rest, "\n"));)
        if (*word)
            argv[count++] = word;
    pid_t child = fork();
    if (child == 0) {
        execv(argv[0], argv);
        printf("wrong the inner QEMU cannot be run: %s\n", strerror(errno));
        _exit(1);
    }
    int status = 0;
    waitpid(child, &status, 0);
    printf("wrong the inner QEMU ended with %d\n", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
}

static unsigned long number(const char *text, unsigned long least, unsigned long most) {
    unsigned long value = strtoul(text, 0, 10);
    return value < least ? least : value > most ? most : value;
}

int main(int argc, char **argv) {
    unsigned long rounds = 1, parts = 20, part_us = 5000;
    const char *rows = "", *sheet = 0;
    int machine = 0, hold = 0, nest = 0;
    setvbuf(stdout, 0, _IOLBF, 0);
    for (int i = 1; i < argc; i++) {
        const char *word = argv[i];
        if (!strncmp(word, "rounds=", 7))
            rounds = number(word + 7, 1, 1000);
        else if (!strncmp(word, "parts=", 6))
            parts = number(word + 6, 1, MOST_PARTS);
        else if (!strncmp(word, "part=", 5))
            part_us = number(word + 5, 1, 10000000);
        else if (!strncmp(word, "rows=", 5))
            rows = word + 5;
        else if (!strncmp(word, "sheet=", 6))
            sheet = word + 6;
        else if (!strcmp(word, "machine=1"))
            machine = 1;
        else if (!strcmp(word, "hold=1"))
            hold = 1;
        else if (!strcmp(word, "nest=1"))
            nest = 1;
    }
    if (machine)
        furnish();
    if (nest) {
        run_nested();
    } else {
        printf("vmctl-levels 1\n");
        if (sheet)
            fill_sheet(sheet);
        for (unsigned long round = 1; !sheet && round <= rounds; round++) {
            printf("round %lu\n", round);
            fflush(stdout);
            pid_t child = fork();
            if (child == 0) {
                prctl(PR_SET_PDEATHSIG, SIGTERM);
                all_rows(rows, parts, part_us);
                fflush(stdout);
                _exit(0);
            }
            int status = 0;
            waitpid(child, &status, 0);
            if (status)
                printf("wrong it ended with %d\n", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
        }
        printf("done\n");
    }
    fflush(stdout);
    char byte; /* whoever ends takes his last words with him: not before they were heard */
    while (hold && read(0, &byte, 1) == 1 && byte != 'q')
        ;
    if (machine)
        reboot(RB_POWER_OFF);
    return 0;
}
