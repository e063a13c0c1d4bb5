/* first_boot.c - lets a machine be reached before cloud-init is through.
 *
 * cloud-init takes two starts of Python, half a minute under emulation, before it lets sshd start. What sshd and the
 * user need of a plain seed - host name, host key, user and keys - is read here in a millisecond, without Python.
 * cloud-init then runs as always and finds everything as it would have made it, only later.
 *
 * Called by systemd as a generator (three folders), in place of cloud-init's own: decides whether cloud-init runs, and
 * whether the boot waits for it. Called with "plant": writes what the seed says; with "stage": runs one of cloud-init's
 * (stage.c); with "cards": waits for the names of the network cards (cards.c).
 *
 * By its other name, vmctl-renew, it makes a machine that goes on from another one's memory itself (renew.c).
 *
 * In doubt the boot is Debian's: a key of the user-data that is not known here, a network configuration, another kind
 * of seed, and cloud-init comes first.
 */
#define HOST_KEY "/etc/ssh/ssh_host_ed25519_key"
#define _GNU_SOURCE
#include "cards.h"
#include "micro.h"
#include "stage.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <pwd.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define PROGRAM "/usr/lib/systemd/system-generators/vmctl-first-boot"
#define DEFAULT_USER "debian"
#define GROUPS "adm,audio,cdrom,dialout,dip,floppy,netdev,plugdev,sudo,video"
#define INSTANCE "/var/lib/cloud/data/instance-id"
#define SUDOERS "/run/vmctl/sudoers.d/first-boot"

static const struct node *user_data, *meta_data;
static bool plain = true, other_seed;

void say(const char *format, ...)
{
    va_list arguments;
    FILE *log = fopen("/dev/kmsg", "we");
    if (!log)
        return;
    fprintf(log, "<4>vmctl-first-boot: ");
    va_start(arguments, format);
    vfprintf(log, format, arguments);
    va_end(arguments);
    fclose(log);
}

/* --- reading ---------------------------------------------------------------------------------- */

static void keep(const char *name, const char *text)
{
    if (strncmp(name, "user-dat", 8) == 0) {
        plain &= strncmp(text, "#cloud-config", 13) == 0 && strchr("\r\n", text[13]) != NULL;
        user_data = yaml_parse(text);
    } else if (strncmp(name, "meta-dat", 8) == 0) {
        meta_data = yaml_parse(text);
    } else {
        plain = false;
    }
}

static bool is_fat_seed(int fd)
{
    char boot[90];
    return pread(fd, boot, sizeof boot, 0) == sizeof boot &&
           (strncasecmp(boot + 43, "cidata ", 7) == 0 || strncasecmp(boot + 71, "cidata ", 7) == 0);
}

static bool find_seed(void)
{
    bool found = false;
    DIR *blocks = opendir("/sys/class/block");
    for (struct dirent *block; blocks && (block = readdir(blocks));) {
        char path[300];
        snprintf(path, sizeof path, "/dev/%s", block->d_name);
        int fd = block->d_name[0] == '.' ? -1 : open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
        if (fd < 0)
            continue;
        if (iso_is_seed(fd)) {
            other_seed |= found;
            found = iso_read(fd, keep);
        }
        other_seed |= is_fat_seed(fd);
        close(fd);
    }
    if (blocks)
        closedir(blocks);
    return found;
}

static bool in_cmdline(const char *word)
{
    char *text = read_file("/proc/cmdline", NULL);
    bool found = text && strstr(text, word);
    free(text);
    return found;
}

static bool exists(const char *path)
{
    return access(path, F_OK) == 0;
}

static bool known_keys(const struct node *mapping, const char *const *known)
{
    for (const struct node *member = mapping->child; member; member = member->next) {
        bool is_known = false;
        for (size_t i = 0; known[i]; i++)
            is_known |= member->key && strcmp(member->key, known[i]) == 0;
        if (!is_known)
            return false;
    }
    return mapping->kind == MAPPING;
}

static bool is_false(const char *text)
{
    return text && (strcmp(text, "false") == 0 || strcmp(text, "no") == 0);
}

static const char *user_name(void)
{
    const char *name = yaml_text(yaml_get(user_data, "user"), "name");
    return name ? name : DEFAULT_USER;
}

/* Whether all that matters to a login is understood here. */
static bool is_plain(void)
{
    static const char *const known[] = {"hostname", "ssh_authorized_keys", "ssh_keys", "bootcmd", "runcmd", "ssh_pwauth",
                                        "ssh_deletekeys", "user", NULL};
    static const char *const in_user[] = {"name", NULL};
    const struct node *user = yaml_get(user_data, "user"), *keys = yaml_get(user_data, "ssh_authorized_keys");
    const struct node *host_keys = yaml_get(user_data, "ssh_keys");
    return plain && user_data && known_keys(user_data, known) && (!user || known_keys(user, in_user)) && keys &&
           keys->kind == SEQUENCE && (!host_keys || yaml_text(host_keys, "ed25519_private")) &&
           is_false(yaml_text(user_data, "ssh_deletekeys")) && is_false(yaml_text(user_data, "ssh_pwauth")) &&
           user_name()[strspn(user_name(), "abcdefghijklmnopqrstuvwxyz0123456789-_")] == 0;
}

