/* seed.c - finds and reads the NoCloud seed without mounting it, and applies it.
 *
 * The seed is an ISO 9660 file system with the volume id "cidata" that holds user-data and meta-data. Reading it
 * takes three requests to the disk; the kernel's isofs would have to be loaded, mounted and unmounted.
 * Further keys of the cloud-config that this guest does not know are named in the log and ignored.
 */
#define _GNU_SOURCE
#include "micro.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define INSTANCE_FILE "/var/lib/vmctl/instance-id"
#define HOST_KEY "/etc/dropbear/dropbear_ed25519_host_key"

static char seed_disk[64];
static struct node *user_data, *meta_data;
static bool first_boot;

/* --- disks ------------------------------------------------------------------------------------ */

static bool is_root(int fd)
{
    char label[16];
    uint8_t magic[2];
    return pread(fd, magic, 2, 1024 + 0x38) == 2 && magic[0] == 0x53 && magic[1] == 0xef &&
           pread(fd, label, sizeof label, 1024 + 0x78) == sizeof label &&
           strncmp(label, ROOT_LABEL, sizeof label) == 0;
}

static int by_name(const struct dirent **a, const struct dirent **b)
{
    return strcmp((*a)->d_name, (*b)->d_name);
}

/* Look at every disk once, in the order of their names: the first with our label is the root, the first seed the seed. */
bool seed_find_disks(char *root, size_t room)
{
    struct dirent **names;
    int count = scandir("/sys/block", &names, NULL, by_name);
    root[0] = seed_disk[0] = 0;
    for (int i = 0; i < count; i++) {
        char path[64];
        snprintf(path, sizeof path, "/dev/%.48s", names[i]->d_name);
        free(names[i]);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            continue;
        if (!root[0] && is_root(fd))
            snprintf(root, room, "%s", path);
        else if (!seed_disk[0] && iso_is_seed(fd))
            snprintf(seed_disk, sizeof seed_disk, "%s", path);
        close(fd);
    }
    if (count >= 0)
        free(names);
    return root[0] != 0;
}

static void keep(const char *name, const char *text)
{
    if (strncmp(name, "user-dat", 8) == 0)
        user_data = yaml_parse(text);
    else if (strncmp(name, "meta-dat", 8) == 0)
        meta_data = yaml_parse(text);
}

void seed_read(void)
{
    if (!seed_disk[0]) {
        say("no seed");
        return;
    }
    int fd = open(seed_disk, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || !iso_read(fd, keep))
        say("seed %s: %s", seed_disk, strerror(errno));
    if (fd >= 0)
        close(fd);
    const char *instance = yaml_text(meta_data, "instance-id");
    say("seed %s%s%s", seed_disk, instance ? " instance " : "", instance ? instance : "");
}

/* --- applying it ------------------------------------------------------------------------------ */

static const char *wanted_hostname(void)
{
    const char *name = yaml_text(user_data, "hostname");
    if (!name || !*name)
        name = yaml_text(meta_data, "local-hostname");
    return name && *name ? name : NULL;
}

/* Early, because the DHCP client sends the name; the files follow when the root is mounted. */
void seed_set_hostname(void)
{
    const char *name = wanted_hostname();
    char label[65] = "";
    if (name)
        snprintf(label, sizeof label, "%.*s", (int)strcspn(name, "."), name);
    if (!label[0])
        snprintf(label, sizeof label, "micro");
    if (sethostname(label, strlen(label)) != 0)
        say("cannot set host name %s: %s", label, strerror(errno));
}

static void write_hostname(void)
{
    const char *full = wanted_hostname();
    char name[65], text[512];
    if (!full) {
        char *present = read_file("/etc/hostname", NULL); /* no seed this time: keep the name of the last */
        if (present && (present[strcspn(present, "\n")] = 0, present[0]))
            sethostname(present, strlen(present));
        return;
    }
    gethostname(name, sizeof name);
    snprintf(text, sizeof text, "%s\n", name);
    write_text("/etc/hostname", text, 0644);
    snprintf(text, sizeof text, "127.0.0.1\tlocalhost\n127.0.1.1\t%s%s%s\n::1\tlocalhost ip6-localhost ip6-loopback\n",
             strchr(full, '.') ? full : "", strchr(full, '.') ? " " : "", name);
    write_text("/etc/hosts", text, 0644);
}

