/* renew.c - a machine that goes on from another one's memory becomes itself.
 *
 * The host says, a word and its value a line, who it is now; the last is the key of its SSH server:
 *
 *     entropy HEX                     for the kernel's random numbers, which the other machine has too
 *     hostname NAME
 *     machine-id HEX
 *     clock SECONDS.MICROSECONDS      since the epoch
 *     public TYPE KEY
 *     mac OLD NEW
 *     address MAC IP/PREFIX GATEWAY   what the network will give that card, so that nobody has to ask for it first
 *     private
 *     -----BEGIN OPENSSH PRIVATE KEY-----
 *
 * Each is optional: one that was held for a moment is told the time alone. The cable is pulled while this runs. The SSH
 * server's key comes first: where a server has to end for it, that takes the longest.
 *
 * It says so on standard input, or on a virtio-serial port that a process here has been waiting at since the boot: in a
 * guest that goes on under emulation nothing is translated yet, and each program that starts takes 50 ms and more. There
 * what is told begins with the byte 1, which makes void what came before, ends with a NUL, and is answered with a line:
 * "done", or "failed: …".
 */
#define _GNU_SOURCE
#include "micro.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <net/if.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { HASTE_S = 5, BEGIN = 1 };

static char complaints[400];

static void failed(const char *what)
{
    size_t used = strlen(complaints);
    snprintf(complaints + used, sizeof complaints - used, "%s%s: %s", used ? "; " : "", what, strerror(errno));
}

/* The rest of a line that begins with the word; NULL when there is none. `after` the last one found, or NULL. */
static const char *value(const char *text, const char *word, const char *after, char *out, size_t room)
{
    size_t length = strlen(word);
    for (const char *line = after ? after : text; *line; line += strspn(line, "\n")) {
        size_t whole = strcspn(line, "\n");
        if (whole > length && strncmp(line, word, length) == 0 && line[length] == ' ') {
            size_t rest = whole - length - 1 < room ? whole - length - 1 : room - 1;
            memcpy(out, line + length + 1, rest);
            out[rest] = 0;
            return line + whole;
        }
        line += whole;
    }
    return NULL;
}

/* By hand, as more is here: what the C library has for it is long, and nothing of it is translated yet. */
static bool read_hex(const char *text, uint8_t *out)
{
    static const char digits[] = "0123456789abcdef";
    const char *high = text[0] ? strchr(digits, text[0]) : NULL, *low = high && text[1] ? strchr(digits, text[1]) : NULL;
    if (low)
        *out = (uint8_t)((high - digits) << 4 | (low - digits));
    return low;
}

/* A small file is written over where it lies: a new one in its place would want an inode, blocks, and the old one's end. It
 * is one sector, old or new on the disk; and what the seed says is the same. */
static bool put(const char *path, const void *data, size_t length, mode_t mode)
{
    struct stat present;
    int fd = length <= 512 ? open(path, O_WRONLY | O_NOFOLLOW | O_CLOEXEC) : -1;
    if (fd >= 0 && fstat(fd, &present) == 0 && S_ISREG(present.st_mode) && present.st_size <= 512 &&
        (present.st_mode & 07777) == mode) {
        bool good = pwrite(fd, data, length, 0) == (ssize_t)length &&
                    (present.st_size <= (off_t)length || ftruncate(fd, (off_t)length) == 0);
        close(fd);
        return good;
    }
    if (fd >= 0)
        close(fd);
    return write_file(path, data, length, mode);
}

static bool put_text(const char *path, const char *text, mode_t mode)
{
    return put(path, text, strlen(text), mode);
}

static void stir(const char *hex)
{
    struct {
        struct rand_pool_info head;
        uint8_t bytes[64];
    } pool = {.head = {.entropy_count = 0}};
    int count = 0, fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
    while (count < 64 && read_hex(hex + 2 * count, &pool.bytes[count]))
        count++;
    pool.head.entropy_count = 8 * count;
    pool.head.buf_size = count;
    if (fd < 0 || ioctl(fd, RNDADDENTROPY, &pool) != 0 || ioctl(fd, RNDRESEEDCRNG) != 0)
        failed("random numbers");
    if (fd >= 0)
        close(fd);
}

