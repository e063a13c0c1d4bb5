/* sick_disk.c - a disk with bad sectors, for one process: preloaded, it has reads or writes of some files fail.
 *
 * The file $SICK_DISK says which, a line each, and may change at any time:
 *
 *     read|write|close PART-OF-PATH [PART-OF-COMMAND-LINE]
 *
 * What closes one waits until it may. Without the file nothing fails.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static int of_this_process(const char *part)
{
    char words[65536];
    FILE *file = fopen("/proc/self/cmdline", "re");
    size_t got = file ? fread(words, 1, sizeof words - 1, file) : 0;
    if (file)
        fclose(file);
    return memmem(words, got, part, strlen(part)) != NULL;
}

static int sick(int fd, const char *doing)
{
    const char *where = getenv("SICK_DISK");
    char link[64], path[4096], line[4096], what[16], part[2048], whose[1024];
    FILE *rules;
    int found = 0, saved = errno;
    ssize_t length;
    if (!where || access(where, F_OK) != 0 || !(rules = fopen(where, "re"))) {
        errno = saved;
        return 0;
    }
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    length = readlink(link, path, sizeof path - 1);
    path[length > 0 ? length : 0] = 0;
    while (!found && fgets(line, sizeof line, rules)) {
        int count = sscanf(line, "%15s %2047s %1023s", what, part, whose);
        found = count >= 2 && !strcmp(what, doing) && strstr(path, part) && (count < 3 || of_this_process(whose));
    }
    fclose(rules);
    errno = found ? EIO : saved;
    return found;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define AT(name, type, doing)                                                                                          \
    ssize_t name(int fd, type data, size_t count, off_t offset)                                                       \
    {                                                                                                                  \
        return sick(fd, doing) ? -1 : REAL(name)(fd, data, count, offset);                                            \
    }
#define VECTORS(name, doing)                                                                                           \
    ssize_t name(int fd, const struct iovec *data, int count, off_t offset)                                           \
    {                                                                                                                  \
        return sick(fd, doing) ? -1 : REAL(name)(fd, data, count, offset);                                            \
    }

AT(pread, void *, "read")
AT(pread64, void *, "read")
AT(pwrite, const void *, "write")
AT(pwrite64, const void *, "write")
VECTORS(preadv, "read")
VECTORS(preadv64, "read")
VECTORS(pwritev, "write")
VECTORS(pwritev64, "write")

ssize_t read(int fd, void *data, size_t count)
{
    return sick(fd, "read") ? -1 : REAL(read)(fd, data, count);
}

ssize_t write(int fd, const void *data, size_t count)
{
    return sick(fd, "write") ? -1 : REAL(write)(fd, data, count);
}

int close(int fd)
{
    while (sick(fd, "close"))
        usleep(20000);
    return REAL(close)(fd);
}