/* From the instance id where there is one: a reseeded copy of a disk is another machine. One that is a UUID is taken as
 * it is, as a fork is told it; of another two 64-bit FNV-1a sums. */
static void write_machine_id(const char *instance)
{
    uint8_t bytes[16];
    char id[40] = "";
    size_t digits = 0;
    if (!first_boot && access("/etc/machine-id", F_OK) == 0)
        return;
    for (const char *c = instance ? instance : ""; *c && digits < 32; c++)
        if (strchr("0123456789abcdef", *c))
            id[digits++] = *c;
    if (digits == 32 && strlen(instance) == 36) {
        id[digits] = '\n';
        write_text("/etc/machine-id", id, 0444);
        return;
    }
    if (instance) {
        for (int half = 0; half < 2; half++) {
            uint64_t sum = 14695981039346656037ULL ^ (uint64_t)half;
            for (const char *c = instance; *c; c++)
                sum = (sum ^ (uint8_t)*c) * 1099511628211ULL;
            memcpy(bytes + 8 * half, &sum, 8);
        }
    } else {
        int fd = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
        if (fd < 0 || read(fd, bytes, sizeof bytes) != sizeof bytes)
            return;
        close(fd);
    }
    char text[40];
    for (int i = 0; i < 16; i++)
        snprintf(text + 2 * i, 3, "%02x", bytes[i]);
    strcat(text, "\n");
    write_text("/etc/machine-id", text, 0444);
}

static void write_host_key(void)
{
    const char *armored = yaml_text(yaml_get(user_data, "ssh_keys"), "ed25519_private");
    uint8_t key[128];
    size_t length = armored ? hostkey_from_openssh(armored, key, sizeof key) : 0;
    if (length) {
        if (!write_file(HOST_KEY, key, length, 0600))
            say("cannot write the host key: %s", strerror(errno));
        return;
    }
    if (armored)
        say("seed: ssh_keys: ed25519_private is not an unencrypted OpenSSH ed25519 key");
    struct stat present;
    if (stat(HOST_KEY, &present) == 0 && present.st_size > 0) /* a power cut can leave an empty one */
        return;
    unlink(HOST_KEY);
    say("making a host key");
    pid_t pid = fork();
    if (pid == 0) {
        int null = open("/dev/null", O_RDWR);
        dup2(null, 1);
        dup2(null, 2);
        execl("/usr/bin/dropbearkey", "dropbearkey", "-t", "ed25519", "-f", HOST_KEY, (char *)NULL);
        _exit(127);
    }
    waitpid(pid, NULL, 0);
}

static void write_authorized_keys(void)
{
    const struct node *keys = yaml_get(user_data, "ssh_authorized_keys");
    if (!keys)
        return;
    size_t room = 1;
    for (const struct node *key = keys->child; key; key = key->next)
        room += key->kind == SCALAR ? strlen(key->text) + 1 : 0;
    if (keys->kind == SCALAR)
        room += strlen(keys->text) + 1;
    char *text = calloc(1, room), *end = text;
    if (!text)
        return;
    if (keys->kind == SCALAR)
        end += sprintf(end, "%s\n", keys->text);
    for (const struct node *key = keys->child; key; key = key->next)
        if (key->kind == SCALAR && *key->text)
            end += sprintf(end, "%s\n", key->text);
    mkdir("/root/.ssh", 0700);
    if (!write_text("/root/.ssh/authorized_keys", text, 0600))
        say("cannot write the authorized keys: %s", strerror(errno));
    free(text);
}