/* How many nanoseconds ago this process began: what was told is older by that. */
static long long age(void)
{
    struct timespec now;
    long long found = 0;
    char *line = read_file("/proc/self/stat", NULL), *at = line ? strrchr(line, ')') : NULL;
    for (int field = 2; at && field < 22; field++)
        at = strchr(at + 1, ' ');
    if (at && clock_gettime(CLOCK_BOOTTIME, &now) == 0)
        found = now.tv_sec * 1000000000LL + now.tv_nsec - atoll(at) * (1000000000LL / sysconf(_SC_CLK_TCK));
    free(line);
    return found > 0 ? found : 0;
}

static void set_clock(const char *text, long long age_ns)
{
    const char *fraction = strchr(text, '.');
    long long nanoseconds = atoll(text) * 1000000000LL + (fraction ? atol(fraction + 1) * 1000LL : 0) + age_ns;
    struct timespec now = {.tv_sec = nanoseconds / 1000000000LL, .tv_nsec = nanoseconds % 1000000000LL};
    if (clock_settime(CLOCK_REALTIME, &now) != 0)
        failed("clock");
}

static void set_hostname(const char *name)
{
    static const char own[] = "127.0.1.1";
    char line[514], *present = read_file("/etc/hosts", NULL);
    size_t length = strlen(name), used = 0, before = present ? strlen(present) : 0;
    char *all = malloc(before + (before / sizeof own + 1) * (sizeof own + length + 2));
    if (sethostname(name, length) != 0)
        failed("host name");
    memcpy(line, name, length);
    strcpy(line + length, "\n");
    if (!put_text("/etc/hostname", line, 0644))
        failed("/etc/hostname");
    for (const char *one = present; all && one && *one;) {
        size_t whole = strcspn(one, "\n") + 1;
        whole -= one[whole - 1] == 0;
        bool ours = strncmp(one, own, sizeof own - 1) == 0;
        used = (size_t)(stpcpy(ours ? stpcpy(stpcpy(all + used, own), "\t") : all + used, ours ? line : "") - all);
        if (!ours) {
            memcpy(all + used, one, whole);
            used += whole;
        }
        one += whole;
    }
    if (present && all && !put("/etc/hosts", all, used, 0644))
        failed("/etc/hosts");
    free(all);
    free(present);
}

/* journald goes on writing where the other id leads; whoever reads the journal looks where its own does. */
static void lead_to_journal(const char *before, const char *id)
{
    static const char *const folders[] = {"/run/log/journal", "/var/log/journal"};
    char old[64], new[64];
    for (size_t i = 0; i < sizeof folders / sizeof *folders; i++) {
        snprintf(old, sizeof old, "%s/%.32s", folders[i], before);
        snprintf(new, sizeof new, "%s/%.32s", folders[i], id);
        if (access(old, F_OK) == 0)
            symlink(before, new);
    }
}

static void set_machine_id(const char *id)
{
    char line[34], *before = read_file("/etc/machine-id", NULL);
    struct stat dbus;
    strcpy(mempcpy(line, id, strnlen(id, 32)), "\n");
    if (before && strcspn(before, "\n") == 32) {
        before[32] = 0;
        lead_to_journal(before, id);
    }
    free(before);
    if (!put_text("/etc/machine-id", line, 0444))
        failed("/etc/machine-id");
    if (lstat("/var/lib/dbus/machine-id", &dbus) == 0 && S_ISREG(dbus.st_mode))
        put_text("/var/lib/dbus/machine-id", line, 0444);
}

static void set_weight(const char *path, const char *weight)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return;
    if (write(fd, weight, strlen(weight)) < 0)
        failed(path);
    close(fd);
}

/* --- SSH ----------------------------------------------------------------------------------------- */

