/* init.c - the micro guest from its first instruction in user space to its power-off.
 *
 * The order is made for one number, the time until sshd answers. Two processes run side by side from the
 * start: one loads the network driver and gets an address, the other loads the disk driver, mounts the root,
 * applies the seed and starts sshd. What a command in the guest relies on (all mounts, the identity, a root as large as
 * its disk) is there before sshd listens; whatever nobody waits for (agent, power button, random numbers) begins then, at
 * low priority.
 *
 * The process that was /init of the initramfs stays process 1: it moves the root under itself instead of
 * executing another init. See micro.h for the other parts.
 */
#define _GNU_SOURCE
#include "micro.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/input.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define AGENT_PORT "/dev/virtio-ports/org.qemu.guest_agent.0"
#define RENEWAL_PORT "/dev/virtio-ports/vmctl.renewal"
#define HOST_KEY "/etc/dropbear/dropbear_ed25519_host_key"
#define NEXT_KEY "/run/vmctl/next-sshd.key"

/* --- services: restarted when they end, a second later when they end at once -------------------- */

struct service {
    const char *name, *program;
    const char *const *command;
    bool wanted, ended_at_once;
    pid_t pid;
    long started_ms, restart_ms;
};

/* dropbear executes itself anew for each connection, for fresh address randomisation, if it can open the file its
 * argv[0] names. A bare name in /root, which has no such file, makes it fork instead: 70 ms less before each banner. */
static const char *const sshd_command[] = {
    "dropbear", "-F", "-s", "-r", HOST_KEY, "-P", "", "-K", "60", NULL};
static const char *const agent_command[] = {"qemu-ga", "-m", "virtio-serial", "-p", AGENT_PORT, "-t", "/run", NULL};
static const char *const renewal_command[] = {"vmctl-renew", RENEWAL_PORT, NULL};
/* The next sshd, for the case that a fork ends the present one: it has done all it can do without its key, which it waits for
 * at a pipe. To start a program takes a fork 100 ms. */
static const char *const next_command[] = {"dropbear", "-F", "-s", "-r", NEXT_KEY, "-P", "", "-K", "60", NULL};
static const char *const shell_command[] = {"-sh", NULL};

static struct service services[] = {
    {.name = "sshd", .program = "/usr/sbin/dropbear", .command = sshd_command},
    {.name = "agent", .program = "/usr/sbin/qemu-ga", .command = agent_command},
    {.name = "next sshd", .program = "/usr/sbin/dropbear", .command = next_command},
    {.name = "renewal", .program = "/usr/sbin/vmctl-renew", .command = renewal_command},
    {.name = "console", .program = "/bin/sh", .command = shell_command},
    {.name = "screen", .program = "/bin/sh", .command = shell_command},
};
enum { SSHD, AGENT, NEXT, RENEWAL, CONSOLE, SCREEN, SERVICES };

enum { NEXT_AFTER_MS = 2000 }; /* not in the way of who is waited for */

static sigset_t handled;

static const char *const environment[] = {
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "USER=root", "LOGNAME=root", "SHELL=/bin/sh", NULL};

/* Whether the kernel was told to use the screen: "console=tty0" on its command line. */
static bool has_screen(void)
{
    char *consoles = read_file("/sys/class/tty/console/active", NULL);
    bool found = consoles && strstr(consoles, "tty0");
    free(consoles);
    return found;
}

static void greet(int tty)
{
    char host[65] = "";
    gethostname(host, sizeof host - 1);
    dprintf(tty, "\033[H\033[2Jvmctl-micro %s tty1\r\n\r\npress Enter for a shell\r\n", host);
}

/* A root shell on a console for whoever presses Enter: consoles are the host owner's already. */
static void open_console(const char *path)
{
    setsid();
    int tty = open(path, O_RDWR);
    if (tty < 0) {
        nap_ms(60000); /* a machine without a serial port */
        _exit(1);
    }
    if (strcmp(path, "/dev/tty1") == 0)
        greet(tty);
    ioctl(tty, TIOCSCTTY, 1);
    for (int fd = 0; fd < 3; fd++)
        dup2(tty, fd);
    char key;
    while (read(tty, &key, 1) == 1 && key != '\n' && key != '\r')
        ;
}