static bool set_up_already(const char *instance)
{
    char *last = read_file(INSTANCE, NULL);
    bool same = last && (!instance || (strncmp(last, instance, strlen(instance)) == 0 &&
                                       strcspn(last, "\n") == strlen(instance)));
    free(last);
    return same;
}

/* --- the generator ---------------------------------------------------------------------------- */

static void put(const char *folder, const char *name, const char *text)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    if (!write_text(path, text, 0644))
        say("cannot write %s: %s", path, strerror(errno));
}

static void put_folder(const char *folder, const char *name)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    mkdir(path, 0755);
}

static void want(const char *folder, const char *unit)
{
    char path[512], target[256];
    put_folder(folder, "multi-user.target.wants");
    snprintf(path, sizeof path, "%s/multi-user.target.wants/%s", folder, unit);
    snprintf(target, sizeof target, "/usr/lib/systemd/system/%s", unit);
    if (symlink(target, path) != 0 && errno != EEXIST)
        say("cannot link %s: %s", path, strerror(errno));
}

/* cloud-init's four services, each with its stage by stage.c. */
static void put_stages(const char *folder)
{
    static const char *const stages[][2] = {{"cloud-init-local", "init --local"}, {"cloud-init", "init"},
                                            {"cloud-config", "modules --mode=config"},
                                            {"cloud-final", "modules --mode=final"}};
    for (size_t i = 0; i < sizeof stages / sizeof *stages; i++) {
        char name[64], text[512];
        snprintf(name, sizeof name, "%s.service.d", stages[i][0]);
        put_folder(folder, name);
        snprintf(name, sizeof name, "%s.service.d/10-vmctl.conf", stages[i][0]);
        snprintf(text, sizeof text, "[Unit]\nWants=vmctl-cloud-init.service\nAfter=vmctl-cloud-init.service\n"
                 "[Service]\nExecStart=\nExecStart=%s stage %s\n", PROGRAM, stages[i][1]);
        put(folder, name, text);
    }
}

/* cloud-init's first two services as Debian has them, without their places before sysinit.target, network and sshd. */
static void put_services(const char *folder)
{
    static const char late[] = "[Unit]\nAfter=ssh.service systemd-user-sessions.service systemd-networkd-wait-online.service\n";
    static const char service[] = "[Service]\nType=oneshot\nRemainAfterExit=yes\nTimeoutSec=0\n"
                                  "StandardOutput=journal+console\n";
    char text[1024];
    snprintf(text, sizeof text, "%sDescription=Initial cloud-init job (pre-networking), beside the boot\n"
             "RequiresMountsFor=/var/lib/cloud\n%s", late, service);
    put(folder, "cloud-init-local.service", text);
    snprintf(text, sizeof text, "[Unit]\nDescription=Initial cloud-init job (metadata service crawler), beside the boot\n"
             "After=cloud-init-local.service systemd-networkd-wait-online.service\nBefore=network-online.target\n%s", service);
    put(folder, "cloud-init.service", text);
    put_folder(folder, "vmctl-cloud-init.service.d");
    snprintf(text, sizeof text, "%s[Service]\nCPUWeight=10\n", late); /* the first login comes first */
    put(folder, "vmctl-cloud-init.service.d/10-late.conf", text);
}

static int generate(const char *normal, const char *early)
{
    bool seed = find_seed();
    const char *instance = yaml_text(meta_data, "instance-id");
    other_seed |= exists("/var/lib/cloud/seed/nocloud") || exists("/var/lib/cloud/seed/nocloud-net") || in_cmdline("ds=");
    bool disabled = exists("/etc/cloud/cloud-init.disabled") || in_cmdline("cloud-init=disabled");
    mkdir("/run/cloud-init", 0755);
    /* Without its seed a machine stays as it is: to cloud-init it would be a new one, of no cloud at all. */
    if (disabled || (!seed && !other_seed && set_up_already(NULL))) {
        put("/run/cloud-init", "disabled", "");
        return 0;
    }
    put("/run/cloud-init", "enabled", "");
    want(normal, "cloud-init.target");
    put_stages(early);
    if (!seed || other_seed || !instance)
        return 0;
    if (set_up_already(instance)) {
        put_services(early);
    } else if (is_plain()) {
        put_services(early);
        want(normal, "vmctl-first-boot.service");
    }
    return 0;
}

/* --- planting --------------------------------------------------------------------------------- */

