/* modules.c - loads kernel modules by file name, in the order given.
 *
 * The image builder has put them into /lib/modules/load in that order, dependencies first, so neither
 * modprobe nor its index is needed during the boot.
 */
#include "micro.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* `list` is a file in /lib/modules/load: one path a line. */
void load_modules(const char *list)
{
    char path[256];
    snprintf(path, sizeof path, "/lib/modules/load/%s", list);
    char *names = read_file(path, NULL);
    if (!names) {
        say("no module list %s", list);
        return;
    }
    char *rest;
    for (char *name = strtok_r(names, "\n", &rest); name; name = strtok_r(NULL, "\n", &rest)) {
        int fd = open(name, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) != 0 && errno != EEXIST))
            say("cannot load %s: %s", name, strerror(errno));
        if (fd >= 0)
            close(fd);
    }
}
