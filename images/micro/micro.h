/* micro.h - what the parts of the micro guest's init share.
 *
 * One static program is the whole boot: it is /init of the initramfs, then process 1 of the running
 * system, and (by its other names) /sbin/shutdown and /sbin/vmctl-renew. A shell script would need some forty processes for
 * the same work, and under emulation a process costs ten milliseconds.
 *
 *   init.c     the order of things; process 1; services; power
 *   modules.c  loads kernel modules
 *   seed.c     finds and reads the NoCloud seed without mounting it, and applies it
 *   iso.c      reads its file system
 *   yaml.c     the subset of YAML that cloud-config files are written in
 *   hostkey.c  an OpenSSH ed25519 private key in dropbear's format
 *   net.c      one DHCP client for every interface
 *   renew.c    makes a machine that goes on from another one's memory itself
 *   files.c    small file helpers and the log
 */
#ifndef MICRO_H
#define MICRO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define ROOT_LABEL "vmctl-micro"
#define NEXT_SSHD "/run/vmctl/next-sshd" /* its process's number */

/* files.c */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
char *read_file(const char *path, size_t *length);
bool write_file(const char *path, const void *data, size_t length, mode_t mode);
bool write_text(const char *path, const char *text, mode_t mode);
bool settle(void);
pid_t fork_same_root(void);
void nap_ms(int milliseconds);
long now_ms(void);

/* modules.c */
void load_modules(const char *list);

/* yaml.c */
enum kind { SCALAR, SEQUENCE, MAPPING };
struct node {
    enum kind kind;
    char *key;          /* of a mapping's member */
    char *text;         /* of a scalar; never NULL there */
    struct node *child; /* first member of a sequence or mapping */
    struct node *next;  /* next member of the parent */
};
struct node *yaml_parse(const char *text);
const struct node *yaml_get(const struct node *mapping, const char *key);
const char *yaml_text(const struct node *mapping, const char *key);

/* hostkey.c */
size_t hostkey_from_openssh(const char *armored, uint8_t *out, size_t room);

/* iso.c */
bool iso_is_seed(int fd);
bool iso_read(int fd, void (*found)(const char *name, const char *text));

/* seed.c */
bool seed_find_disks(char *root, size_t room);
void seed_read(void);
void seed_set_hostname(void);
void seed_apply_keys(void);
void seed_apply_identity(void);
void seed_run_commands(int network_up);

/* net.c */
void net_main(const char *modules, int seed_ready, int network_up);
bool listening(int port);

/* renew.c */
int renew_main(const char *port);

#endif
