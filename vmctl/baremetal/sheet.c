/* The numerical sheet of an instance: what it has, and what of it one gets. A line each: "has NAME NUMBER",
   "row NAME" with "units N" and "ns T T T …" as the levels have them, or "skip REASON". */
#define _GNU_SOURCE
#include "levels.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <sys/sysinfo.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PARTS = 20, PART_NS = 20000000, LATENCIES = 500 };
static const unsigned long BLOCK = 1 << 20, SMALL = 4096, MOST_BYTES = 64UL << 20, LONGEST_NS = 3000000000UL;

static void say(const char *name, unsigned long units, const unsigned long *ns, int count) {
    printf("row %s\nunits %lu\nns", name, units);
    for (int i = 0; i < count; i++)
        printf(" %lu", ns[i] ? ns[i] : 1);
    printf("\n");
}

/* All cores at once, as many processes: each part counts once for every core, or a throttled machine would look quick. */
static void all_cores(int cores) {
    unsigned long calls = calls_for(floating, PART_NS), took[PARTS];
    for (int part = 0; part < PARTS; part++) {
        unsigned long began = now_ns();
        for (int core = 0; core < cores; core++)
            if (fork() == 0) {
                floating(calls);
                _exit(0);
            }
        while (wait(0) > 0)
            ;
        took[part] = now_ns() - began;
    }
    say("cpu", calls * FLOP * cores, took, PARTS);
}

static void memory(void) {
    const char *why = make_chain();
    if (why) {
        printf("row ram\nskip %s\n", why);
        return;
    }
    unsigned long calls = calls_for(chase, PART_NS), took[PARTS];
    for (int part = 0; part < PARTS; part++)
        took[part] = timed(chase, calls);
    say("ram", calls * STEPS, took, PARTS);
}

/* Past the page cache, and no longer than some seconds; returns the bytes that were written. */
static unsigned long stream(const char *name, int file, char *block, unsigned long bytes, int writing) {
    unsigned long took[256], began = now_ns(), count = 0;
    errno = 0; /* a call that moved less than it was told sets none */
    for (; count < bytes / BLOCK && count < 256 && now_ns() - began < LONGEST_NS; count++) {
        unsigned long start = now_ns();
        long moved = writing ? pwrite(file, block, BLOCK, count * BLOCK) : pread(file, block, BLOCK, count * BLOCK);
        if (moved != (long)BLOCK || (writing && fdatasync(file)))
            break;
        took[count] = now_ns() - start;
    }
    if (count)
        say(name, BLOCK, took, count);
    else
        printf("row %s\nskip %s\n", name,
               bytes < BLOCK ? "there is no room for it" : errno ? strerror(errno) : "it was cut short");
    return count * BLOCK;
}

static void disk(const char *folder) {
    char path[4096];
    snprintf(path, sizeof path, "%s/vmctl-sheet-%d", folder, getpid());
    int file = open(path, O_CREAT | O_EXCL | O_RDWR | O_DIRECT, 0600);
    char *block = 0;
    if (file < 0 || posix_memalign((void **)&block, SMALL, BLOCK)) {
        const char *why = strerror(errno), *rows[] = {"disk_write", "disk_read", "disk_latency"};
        for (int row = 0; row < 3; row++)
            printf("row %s\nskip no file past the page cache in %s: %s\n", rows[row], folder, why);
        if (file >= 0)
            close(file);
        unlink(path);
        return;
    }
    unlink(path); /* gone with this process, however that ends */
    memset(block, 0x5a, BLOCK);
    struct statvfs room;
    unsigned long bytes = fstatvfs(file, &room) ? 0 : room.f_bavail * room.f_frsize / 4;
    bytes = stream("disk_write", file, block, bytes < MOST_BYTES ? bytes : MOST_BYTES, 1);
    if (!bytes) {
        printf("row disk_read\nskip nothing was written\nrow disk_latency\nskip nothing was written\n");
        close(file);
        return;
    }
    stream("disk_read", file, block, bytes, 0);
    unsigned long took[LATENCIES], x = 88172645463325252UL, began = now_ns();
    int count = 0;
    for (; count < LATENCIES && now_ns() - began < LONGEST_NS; count++) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        unsigned long start = now_ns();
        if (pread(file, block, SMALL, x % (bytes / SMALL) * SMALL) != (long)SMALL)
            break;
        took[count] = now_ns() - start;
    }
    if (count)
        say("disk_latency", 1, took, count);
    else
        printf("row disk_latency\nskip %s\n", strerror(errno));
    close(file);
}

void fill_sheet(const char *folder) {
    cpu_set_t mine;
    struct sysinfo info;
    struct statvfs room;
    int cores = sched_getaffinity(0, sizeof mine, &mine) ? 1 : CPU_COUNT(&mine);
    printf("has cores %d\n", cores);
    if (!sysinfo(&info))
        printf("has ram_bytes %lu\nhas uptime_s %lu\n", info.totalram * info.mem_unit, (unsigned long)info.uptime);
    if (!statvfs(folder, &room))
        printf("has disk_bytes %lu\n", (unsigned long)(room.f_blocks * room.f_frsize));
    fflush(stdout); /* or each child would say it again */
    all_cores(cores);
    memory();
    disk(folder);
}