static void note_next(void)
{
    char number[16];
    snprintf(number, sizeof number, "%d\n", services[NEXT].pid);
    write_text(NEXT_SSHD, number, 0644);
}

static void start(struct service *service)
{
    service->started_ms = now_ms();
    service->restart_ms = 0;
    service->pid = fork();
    if (service->pid != 0) {
        if (service == &services[NEXT])
            note_next();
        return;
    }
    sigprocmask(SIG_UNBLOCK, &handled, NULL);
    if (service->command == shell_command) {
        bool screen = service == &services[SCREEN];
        open_console(screen ? "/dev/tty1" : "/dev/ttyS0");
        setenv("TERM", screen ? "linux" : "vt220", 1);
    } else {
        setsid();
    }
    if (chdir("/root") != 0) { /* then / will do */
    }
    execv(service->program, (char *const *)service->command);
    say("%s: %s", service->name, strerror(errno));
    _exit(127);
}

/* The sshd that waits for its key becomes the one there is. False when there is none, or it has not come that far. */
static bool promote_next(void)
{
    struct service *sshd = &services[SSHD], *next = &services[NEXT];
    size_t length = 0;
    char *key = next->pid ? read_file(HOST_KEY, &length) : NULL;
    int fd = key ? open(NEXT_KEY, O_WRONLY | O_NONBLOCK | O_CLOEXEC) : -1;
    bool good = fd >= 0 && write(fd, key, length) == (ssize_t)length;
    if (fd >= 0)
        close(fd);
    free(key);
    if (!good)
        return false;
    unlink(NEXT_SSHD);
    sshd->pid = next->pid;
    sshd->started_ms = now_ms();
    next->pid = 0;
    next->restart_ms = sshd->started_ms + NEXT_AFTER_MS;
    return true;
}

static void ended(struct service *service, int status)
{
    if (service == &services[SSHD] && promote_next())
        return;
    /* One that ends at once, again and again, is given time. Once may be a fork's: it ends an sshd that has just begun. */
    bool before = service->ended_at_once;
    service->ended_at_once = now_ms() - service->started_ms < 1000;
    service->pid = 0;
    if (service->command != shell_command)
        say("%s ended with status %d", service->name, WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
    service->restart_ms = now_ms() + (before && service->ended_at_once ? 1000 : 0);
}

/* --- power -------------------------------------------------------------------------------------- */

static void end_processes(void)
{
    kill(-1, SIGTERM);
    for (int waited = 0; waited < 500; waited += 10) { /* the network children and a shell may ignore it */
        while (waitpid(-1, NULL, WNOHANG) > 0)
            ;
        if (waitpid(-1, NULL, WNOHANG) < 0 && errno == ECHILD)
            break;
        nap_ms(10);
    }
    kill(-1, SIGKILL);
    while (waitpid(-1, NULL, WNOHANG) > 0)
        ;
}

static void __attribute__((noreturn)) power(int how, const char *word)
{
    say("%s", word);
    end_processes();
    sync();
    /* Read-only is as good as unmounted: the journal is closed, and process 1 cannot leave its own root. */
    mount(NULL, "/", NULL, MS_REMOUNT | MS_RDONLY, NULL);
    reboot(how);
    for (;;)
        pause();
}

/* /sbin/shutdown, the only way the guest agent knows to stop a machine; when and why are not looked at. */
static int shutdown_main(int count, char **words)
{
    int signal_number = SIGUSR2;
    for (int i = 1; i < count; i++) {
        if (strcmp(words[i], "-r") == 0)
            signal_number = SIGTERM;
        else if (strcmp(words[i], "-H") == 0 && signal_number != SIGTERM)
            signal_number = SIGUSR1;
    }
    if (kill(1, signal_number) == 0)
        return 0;
    perror("shutdown");
    return 1;
}

/* --- the way to sshd ----------------------------------------------------------------------------- */

static void mount_api_filesystems(void)
{
    mkdir("/proc", 0755);
    mkdir("/sys", 0755);
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NOEXEC | MS_NODEV, NULL);
    mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NOEXEC | MS_NODEV, NULL);
    mount("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, "mode=0755");
}