static void remove_others(const char *folder, const char *prefix, const char *kept)
{
    DIR *entries = opendir(folder);
    for (struct dirent *entry; entries && (entry = readdir(entries));) {
        char path[512];
        snprintf(path, sizeof path, "%s/%s", folder, entry->d_name);
        if (strncmp(entry->d_name, prefix, strlen(prefix)) == 0 && strncmp(entry->d_name, kept, strlen(kept)) != 0 &&
            unlink(path) != 0)
            failed(path);
    }
    if (entries)
        closedir(entries);
}

/* Who was killed, to be waited for: an sshd that is not gone yet takes connections that it will never answer. */
static struct pollfd dying[32];
static nfds_t dying_count;

static void end_one(pid_t pid)
{
    int fd = dying_count < 32 ? (int)syscall(SYS_pidfd_open, pid, 0) : -1;
    if (fd >= 0)
        dying[dying_count++] = (struct pollfd){fd, POLLIN, 0};
    kill(pid, SIGKILL);
}

static void see_them_end(void)
{
    while (dying_count) {
        poll(&dying[--dying_count], 1, 2000);
        close(dying[dying_count].fd);
    }
}

/* All processes of that name, but one. */
static void kill_all(const char *command, pid_t spared)
{
    DIR *processes = opendir("/proc");
    for (struct dirent *entry; processes && (entry = readdir(processes));) {
        char path[300], name[20] = "";
        if (entry->d_name[0] < '1' || entry->d_name[0] > '9' || atoi(entry->d_name) == spared)
            continue;
        strcpy(stpcpy(stpcpy(path, "/proc/"), entry->d_name), "/comm");
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd >= 0 && read(fd, name, sizeof name - 1) == (ssize_t)strlen(command) + 1 &&
            strncmp(name, command, strlen(command)) == 0)
            end_one(atoi(entry->d_name));
        if (fd >= 0)
            close(fd);
    }
    if (processes)
        closedir(processes);
}

/* The sshd that process 1 keeps waiting for the end of the present one, or 0. */
static pid_t next_sshd(void)
{
    char *text = read_file(NEXT_SSHD, NULL);
    pid_t found = text ? atoi(text) : 0;
    free(text);
    return found;
}

/* Other services have much to do, too, when host name and cards change, and nobody waits for them: where there are control
 * groups, the process's gets most of what its like get of the processor, until its weight is put back. Not those above it:
 * the kernel's own threads compete with them, and who starves those waits for them in the end. */
#define MOST "10000"
static struct {
    char path[400];
    char *before;
} hastened;

static void hasten(int pid)
{
    char path[64], *all, *group;
    snprintf(path, sizeof path, "/proc/%d/cgroup", pid);
    all = read_file(path, NULL);
    group = all ? strstr(all, "0::/") : NULL;
    if (group) {
        group[strcspn(group, "\n")] = 0;
        snprintf(hastened.path, sizeof hastened.path, "/sys/fs/cgroup%s/cpu.weight", group + 3);
        hastened.before = read_file(hastened.path, NULL);
        if (hastened.before && strncmp(hastened.before, MOST, strlen(MOST)) == 0)
            strcpy(hastened.before, "100"); /* of the one before, a moment ago */
        if (hastened.before)
            set_weight(hastened.path, MOST);
    }
    free(all);
}

static void no_longer_hasten(void)
{
    if (hastened.before)
        set_weight(hastened.path, hastened.before);
}

static void set_host_key(const char *armored, const char *public)
{
    char line[512];
    if (access("/etc/dropbear", F_OK) == 0) {
        uint8_t key[128];
        size_t length = hostkey_from_openssh(armored, key, sizeof key);
        if (!length || !put("/etc/dropbear/dropbear_ed25519_host_key", key, length, 0600))
            failed("host key");
        remove_others("/etc/dropbear", "dropbear_", "dropbear_ed25519_host_key");
        kill_all("dropbear", next_sshd()); /* process 1 lets the next one begin, or starts one */
    }
    if (access("/etc/ssh", F_OK) == 0) {
        snprintf(line, sizeof line, "%s\n", public);
        if (!put_text("/etc/ssh/ssh_host_ed25519_key", armored, 0600) ||
            !put_text("/etc/ssh/ssh_host_ed25519_key.pub", line, 0644))
            failed("host key");
        remove_others("/etc/ssh", "ssh_host_", "ssh_host_ed25519_key");
        char *pid = read_file("/run/sshd.pid", NULL);
        if (pid && atoi(pid) > 1)
            hasten(atoi(pid)); /* for each connection it executes itself anew, and reads the key then */
        free(pid);
    }
}

