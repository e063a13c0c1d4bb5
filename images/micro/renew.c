/* renew.c - a machine that goes on from another one's memory becomes itself.
 *
 * The host says on standard input, a word and its value a line, who it is now; the last is the key of its SSH server:
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
 * server is told to start anew first, for that takes the longest.
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
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { HASTE_S = 5 };

static int failures;

static void failed(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    failures++;
}

/* The rest of a line that begins with the word; NULL when there is none. `after` the last one found, or NULL. */
static const char *value(const char *text, const char *word, const char *after, char *out, size_t room)
{
    size_t length = strlen(word);
    for (const char *line = after ? after : text; *line; line += strspn(line, "\n")) {
        size_t whole = strcspn(line, "\n");
        if (whole > length && strncmp(line, word, length) == 0 && line[length] == ' ') {
            snprintf(out, room, "%.*s", (int)(whole - length - 1), line + length + 1);
            return line + whole;
        }
        line += whole;
    }
    return NULL;
}

static void stir(const char *hex)
{
    struct {
        struct rand_pool_info head;
        uint8_t bytes[64];
    } pool = {.head = {.entropy_count = 0}};
    int count = 0, fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
    while (count < 64 && sscanf(hex + 2 * count, "%2hhx", &pool.bytes[count]) == 1)
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

static void set_clock(const char *text)
{
    const char *fraction = strchr(text, '.');
    long long nanoseconds = atoll(text) * 1000000000LL + (fraction ? atol(fraction + 1) * 1000LL : 0) + age();
    struct timespec now = {.tv_sec = nanoseconds / 1000000000LL, .tv_nsec = nanoseconds % 1000000000LL};
    if (clock_settime(CLOCK_REALTIME, &now) != 0)
        failed("clock");
}

static void set_hostname(const char *name)
{
    char line[80], *present = read_file("/etc/hosts", NULL), *all = NULL, *rest = NULL;
    size_t length = 0;
    if (sethostname(name, strlen(name)) != 0)
        failed("host name");
    snprintf(line, sizeof line, "%s\n", name);
    if (!write_text("/etc/hostname", line, 0644))
        failed("/etc/hostname");
    FILE *out = present ? open_memstream(&all, &length) : NULL;
    for (char *one = out ? strtok_r(present, "\n", &rest) : NULL; one; one = strtok_r(NULL, "\n", &rest)) {
        if (strncmp(one, "127.0.1.1", 9) == 0)
            fprintf(out, "127.0.1.1\t%s\n", name);
        else
            fprintf(out, "%s\n", one);
    }
    if (out) {
        fclose(out);
        if (!write_text("/etc/hosts", all, 0644))
            failed("/etc/hosts");
    }
    free(all);
    free(present);
}

static void set_machine_id(const char *id)
{
    char line[40];
    struct stat dbus;
    snprintf(line, sizeof line, "%.32s\n", id);
    if (!write_text("/etc/machine-id", line, 0444))
        failed("/etc/machine-id");
    if (lstat("/var/lib/dbus/machine-id", &dbus) == 0 && S_ISREG(dbus.st_mode))
        write_text("/var/lib/dbus/machine-id", line, 0444);
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

static void signal_all(const char *command, int signal_number)
{
    DIR *processes = opendir("/proc");
    for (struct dirent *entry; processes && (entry = readdir(processes));) {
        char path[300];
        snprintf(path, sizeof path, "/proc/%.200s/comm", entry->d_name);
        char *name = entry->d_name[0] >= '1' && entry->d_name[0] <= '9' ? read_file(path, NULL) : NULL;
        if (name && strcspn(name, "\n") == strlen(command) && strncmp(name, command, strlen(command)) == 0)
            kill(atoi(entry->d_name), signal_number);
        free(name);
    }
    if (processes)
        closedir(processes);
}

/* Other services have much to do, too, when host name and cards change, and nobody waits for them: where each has a
 * control group, the process's gets most of the processor's time, until weights are put back. */
static struct {
    char path[400];
    char *before;
} hastened[2];

static void hasten(int which, int pid)
{
    char path[64], *group, *at;
    snprintf(path, sizeof path, "/proc/%d/cgroup", pid);
    group = read_file(path, NULL);
    if (group && (at = strstr(group, "0::/")) && strcspn(at + 3, "\n") > 1) {
        snprintf(hastened[which].path, sizeof hastened[which].path, "/sys/fs/cgroup%.*s/cpu.weight",
                 (int)strcspn(at + 3, "\n"), at + 3);
        hastened[which].before = read_file(hastened[which].path, NULL);
        set_weight(hastened[which].path, "10000");
    }
    free(group);
}

static void no_longer_hasten(void)
{
    for (int which = 0; which < 2; which++)
        if (hastened[which].before)
            set_weight(hastened[which].path, hastened[which].before);
}

static void set_host_key(const char *armored, const char *public)
{
    char line[512];
    if (access("/etc/dropbear", F_OK) == 0) {
        uint8_t key[128];
        size_t length = hostkey_from_openssh(armored, key, sizeof key);
        if (!length || !write_file("/etc/dropbear/dropbear_ed25519_host_key", key, length, 0600))
            failed("host key");
        remove_others("/etc/dropbear", "dropbear_", "dropbear_ed25519_host_key");
        signal_all("dropbear", SIGTERM); /* process 1 starts it again */
    }
    if (access("/etc/ssh", F_OK) == 0) {
        snprintf(line, sizeof line, "%s\n", public);
        if (!write_text("/etc/ssh/ssh_host_ed25519_key", armored, 0600) ||
            !write_text("/etc/ssh/ssh_host_ed25519_key.pub", line, 0644))
            failed("host key");
        remove_others("/etc/ssh", "ssh_host_", "ssh_host_ed25519_key");
        char *pid = read_file("/run/sshd.pid", NULL);
        if (pid && atoi(pid) > 1) {
            hasten(0, getpid());
            hasten(1, atoi(pid));
            kill(atoi(pid), SIGHUP);
        }
        free(pid);
    }
}

/* --- network ------------------------------------------------------------------------------------- */

static bool read_mac(const char *text, uint8_t *mac)
{
    return sscanf(text, "%2hhx:%2hhx:%2hhx:%2hhx:%2hhx:%2hhx", mac, mac + 1, mac + 2, mac + 3, mac + 4, mac + 5) == 6;
}

/* The card with the MAC; its name is in `query` then. Bridges and VLANs on it have the same. */
static bool find_card(int control, const uint8_t *mac, struct ifreq *query)
{
    struct if_nameindex *all = if_nameindex();
    bool found = false;
    for (struct if_nameindex *one = all; !found && one && one->if_index; one++) {
        char device[64];
        memset(query, 0, sizeof *query);
        snprintf(query->ifr_name, IFNAMSIZ, "%s", one->if_name);
        snprintf(device, sizeof device, "/sys/class/net/%s/device", one->if_name);
        found = access(device, F_OK) == 0 && ioctl(control, SIOCGIFHWADDR, query) == 0 &&
                memcmp(query->ifr_hwaddr.sa_data, mac, 6) == 0;
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

/* Down and up again: addresses made of the old MAC go with it. */
static void change_mac(int control, const char *text)
{
    uint8_t old[6], new[6];
    struct ifreq card;
    if (!read_mac(text, old) || strlen(text) < 18 || !read_mac(text + 18, new) || !find_card(control, old, &card)) {
        errno = ENODEV;
        failed(text);
        return;
    }
    set_up(control, &card, false);
    card.ifr_hwaddr.sa_family = 1; /* ARPHRD_ETHER */
    memcpy(card.ifr_hwaddr.sa_data, new, 6);
    if (ioctl(control, SIOCSIFHWADDR, &card) != 0)
        failed(text);
    set_up(control, &card, true);
}

static void set_address(int control, const char *text)
{
    uint8_t mac[6];
    struct ifreq card;
    char address[20];
    int prefix;
    struct sockaddr_in *to = (struct sockaddr_in *)&card.ifr_addr;
    if (!read_mac(text, mac) || sscanf(text + 17, " %19[0-9.]/%d", address, &prefix) != 2 || !find_card(control, mac, &card))
        return;
    memset(&card.ifr_addr, 0, sizeof card.ifr_addr);
    to->sin_family = AF_INET;
    if (inet_pton(AF_INET, address, &to->sin_addr) != 1 || ioctl(control, SIOCSIFADDR, &card) != 0)
        failed(text);
    to->sin_addr.s_addr = prefix > 0 && prefix <= 32 ? htonl(0xffffffffu << (32 - prefix)) : 0;
    if (ioctl(control, SIOCSIFNETMASK, &card) != 0)
        failed(text);
}

/* Down to the disk, with nobody waiting for it: the agent waits for all who hold its pipes. And haste has an end. */
static void finish_behind(void)
{
    if (fork() != 0)
        return;
    setsid();
    for (int fd = 0; fd < 3; fd++)
        close(fd);
    sync();
    sleep(HASTE_S);
    no_longer_hasten();
    _exit(0);
}

int renew_main(void)
{
    char word[512], public[512] = "";
    char *text = read_file("/dev/stdin", NULL);
    if (!text)
        return 2;
    umask(022);
    int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    const char *armored = strstr(text, "\nprivate\n");
    if (value(text, "entropy", NULL, word, sizeof word))
        stir(word);
    if (armored && value(text, "public", NULL, public, sizeof public))
        set_host_key(armored + strlen("\nprivate\n"), public);
    for (const char *at = NULL; (at = value(text, "mac", at, word, sizeof word));)
        change_mac(control, word);
    for (const char *at = NULL; (at = value(text, "address", at, word, sizeof word));)
        set_address(control, word);
    if (value(text, "hostname", NULL, word, sizeof word))
        set_hostname(word);
    if (value(text, "machine-id", NULL, word, sizeof word))
        set_machine_id(word);
    if (value(text, "clock", NULL, word, sizeof word))
        set_clock(word);
    if (*public)
        finish_behind();
    return failures ? 1 : 0;
}
