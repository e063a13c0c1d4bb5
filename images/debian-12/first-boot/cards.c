/* cards.c - waits until udev is through with the machine's network cards, their names above all.
 *
 * systemd-networkd 252 that has met a card before udev renames it may set it up twice; it then finds its own DHCP client
 * in the way ("Failed to configure DHCPv4 client: Device or resource busy") and gives the card up for good. Where it
 * starts after udev, which it waits for with each card anyway, there is nothing to meet too early.
 */
#define _GNU_SOURCE
#include "micro.h"
#include "cards.h"

#include <glob.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* What the bus knows: a card is there before its driver is, and a virtio card's driver has two halves. */
#define PCI "/sys/bus/pci/devices"
#define ETHERNET "0x0200"
#define LONGEST_MS 60000 /* of the 90 s that systemd gives networkd's start */
#define IDLE_MS 3000     /* udev with nothing to do for so long has no driver for a card */
#define STEP_MS 20

/* Whether udev has noted a card, ".../net/NAME/ifindex" being its number, and that it goes by the name it is to have. */
static bool named(const char *place)
{
    char path[64], name[64];
    const char *end = strrchr(place, '/'), *start = memrchr(place, '/', (size_t)(end - place));
    char *number = read_file(place, NULL);
    snprintf(path, sizeof path, "/run/udev/data/n%ld", number ? atol(number) : -1);
    free(number);
    snprintf(name, sizeof name, "E:ID_NET_NAME=%.*s\n", (int)(end - start - 1), start + 1);
    char *noted = read_file(path, NULL);
    bool done = noted && (!strstr(noted, "E:ID_RENAMING=1\n") || strstr(noted, name));
    free(noted);
    return done;
}

/* Whether a device is no card, or has its driver and its name. */
static bool through(const char *device)
{
    char path[512];
    snprintf(path, sizeof path, "%s/class", device);
    char *kind = read_file(path, NULL);
    bool card = kind && strncmp(kind, ETHERNET, strlen(ETHERNET)) == 0;
    free(kind);
    if (!card)
        return true;
    glob_t found;
    snprintf(path, sizeof path, "%s/{,virtio*/}net/*/ifindex", device);
    bool done = glob(path, GLOB_BRACE | GLOB_NOSORT, NULL, &found) == 0;
    for (size_t at = 0; done && at < found.gl_pathc; at++)
        done = named(found.gl_pathv[at]);
    globfree(&found);
    return done;
}

static bool all_through(void)
{
    glob_t found;
    bool done = true;
    if (glob(PCI "/*", GLOB_NOSORT, NULL, &found) == 0)
        for (size_t at = 0; done && at < found.gl_pathc; at++)
            done = through(found.gl_pathv[at]);
    globfree(&found);
    return done;
}

int await_cards(void)
{
    long end = now_ms() + LONGEST_MS, busy = now_ms();
    while (!all_through()) {
        if (access("/run/udev/queue", F_OK) == 0)
            busy = now_ms();
        if (now_ms() > end || now_ms() - busy > IDLE_MS) {
            say("udev is not through with the network cards");
            break;
        }
        nap_ms(STEP_MS);
    }
    return 0;
}
