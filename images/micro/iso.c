/* iso.c - reads the NoCloud seed, an ISO 9660 file system (ECMA-119), with Rock Ridge names where there are any. */
#define _GNU_SOURCE
#include "micro.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

#define SECTOR 2048
#define FILE_LIMIT (1 << 20)

bool iso_is_seed(int fd)
{
    char descriptor[72];
    return pread(fd, descriptor, sizeof descriptor, 16 * SECTOR) == sizeof descriptor &&
           memcmp(descriptor, "\1CD001", 6) == 0 && strncasecmp(descriptor + 40, "cidata ", 7) == 0;
}

static uint32_t little(const uint8_t *bytes)
{
    return bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24;
}

/* The name without case, version and the difference between - and _, which plain ISO names do not have. */
static void entry_name(const uint8_t *entry, char *name, size_t room)
{
    const uint8_t *text = entry + 33;
    size_t length = entry[32];
    const uint8_t *end = entry + entry[0];
    for (const uint8_t *field = text + length + !(length & 1); field + 5 <= end && field[2] >= 5; field += field[2])
        if (field[0] == 'N' && field[1] == 'M' && field + field[2] <= end) {
            text = field + 5;
            length = (size_t)field[2] - 5;
            break;
        }
    size_t used = 0;
    for (; used < length && used + 1 < room && text[used] != ';'; used++)
        name[used] = text[used] == '_' ? '-' : (char)tolower(text[used]);
    while (used && name[used - 1] == '.')
        used--;
    name[used] = 0;
}

static char *read_extent(int fd, const uint8_t *entry)
{
    uint32_t length = little(entry + 10);
    if (length > FILE_LIMIT)
        return NULL;
    char *data = malloc(length + 1);
    if (data && pread(fd, data, length, (off_t)little(entry + 2) * SECTOR) == (ssize_t)length) {
        data[length] = 0;
        return data;
    }
    free(data);
    return NULL;
}

static bool wanted(const char *name)
{
    /* mkisofs without Rock Ridge makes 8.3 names: user-dat */
    static const char *const names[] = {"user-dat", "meta-dat", "vendor-d", "network-"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strncmp(name, names[i], 8) == 0)
            return true;
    return false;
}

/* Hand the seed's files, each with its name in small letters, to `found`. */
bool iso_read(int fd, void (*found)(const char *name, const char *text))
{
    uint8_t descriptor[SECTOR];
    if (pread(fd, descriptor, SECTOR, 16 * SECTOR) != SECTOR)
        return false;
    const uint8_t *root = descriptor + 156;
    uint32_t length = little(root + 10);
    uint8_t *folder = (uint8_t *)read_extent(fd, root);
    for (uint32_t at = 0; folder && at + 34 <= length;) {
        const uint8_t *entry = folder + at;
        if (entry[0] < 34) { /* entries do not cross sectors: the rest of this one is empty */
            at = (at / SECTOR + 1) * SECTOR;
            continue;
        }
        if (at + entry[0] > length)
            break;
        char name[64];
        entry_name(entry, name, sizeof name);
        char *text = wanted(name) ? read_extent(fd, entry) : NULL;
        if (text)
            found(name, text);
        at += entry[0];
    }
    free(folder);
    return folder != NULL;
}