static void name_ignored_keys(void)
{
    static const char *const known[] = {"hostname", "ssh_authorized_keys", "ssh_keys", "runcmd",
                                        /* true here whatever they say: */
                                        "ssh_pwauth", "ssh_deletekeys", "preserve_hostname", "manage_etc_hosts"};
    for (const struct node *member = user_data ? user_data->child : NULL; member; member = member->next) {
        bool is_known = false;
        for (size_t i = 0; i < sizeof known / sizeof *known; i++)
            is_known |= member->key && strcmp(member->key, known[i]) == 0;
        if (!is_known)
            say("seed: %s is ignored by this image", member->key ? member->key : "a value without a key");
    }
}

/* What only sshd must find when it starts. */
void seed_apply_keys(void)
{
    write_host_key();
    write_authorized_keys();
}

/* Who this machine is. */
void seed_apply_identity(void)
{
    const char *instance = yaml_text(meta_data, "instance-id");
    char *last = read_file(INSTANCE_FILE, NULL);
    first_boot = !last || (instance && strcmp(last, instance) != 0);
    write_hostname();
    write_machine_id(instance);
    name_ignored_keys();
    free(last);
}

/* --- runcmd ----------------------------------------------------------------------------------- */

static int run_one(const struct node *command, int output)
{
    const char *arguments[256] = {"/bin/sh", "-c", command->text, NULL};
    if (command->kind == SEQUENCE) {
        size_t count = 0;
        for (const struct node *word = command->child; word && count < 255; word = word->next)
            arguments[count++] = word->text ? word->text : "";
        arguments[count] = NULL;
        if (!count)
            return 0;
    }
    pid_t pid = fork();
    if (pid == 0) {
        dup2(output, 1);
        dup2(output, 2);
        execvp(arguments[0], (char *const *)arguments);
        dprintf(2, "%s: %s\n", arguments[0], strerror(errno));
        _exit(127);
    }
    int status = 0;
    while (pid > 0 && waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    return pid < 0 ? 127 : WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/* Copies what the commands print to the log file and to the console until the last writer has gone. */
static pid_t start_tee(int *input)
{
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0)
        return -1;
    pid_t pid = fork();
    if (pid == 0) {
        close(ends[1]);
        int log = open("/var/log/runcmd.log", O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
        int console = open("/dev/console", O_WRONLY | O_NOCTTY | O_CLOEXEC);
        char data[4096];
        ssize_t got;
        while ((got = read(ends[0], data, sizeof data)) > 0)
            if (write(log, data, (size_t)got) < 0 || write(console, data, (size_t)got) < 0)
                continue; /* a full disk must not block the command behind the pipe */
        _exit(0);
    }
    close(ends[0]);
    *input = ends[1];
    return pid;
}

/* In a process of its own, after network and sshd; records the instance when done, so a cut boot runs them again.
 * The record comes after what it speaks of, and "seed done" after both, on the disk too: vmctl reads that line in the
 * console log and takes the seed away at the next start, and then nobody can plant the host key again. */
void seed_run_commands(int network_up)
{
    const struct node *commands = yaml_get(user_data, "runcmd");
    const char *instance = yaml_text(meta_data, "instance-id");
    char done[4096] = "";
    size_t used = 0;
    int output = -1;
    pid_t tee = -1;
    if (first_boot && commands && commands->kind == SEQUENCE && commands->child) {
        if (!network_up)
            say("runcmd: starting without network");
        tee = start_tee(&output);
        int number = 1;
        for (const struct node *command = commands->child; command; command = command->next, number++) {
            int status = run_one(command, output);
            if (status)
                say("runcmd: command %d exited with status %d", number, status);
            if (used < sizeof done - 16)
                used += (size_t)snprintf(done + used, sizeof done - used, "%d\n", status);
        }
        close(output);
    }
    bool settled = settle();
    if (first_boot && settled)
        settled = write_text(INSTANCE_FILE, instance ? instance : "", 0644) && settle();
    /* Exit codes, one a line. Not waiting for the tee: a command left in the background may keep its pipe open. */
    write_text("/run/vmctl/seed-done", done, 0644);
    if (seed_disk[0] && settled) /* at a later boot too: the power may have gone just before it was said at the first */
        say("seed done");
    if (tee > 0)
        waitpid(tee, NULL, 0);
}
