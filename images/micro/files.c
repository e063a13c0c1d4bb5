/* files.c - small file helpers and the log. */
#define _GNU_SOURCE
#include "micro.h"

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* One line on the serial console. A single write, so that lines of parallel processes never mix.
 * Weak: another program that uses this file may say it elsewhere. */
__attribute__((weak)) void say(const char *format, ...)
{
    char line[256] = "vmctl-micro: ";
    size_t used = strlen(line);
    va_list arguments;
    va_start(arguments, format);
    int wrote = vsnprintf(line + used, sizeof line - used - 1, format, arguments);
    va_end(arguments);
    used += wrote < 0 ? 0 : (size_t)wrote;
    if (used > sizeof line - 2)
        used = sizeof line - 2;
    line[used++] = '\n';
    /* Opened each time: whoever holds the console open would keep it from being hung up after a session. */
    int fd = open("/dev/console", O_WRONLY | O_NOCTTY | O_CLOEXEC);
    if (fd >= 0) {
        if (write(fd, line, used) < 0) { /* there is nowhere left to say so */
        }
        close(fd);
    }
}

/* The file's content with a NUL behind it, or NULL. */
char *read_file(const char *path, size_t *length)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return NULL;
    size_t room = 4096, used = 0;
    char *data = malloc(room + 1);
    ssize_t got;
    while (data && (got = read(fd, data + used, room - used)) > 0) {
        used += (size_t)got;
        if (used == room)
            data = realloc(data, (room *= 2) + 1);
    }
    close(fd);
    if (!data)
        return NULL;
    data[used] = 0;
    if (length)
        *length = used;
    return data;
}

/* Replace the file in one step, so that a power cut leaves the old or the new one; leave an equal one alone. */
bool write_file(const char *path, const void *data, size_t length, mode_t mode)
{
    size_t present_length;
    char *present = read_file(path, &present_length);
    bool same = present && present_length == length && memcmp(present, data, length) == 0;
    free(present);
    if (same)
        return true;
    char temporary[256];
    snprintf(temporary, sizeof temporary, "%s.new", path);
    unlink(temporary);
    int fd = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
    if (fd < 0)
        return false;
    bool good = fchmod(fd, mode) == 0 && write(fd, data, length) == (ssize_t)length;
    close(fd);
    if (good && rename(temporary, path) == 0)
        return true;
    unlink(temporary);
    return false;
}

bool write_text(const char *path, const char *text, mode_t mode)
{
    return write_file(path, text, strlen(text), mode);
}

/* All that was written to the root so far is on its disk when this returns true: no power cut takes it away again. */
bool settle(void)
{
    int fd = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bool good = fd >= 0 && syncfs(fd) == 0;
    if (fd >= 0)
        close(fd);
    return good;
}

/* A fork whose two sides share root and working folder: when process 1 moves into the real root, its children follow. */
pid_t fork_same_root(void)
{
    return (pid_t)syscall(SYS_clone, SIGCHLD | CLONE_FS, 0, 0, 0, 0);
}

void nap_ms(int milliseconds)
{
    struct timespec time = {milliseconds / 1000, milliseconds % 1000 * 1000000L};
    nanosleep(&time, NULL);
}

long now_ms(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000L + time.tv_nsec / 1000000L;
}