/* The root becomes / of this process and of all it starts; the initramfs stays below it, emptied. */
static bool enter_root(const char *disk)
{
    /* noinit_itable: or ext4 would write zeros for minutes, into a copy-on-write file, after it has grown */
    if (mount(disk, "/root", "ext4", MS_NOATIME, "noinit_itable") != 0) {
        say("cannot mount %s: %s", disk, strerror(errno));
        return false;
    }
    mount("/dev", "/root/dev", NULL, MS_MOVE, NULL);
    mount("/proc", "/root/proc", NULL, MS_MOVE, NULL);
    mount("/sys", "/root/sys", NULL, MS_MOVE, NULL);
    return chdir("/root") == 0 && mount(".", "/", NULL, MS_MOVE, NULL) == 0 && chroot(".") == 0 && chdir("/") == 0;
}

/* All before sshd: what a command writes to /tmp must not vanish under a file system mounted a moment later. */
static void mount_rest(void)
{
    mount("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755");
    mkdir("/run/vmctl", 0755);
    mkdir("/dev/pts", 0755);
    mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "gid=5,mode=0620,ptmxmode=0666");
    mkdir("/dev/shm", 01777);
    mount("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777");
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777");
    mount("cgroup2", "/sys/fs/cgroup", "cgroup2", MS_NOSUID | MS_NOEXEC | MS_NODEV, NULL);
    symlink("/proc/self/fd", "/dev/fd");
    symlink("/proc/self/fd/0", "/dev/stdin");
    symlink("/proc/self/fd/1", "/dev/stdout");
    symlink("/proc/self/fd/2", "/dev/stderr");
}

static void find_root(char *disk, size_t room)
{
    for (int tries = 0; !seed_find_disks(disk, room); tries++) {
        if (tries == 500) {
            say("no disk with a file system labelled " ROOT_LABEL);
            for (;;)
                pause();
        }
        nap_ms(10);
    }
}

/* --- what comes after ---------------------------------------------------------------------------- */

static bool raised(int event, int timeout_ms)
{
    struct pollfd ready = {event, POLLIN, 0};
    return poll(&ready, 1, timeout_ms) > 0;
}

/* A link /dev/virtio-ports/NAME for each port, as udev makes them. */
static void name_virtio_ports(void)
{
    mkdir("/dev/virtio-ports", 0755);
    DIR *ports = opendir("/sys/class/virtio-ports");
    for (struct dirent *port; ports && (port = readdir(ports));) {
        char path[300], target[300], link[300];
        snprintf(path, sizeof path, "/sys/class/virtio-ports/%.200s/name", port->d_name);
        char *name = read_file(path, NULL);
        if (!name)
            continue;
        name[strcspn(name, "\n/")] = 0;
        snprintf(target, sizeof target, "/dev/%.200s", port->d_name);
        snprintf(link, sizeof link, "/dev/virtio-ports/%.200s", name);
        if (*name)
            symlink(target, link);
        free(name);
    }
    if (ports)
        closedir(ports);
}

/* What `vmctl share` wrote into fstab. Returns the process that mounts it, -1 without any. */
static pid_t mount_shares(void)
{
    char *table = read_file("/etc/fstab", NULL);
    bool any = table && strstr(table, " virtiofs ");
    free(table);
    pid_t pid = any ? fork() : -1;
    if (pid == 0) {
        execl("/bin/mount", "mount", "-a", "-t", "virtiofs", (char *)NULL);
        _exit(127);
    }
    return pid;
}