static bool run(const char *const *words)
{
    pid_t pid = fork();
    if (pid == 0) {
        execv(words[0], (char *const *)words);
        _exit(127);
    }
    int status = 0;
    while (pid > 0 && waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    return pid > 0 && status == 0;
}

static bool plant_host_key(void)
{
    const struct node *keys = yaml_get(user_data, "ssh_keys");
    const char *secret = yaml_text(keys, "ed25519_private"), *known = yaml_text(keys, "ed25519_public");
    char text[1024];
    if (!secret) { /* a seed many machines share: each makes a key of its own */
        const char *const make[] = {"/usr/bin/ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", HOST_KEY, NULL};
        return exists(HOST_KEY) || run(make);
    }
    snprintf(text, sizeof text, "%s\n", known ? known : "");
    return write_text(HOST_KEY, secret, 0600) && (!known || write_text(HOST_KEY ".pub", text, 0644));
}

/* Not getpwnam: a static program must not load NSS modules. */
static const struct passwd *account(const char *name)
{
    FILE *file = fopen("/etc/passwd", "re");
    const struct passwd *found = NULL;
    while (file && (found = fgetpwent(file)) && strcmp(found->pw_name, name) != 0)
        ;
    if (file)
        fclose(file);
    return found;
}

static bool plant_user(const char *name)
{
    const char *const add[] = {"/usr/sbin/useradd", name, "--comment", "Debian", "--groups", GROUPS, "--shell",
                               "/bin/bash", "-m", NULL};
    char rule[256];
    /* In /run, for cloud-init adds its rule to its own file whatever is there. */
    snprintf(rule, sizeof rule, "%s ALL=(ALL) NOPASSWD:ALL\n", name);
    mkdir("/run/vmctl", 0755);
    mkdir("/run/vmctl/sudoers.d", 0755);
    if (!account(name) && !run(add))
        return false;
    return write_text(SUDOERS, rule, 0440);
}

static bool plant_keys(const char *name)
{
    const struct passwd *user = account(name);
    const struct node *keys = yaml_get(user_data, "ssh_authorized_keys");
    char folder[256], path[300], *text = NULL;
    size_t length = 0;
    FILE *out = open_memstream(&text, &length);
    if (!user || !out)
        return false;
    for (const struct node *key = keys->child; key; key = key->next)
        if (key->kind == SCALAR && *key->text)
            fprintf(out, "%s\n", key->text);
    fclose(out);
    snprintf(folder, sizeof folder, "%s/.ssh", user->pw_dir);
    snprintf(path, sizeof path, "%s/authorized_keys", folder);
    if (mkdir(folder, 0700) == 0 && chown(folder, user->pw_uid, user->pw_gid) != 0)
        return false;
    if (exists(path)) /* a disk that has been another machine: cloud-init knows how to add */
        return true;
    return write_text(path, text, 0600) && chown(path, user->pw_uid, user->pw_gid) == 0;
}

static void plant_hostname(void)
{
    const char *full = yaml_text(user_data, "hostname");
    char name[66];
    if (!full || !*full)
        return;
    snprintf(name, sizeof name - 1, "%.*s", (int)strcspn(full, "."), full);
    if (sethostname(name, strlen(name)) != 0)
        say("cannot set the host name: %s", strerror(errno));
    strcat(name, "\n");
    write_text("/etc/hostname", name, 0644);
}

/* A disk that has been another machine's: its id becomes the instance's, before the network asks for it. */
static void plant_machine_id(void)
{
    const char *instance = yaml_text(meta_data, "instance-id");
    char id[36] = "";
    size_t length = 0;
    if (!exists(INSTANCE) || set_up_already(instance))
        return;
    for (; instance && *instance && length < 32; instance++)
        if (strchr("0123456789abcdef", *instance))
            id[length++] = *instance;
    if (length != 32)
        return;
    strcpy(id + length, "\n");
    if (!write_text("/etc/machine-id", id, 0444))
        say("cannot write the machine id: %s", strerror(errno));
}

static int plant(void)
{
    if (!find_seed() || !is_plain())
        return 0;
    plant_hostname();
    plant_machine_id();
    if (plant_host_key() && plant_user(user_name()) && plant_keys(user_name())) {
        if (fork() == 0) { /* on the disk long before cloud-init is through, and sshd need not wait for it */
            settle();
            _exit(0);
        }
        return 0;
    }
    say("cannot plant what the seed says: %s; cloud-init will", strerror(errno));
    return 1;
}

int main(int count, char **arguments)
{
    const char *called = strrchr(arguments[0], '/');
    if (strcmp(called ? called + 1 : arguments[0], "vmctl-renew") == 0)
        return renew_main(count > 1 ? arguments[1] : NULL);
    umask(022);
    if (count == 2 && strcmp(arguments[1], "plant") == 0)
        return plant();
    if (count == 2 && strcmp(arguments[1], "cards") == 0)
        return await_cards();
    if (count > 2 && strcmp(arguments[1], "stage") == 0)
        return stage(arguments + 2);
    if (count == 4)
        return generate(arguments[1], arguments[2]);
    fprintf(stderr, "usage: %s plant | cards | stage WORD... | NORMAL EARLY LATE\n", arguments[0]);
    return 2;
}