/* --- network ------------------------------------------------------------------------------------- */

static bool read_mac(const char *text, uint8_t *mac)
{
    for (int i = 0; i < 6; i++)
        if (!read_hex(text + 3 * i, mac + i) || (i < 5 && text[3 * i + 2] != ':'))
            return false;
    return true;
}

static bool is_card(int control, struct ifreq *query, const uint8_t *mac)
{
    char device[64];
    strcpy(stpcpy(stpcpy(device, "/sys/class/net/"), query->ifr_name), "/device");
    struct ifreq asked = *query;
    return ioctl(control, SIOCGIFHWADDR, &asked) == 0 && memcmp(asked.ifr_hwaddr.sa_data, mac, 6) == 0 &&
           access(device, F_OK) == 0;
}

/* The card with the MAC; its name is in `query` then. Bridges and VLANs on it have the same. */
static bool find_card(int control, const uint8_t *mac, struct ifreq *query)
{
    for (int index = 1; index < 16; index++) { /* nearly always; a list of all is much more work */
        memset(query, 0, sizeof *query);
        query->ifr_ifindex = index;
        if (ioctl(control, SIOCGIFNAME, query) == 0 && is_card(control, query, mac))
            return true;
    }
    struct if_nameindex *all = if_nameindex();
    bool found = false;
    for (struct if_nameindex *one = all; !found && one && one->if_index; one++) {
        memset(query, 0, sizeof *query);
        strncpy(query->ifr_name, one->if_name, IFNAMSIZ - 1);
        found = is_card(control, query, mac);
    }
    if_freenameindex(all);
    return found;
}

static void set_up(int control, struct ifreq *card, bool up)
{
    if (ioctl(control, SIOCGIFFLAGS, card) == 0) {
        card->ifr_flags = (short)(up ? card->ifr_flags | IFF_UP : card->ifr_flags & ~IFF_UP);
        ioctl(control, SIOCSIFFLAGS, card);
    }
}

/* The address that IPv6 makes of a MAC for the link it is on. */
static struct in6_addr made_of(const uint8_t *mac)
{
    struct in6_addr made = {.s6_addr = {0xfe, 0x80, [8] = mac[0] ^ 2, mac[1], mac[2], 0xff, 0xfe, mac[3], mac[4], mac[5]}};
    return made;
}

/* Whether IPv6 knows the card by nothing but the address made of its MAC, or not at all. `has`: whether by that. */
static bool has_only(const char *card, const struct in6_addr *made, bool *has)
{
    char *all = read_file("/proc/net/if_inet6", NULL);
    bool only = true;
    *has = false;
    for (char *line = all; line && *line; line += strcspn(line, "\n"), line += *line == '\n') {
        size_t whole = strcspn(line, "\n"), length = strlen(card);
        if (whole < 33 + length || strncmp(line + whole - length, card, length) != 0 || line[whole - length - 1] != ' ')
            continue;
        uint8_t byte, differs = 0;
        for (int i = 0; i < 16; i++)
            differs |= !read_hex(line + 2 * i, &byte) || byte != made->s6_addr[i];
        only &= !differs;
        *has |= !differs;
    }
    free(all);
    return only;
}

struct in6_change { /* struct in6_ifreq of <linux/ipv6.h>, which does not go with <netinet/in.h> */
    struct in6_addr address;
    uint32_t prefix;
    int index;
};