/* For its end, but not for ever: a guest that can be reached without it is better than one that cannot. */
static void await(pid_t pid)
{
    for (int waited = 0; pid > 0 && waited < 10000 && waitpid(pid, NULL, WNOHANG) == 0; waited += 2)
        nap_ms(2);
}

/* Waits for sshd and network, then for the drivers nobody was waiting for. A child of process 1; its end is the sign. */
static void late_main(int network_up)
{
    setpriority(PRIO_PROCESS, 0, 10);
    for (int waited = 0; waited < 3000 && !listening(22); waited += 5)
        nap_ms(5);
    say(listening(22) ? "sshd ready" : "sshd does not listen");
    raised(network_up, 2000); /* an absent network must not keep the power button dead for long */
    load_modules("late");
    name_virtio_ports();
}

/* Returns the process that lets the root fill its disk, 0 when it does already. */
static pid_t grow_root(const char *disk)
{
    uint64_t bytes = 0;
    uint8_t super[0x154];
    int fd = open(disk, O_RDONLY | O_CLOEXEC);
    bool known = fd >= 0 && ioctl(fd, _IOR(0x12, 114, size_t), &bytes) == 0 &&
                 pread(fd, super, sizeof super, 1024) == sizeof super;
    if (fd >= 0)
        close(fd);
    if (!known)
        return 0;
    uint32_t blocks;
    memcpy(&blocks, super + 4, 4);
    uint64_t size = (uint64_t)blocks << (10 + super[0x18]);
    if (bytes < size + (1 << 20))
        return 0;
    pid_t pid = fork();
    if (pid != 0)
        return pid;
    int log = open("/var/log/resize2fs.log", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    dup2(log, 1);
    dup2(log, 2);
    execl("/usr/sbin/resize2fs", "resize2fs", disk, (char *)NULL);
    _exit(127);
}

static void run_commands(int network_up)
{
    if (fork() != 0)
        return;
    sigprocmask(SIG_UNBLOCK, &handled, NULL);
    setsid();
    int null = open("/dev/null", O_RDWR);
    for (int fd = 0; fd < 3; fd++)
        dup2(null, fd);
    if (chdir("/root") != 0) { /* then / will do */
    }
    seed_run_commands(raised(network_up, 30000));
    _exit(0);
}

/* --- process 1 ------------------------------------------------------------------------------------ */

enum { MAX_BUTTONS = 8 };
static struct pollfd watched[1 + MAX_BUTTONS];
static nfds_t watching = 1;

static void open_buttons(void)
{
    for (int i = 0; i < 32 && watching < 1 + MAX_BUTTONS; i++) {
        char path[32];
        unsigned long keys[KEY_MAX / (8 * sizeof(long)) + 1] = {0};
        snprintf(path, sizeof path, "/dev/input/event%d", i);
        int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
        if (fd < 0)
            continue;
        bool power_key = ioctl(fd, EVIOCGBIT(EV_KEY, sizeof keys), keys) >= 0 &&
                         keys[KEY_POWER / (8 * sizeof(long))] >> (KEY_POWER % (8 * sizeof(long))) & 1;
        if (power_key)
            watched[watching++] = (struct pollfd){fd, POLLIN, 0};
        else
            close(fd);
    }
}

static bool power_pressed(int fd)
{
    struct input_event event;
    bool pressed = false;
    while (read(fd, &event, sizeof event) == sizeof event)
        pressed |= event.type == EV_KEY && event.code == KEY_POWER && event.value == 1;
    return pressed;
}

static void obey(uint32_t signal_number)
{
    switch (signal_number) { /* busybox's poweroff, halt and reboot send these */
    case SIGUSR2:
        power(RB_POWER_OFF, "powering off");
    case SIGUSR1:
        power(RB_HALT_SYSTEM, "halting");
    case SIGTERM:
    case SIGINT:
        power(RB_AUTOBOOT, "rebooting");
    }
}

static void late_is_done(int network_up)
{
    open_buttons();
    if (access(AGENT_PORT, F_OK) == 0) {
        services[AGENT].wanted = true;
        start(&services[AGENT]);
        say("agent started");
    }
    if (access(RENEWAL_PORT, F_OK) == 0) {
        services[RENEWAL].wanted = true;
        start(&services[RENEWAL]);
        if (mkfifo(NEXT_KEY, 0600) == 0) {
            services[NEXT].wanted = true;
            services[NEXT].restart_ms = now_ms() + NEXT_AFTER_MS;
        }
    }
    services[CONSOLE].wanted = true;
    start(&services[CONSOLE]);
    if (has_screen()) {
        services[SCREEN].wanted = true;
        start(&services[SCREEN]);
    }
    say("press Enter for a shell");
    run_commands(network_up);
}

static void reap(pid_t late, int network_up)
{
    int status;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;) {
        if (pid == late)
            late_is_done(network_up);
        for (int i = 0; i < SERVICES; i++)
            if (pid == services[i].pid)
                ended(&services[i], status);
    }
}

