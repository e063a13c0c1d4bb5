/* init.c - the initramfs of the direct kernel boot: loads the modules named in /load, mounts root=, and goes there.
 *
 * initramfs-tools' own, which the disk has for GRUB, runs udev and fifty shell scripts for the same: seconds under
 * emulation. This one knows what it boots: a kernel that comes with it, on a disk vmctl put there.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define WAIT_MS 30000

static char cmdline[4096];

static void say(const char *what, const char *which)
{
    FILE *log = fopen("/dev/kmsg", "w");
    if (log) {
        fprintf(log, "<3>initramfs: %s %s: %s\n", what, which, strerror(errno));
        fclose(log);
    }
}

/* The value of a word KEY=VALUE of the command line, the last one counting; NULL without one. */
static const char *option(const char *key)
{
    static char value[256];
    size_t length = strlen(key);
    const char *found = NULL;
    for (const char *word = cmdline; *word; word += strcspn(word, " \n"), word += strspn(word, " \n"))
        if (strncmp(word, key, length) == 0 && word[length] == '=')
            found = word + length + 1;
    if (!found)
        return NULL;
    snprintf(value, sizeof value, "%.*s", (int)strcspn(found, " \n"), found);
    return value;
}

static void read_cmdline(void)
{
    int file = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
    ssize_t got = file < 0 ? -1 : read(file, cmdline, sizeof cmdline - 1);
    cmdline[got > 0 ? got : 0] = 0;
    close(file);
}

static void load_modules(void)
{
    char path[256];
    FILE *list = fopen("/load", "re");
    while (list && fgets(path, sizeof path, list)) {
        path[strcspn(path, "\n")] = 0;
        int file = open(path, O_RDONLY | O_CLOEXEC);
        if (file < 0 || syscall(SYS_finit_module, file, "", 0) != 0)
            say("cannot load", path);
        close(file);
        unlink(path); /* or it would stay in memory for ever */
    }
    if (list)
        fclose(list);
}

static int mount_root(const char *root)
{
    for (int waited = 0; waited < WAIT_MS; waited += 2) {
        if (mount(root, "/root", "ext4", 0, "") == 0)
            return 1;
        if (errno != ENOENT && errno != ENXIO)
            break;
        nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL);
    }
    say("cannot mount", root);
    return 0;
}

int main(int count, char **arguments)
{
    (void)count;
    mount("proc", "/proc", "proc", MS_NODEV | MS_NOEXEC | MS_NOSUID, NULL);
    mount("dev", "/dev", "devtmpfs", MS_NOSUID, "mode=0755");
    read_cmdline();
    load_modules();
    const char *root = option("root");
    if (!mount_root(root ? root : "/dev/vda1"))
        return 1; /* the kernel panics, and says so where the user looks */
    umount2("/proc", MNT_DETACH);
    unlink("/load");
    unlink("/init");
    if (mount("/dev", "/root/dev", NULL, MS_MOVE, NULL) != 0 || chdir("/root") != 0 ||
        mount(".", "/", NULL, MS_MOVE, NULL) != 0 || chroot(".") != 0 || chdir("/") != 0) {
        say("cannot go to", "the root");
        return 1;
    }
    const char *init = option("init");
    arguments[0] = (char *)(init ? init : "/sbin/init");
    execv(arguments[0], arguments);
    say("cannot start", arguments[0]);
    return 1;
}