/* The MAC, and what IPv6 has made of it. The card stays up where it can: down and up again is ten times the work, and takes
 * all else along that routers have told it. */
static void change_mac(int control, const char *text)
{
    uint8_t old[6], new[6];
    struct ifreq card, change;
    if (!read_mac(text, old) || strlen(text) < 18 || !read_mac(text + 18, new) || !find_card(control, old, &card)) {
        errno = ENODEV;
        failed(text);
        return;
    }
    bool had;
    struct in6_addr before = made_of(old), after = made_of(new);
    bool live = has_only(card.ifr_name, &before, &had);
    change = card;
    change.ifr_hwaddr.sa_family = 1; /* ARPHRD_ETHER */
    memcpy(change.ifr_hwaddr.sa_data, new, 6);
    if (live && ioctl(control, SIOCSIFHWADDR, &change) == 0) {
        int six = had && ioctl(control, SIOCGIFINDEX, &card) == 0 ? socket(AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, 0) : -1;
        struct in6_change gone = {before, 64, card.ifr_ifindex}, come = {after, 64, card.ifr_ifindex};
        if (had && (six < 0 || ioctl(six, SIOCSIFADDR, &come) != 0 || ioctl(six, SIOCDIFADDR, &gone) != 0))
            failed("IPv6 address");
        if (six >= 0)
            close(six);
        return;
    }
    set_up(control, &card, false);
    if (ioctl(control, SIOCSIFHWADDR, &change) != 0)
        failed(text);
    set_up(control, &card, true);
}

static void set_address(int control, const char *text)
{
    uint8_t mac[6];
    struct ifreq card;
    char address[20];
    struct sockaddr_in *to = (struct sockaddr_in *)&card.ifr_addr;
    if (!read_mac(text, mac) || text[17] != ' ' || !find_card(control, mac, &card))
        return;
    size_t length = strspn(text + 18, "0123456789.");
    if (length == 0 || length >= sizeof address || text[18 + length] != '/')
        return;
    memcpy(address, text + 18, length);
    address[length] = 0;
    int prefix = atoi(text + 18 + length + 1);
    memset(&card.ifr_addr, 0, sizeof card.ifr_addr);
    to->sin_family = AF_INET;
    if (inet_pton(AF_INET, address, &to->sin_addr) != 1 || ioctl(control, SIOCSIFADDR, &card) != 0)
        failed(text);
    to->sin_addr.s_addr = prefix > 0 && prefix <= 32 ? htonl(0xffffffffu << (32 - prefix)) : 0;
    if (ioctl(control, SIOCSIFNETMASK, &card) != 0)
        failed(text);
}

/* Takes its IPv4 addresses off the card: they are those of the machine whose memory this is, which goes on and has them. A
 * DHCP client would give them up only with the carrier's news, and the agent would tell them of this machine till then. */
static void drop_addresses(int control, const char *text)
{
    uint8_t mac[6];
    struct ifreq card;
    if (!read_mac(text, mac) || !find_card(control, mac, &card))
        return;
    for (int some = 0; some < 64; some++) {
        struct sockaddr_in *is = (struct sockaddr_in *)&card.ifr_addr;
        if (ioctl(control, SIOCGIFADDR, &card) != 0 || is->sin_addr.s_addr == 0)
            return;
        is->sin_family = AF_INET;
        is->sin_addr.s_addr = 0;
        if (ioctl(control, SIOCSIFADDR, &card) != 0) {
            failed(text);
            return;
        }
    }
}

/* Whether there is an address for the card with the new MAC of `text`, which is OLD NEW. */
static bool is_told_address(const char *told, const char *text)
{
    char word[512];
    for (const char *at = NULL; (at = value(told, "address", at, word, sizeof word));)
        if (strncmp(word, text + 18, 17) == 0)
            return true;
    return false;
}

/* Down to the disk, with nobody waiting for it: the agent waits for all who hold its pipes. Not at once, for it would be in
 * the way of the SSH server, and what the seed says is the same. And haste has an end. */