static int restart_due(void)
{
    int timeout_ms = -1;
    for (int i = 0; i < SERVICES; i++) {
        if (!services[i].wanted || services[i].pid)
            continue;
        long left = services[i].restart_ms - now_ms();
        if (left <= 0)
            start(&services[i]);
        else if (timeout_ms < 0 || left < timeout_ms)
            timeout_ms = (int)left;
    }
    return timeout_ms;
}

static void __attribute__((noreturn)) supervise(pid_t late, int network_up)
{
    watched[0] = (struct pollfd){signalfd(-1, &handled, SFD_CLOEXEC | SFD_NONBLOCK), POLLIN, 0};
    for (;;) {
        poll(watched, watching, restart_due());
        struct signalfd_siginfo info;
        while (read(watched[0].fd, &info, sizeof info) == sizeof info)
            obey(info.ssi_signo);
        reap(late, network_up);
        for (nfds_t i = 1; i < watching; i++)
            if (power_pressed(watched[i].fd))
                power(RB_POWER_OFF, "power button");
    }
}

int main(int count, char **words)
{
    const char *called = strrchr(words[0], '/');
    if (strcmp(called ? called + 1 : words[0], "shutdown") == 0)
        return shutdown_main(count, words);
    if (strcmp(called ? called + 1 : words[0], "vmctl-renew") == 0)
        return renew_main(count > 1 ? words[1] : NULL);
    if (getpid() != 1) {
        fprintf(stderr, "init: only process 1 may be this\n");
        return 1;
    }
    mount_api_filesystems();
    say("init");
    sigemptyset(&handled);
    for (const int *one = (const int[]){SIGCHLD, SIGTERM, SIGINT, SIGUSR1, SIGUSR2, 0}; *one; one++)
        sigaddset(&handled, *one);
    sigprocmask(SIG_BLOCK, &handled, NULL);
    reboot(RB_DISABLE_CAD); /* Ctrl-Alt-Del becomes SIGINT: a reboot that closes the file system */
    clearenv();
    for (const char *const *one = environment; *one; one++)
        putenv((char *)*one);
    int seed_ready = eventfd(0, EFD_CLOEXEC), network_up = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

    load_modules("bus");
    if (fork_same_root() == 0) {
        sigprocmask(SIG_UNBLOCK, &handled, NULL);
        net_main("net", seed_ready, network_up);
    }
    load_modules("disk");
    char disk[64];
    find_root(disk, sizeof disk);
    seed_read();
    seed_set_hostname();
    if (!enter_root(disk))
        for (;;)
            pause();
    mount_rest();
    pid_t growing = grow_root(disk), sharing = mount_shares();
    seed_apply_identity();
    eventfd_write(seed_ready, 1);
    seed_apply_keys();
    await(growing);
    await(sharing);
    services[SSHD].wanted = true;
    start(&services[SSHD]);

    pid_t late = fork();
    if (late == 0) {
        late_main(network_up);
        _exit(0);
    }
    supervise(late, network_up);
}
