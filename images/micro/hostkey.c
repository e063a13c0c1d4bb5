/* hostkey.c - an OpenSSH ed25519 private key in dropbear's format.
 *
 * OpenSSH (PROTOCOL.key), base64 between its two marker lines:
 *     "openssh-key-v1\0", string cipher "none", string kdf "none", string kdf options "",
 *     uint32 keys 1, string public, string private:
 *         uint32 check, uint32 check again, string "ssh-ed25519", string public (32),
 *         string seed and public (64), string comment, padding
 * dropbear: string "ssh-ed25519", string seed and public (64). A string is a big-endian length and bytes.
 */
#include "micro.h"

#include <string.h>

struct span {
    const uint8_t *at;
    size_t left;
};

static bool take(struct span *from, size_t length, struct span *out)
{
    if (length > from->left)
        return false;
    *out = (struct span){from->at, length};
    from->at += length;
    from->left -= length;
    return true;
}

static bool take_number(struct span *from, uint32_t *out)
{
    struct span bytes;
    if (!take(from, 4, &bytes))
        return false;
    *out = (uint32_t)bytes.at[0] << 24 | (uint32_t)bytes.at[1] << 16 | (uint32_t)bytes.at[2] << 8 | bytes.at[3];
    return true;
}

static bool take_string(struct span *from, struct span *out)
{
    uint32_t length;
    return take_number(from, &length) && take(from, length, out);
}

static bool is(const struct span *bytes, const char *text)
{
    return bytes->left == strlen(text) && memcmp(bytes->at, text, bytes->left) == 0;
}

static size_t decode_base64(const char *text, const char *end, uint8_t *out, size_t room)
{
    static const char alphabet[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    uint32_t bits = 0;
    int have = 0;
    size_t used = 0;
    for (; text < end; text++) {
        const char *digit = *text ? strchr(alphabet, *text) : NULL;
        if (!digit)
            continue; /* line ends and the padding */
        bits = bits << 6 | (uint32_t)(digit - alphabet);
        have += 6;
        if (have >= 8) {
            have -= 8;
            if (used == room)
                return 0;
            out[used++] = (uint8_t)(bits >> have);
        }
    }
    return used;
}

/* Returns the length of what it wrote to `out`, 0 when `armored` is not an unencrypted ed25519 key. */
size_t hostkey_from_openssh(const char *armored, uint8_t *out, size_t room)
{
    static const char begin[] = "-----BEGIN OPENSSH PRIVATE KEY-----";
    static const char magic[] = "openssh-key-v1"; /* its NUL belongs to it */
    const char *first = strstr(armored, begin);
    const char *last = first ? strstr(first, "-----END OPENSSH PRIVATE KEY-----") : NULL;
    if (!last)
        return 0;
    uint8_t blob[1024];
    struct span key = {blob, decode_base64(first + strlen(begin), last, blob, sizeof blob)};
    struct span head, cipher, kdf, options, public, private, type, pair;
    uint32_t keys, check, again;
    if (!take(&key, sizeof magic, &head) || memcmp(head.at, magic, sizeof magic) != 0 ||
        !take_string(&key, &cipher) || !is(&cipher, "none") || !take_string(&key, &kdf) ||
        !take_string(&key, &options) || !take_number(&key, &keys) || keys != 1 ||
        !take_string(&key, &public) || !take_string(&key, &private) ||
        !take_number(&private, &check) || !take_number(&private, &again) || check != again ||
        !take_string(&private, &type) || !is(&type, "ssh-ed25519") ||
        !take_string(&private, &public) || !take_string(&private, &pair) || pair.left != 64)
        return 0;
    static const uint8_t prefix[] = "\0\0\0\013ssh-ed25519\0\0\0\100";
    if (room < sizeof prefix - 1 + 64)
        return 0;
    memcpy(out, prefix, sizeof prefix - 1);
    memcpy(out + sizeof prefix - 1, pair.at, 64);
    return sizeof prefix - 1 + 64;
}