static void finish_behind(void)
{
    if (fork() != 0)
        return;
    setsid();
    for (int fd = 0; fd < 3; fd++)
        close(fd);
    sleep(1);
    sync();
    sleep(HASTE_S - 1);
    no_longer_hasten();
    _exit(0);
}

/* Whether the machine is another one than before. */
static bool renew(const char *text, long long age_ns)
{
    char word[512], public[512] = "";
    int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    const char *armored = strstr(text, "\nprivate\n");
    *complaints = 0;
    if (value(text, "entropy", NULL, word, sizeof word))
        stir(word);
    if (armored && value(text, "public", NULL, public, sizeof public))
        set_host_key(armored + strlen("\nprivate\n"), public);
    for (const char *at = NULL; (at = value(text, "mac", at, word, sizeof word));) {
        change_mac(control, word);
        if (strlen(word) >= 18 + 17 && !is_told_address(text, word))
            drop_addresses(control, word + 18);
    }
    for (const char *at = NULL; (at = value(text, "address", at, word, sizeof word));)
        set_address(control, word);
    if (value(text, "hostname", NULL, word, sizeof word))
        set_hostname(word);
    if (value(text, "machine-id", NULL, word, sizeof word))
        set_machine_id(word);
    if (value(text, "clock", NULL, word, sizeof word))
        set_clock(word, age_ns);
    close(control);
    see_them_end();
    return *public;
}

/* Waits at a port for what the host has to say, for as long as there is the port. The kernel tells by a signal that the
 * host has opened it or has sent something: poll() would return at once, again and again, while nobody has it open. */
static int wait_at(const char *path)
{
    static char text[16384];
    size_t used = 0;
    sigset_t woken;
    sigemptyset(&woken);
    sigaddset(&woken, SIGIO);
    sigprocmask(SIG_BLOCK, &woken, NULL);
    signal(SIGCHLD, SIG_IGN);
    int port = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (port < 0 || fcntl(port, F_SETOWN, getpid()) != 0 || fcntl(port, F_SETFL, O_NONBLOCK | O_ASYNC) != 0) {
        perror(path);
        return 1;
    }
    /* Nobody else is to answer the new name, the other card, the cut-off network before this is through; who does, is in a
     * Debian ten times as long at it. */
    struct sched_param first = {.sched_priority = 1};
    sched_setscheduler(0, SCHED_FIFO | SCHED_RESET_ON_FORK, &first);
    mlockall(MCL_CURRENT | MCL_FUTURE); /* a fork would read the pages from its disk that nobody has touched so far */
    for (;;) {
        ssize_t got = read(port, text + used, sizeof text - used);
        if (got < 0 && errno != EAGAIN && errno != EINTR)
            return 1;
        if (got <= 0) {
            sigwaitinfo(&woken, NULL);
            continue;
        }
        used += (size_t)got;
        char *begin = memrchr(text, BEGIN, used);
        if (begin) {
            used -= (size_t)(begin + 1 - text);
            memmove(text, begin + 1, used);
        }
        if (used == 0 || text[used - 1] != 0) {
            used = used == sizeof text ? 0 : used;
            continue;
        }
        used = 0;
        bool another = renew(text, 0);
        char answer[sizeof complaints + 16] = "done\n";
        if (*complaints)
            snprintf(answer, sizeof answer, "failed: %s\n", complaints);
        /* That somebody listens may be news that comes later than what they said. */
        for (int tries = 0; tries < 200 && write(port, answer, strlen(answer)) < 0 && errno == EAGAIN; tries++)
            sigtimedwait(&woken, NULL, &(struct timespec){.tv_nsec = 10000000});
        if (another)
            finish_behind();
    }
}

int renew_main(const char *port)
{
    umask(022);
    if (port)
        return wait_at(port);
    char *text = read_file("/dev/stdin", NULL);
    if (!text)
        return 2;
    if (renew(text, age()))
        finish_behind();
    if (*complaints)
        fprintf(stderr, "%s\n", complaints);
    return *complaints ? 1 : 0;
}
