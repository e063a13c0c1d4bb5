/* What stands around the CPU: the PCI bus, the chipset's power management, device memory; and the command line. */
#include "machine.h"

#define PATIENCE 20000000000UL
#define TICKS_OF_A_MS 2000000UL /* about */

enum {
    CONFIG_ADDRESS = 0xcf8,
    CONFIG_DATA = 0xcfc,
    LPC_BRIDGE = 0x1f << 3, /* of a Q35 */
    PMBASE = 0x40,
    PM1_CONTROL = 4,
    SLEEP_ENABLE = 1 << 13, /* with sleep type 0, which is soft off on this chipset */
    PAGE = 0x87,            /* present, writable, user, large */
    UNCACHED = 0x18
};

extern u64 pdpt[];
extern u32 start_info;

static u64 device_pages[2][512] __attribute__((aligned(4096)));

void map_devices(void) {
    for (u64 gib = 0; gib < 2; gib++) {
        for (u64 i = 0; i < 512; i++)
            device_pages[gib][i] = (2 + gib) << 30 | i << 21 | PAGE | UNCACHED;
        pdpt[2 + gib] = (u64)device_pages[gib] | 7;
    }
    __asm__ volatile("mov %%cr3, %%rax; mov %%rax, %%cr3" ::: "rax", "memory");
}

void say(const char *key, u64 value) {
    print(key);
    print(" ");
    print_number(value);
    print("\n");
}

static void print_word(u32 word) {
    char text[5] = {word, word >> 8, word >> 16, word >> 24, 0};
    for (int i = 0; i < 4; i++)
        if (text[i] && (text[i] < ' ' || text[i] > '~'))
            text[i] = '?';
    print(text);
}

void tell_cpu(void) {
    struct leaf who = cpuid(0, 0), features = cpuid(1, 0);
    print("cpu ");
    print_word(who.b);
    print_word(who.d);
    print_word(who.c);
    print("\nbrand ");
    if (cpuid(0x80000000, 0).a >= 0x80000004)
        for (u32 leaf = 0x80000002; leaf <= 0x80000004; leaf++) {
            struct leaf part = cpuid(leaf, 0);
            print_word(part.a);
            print_word(part.b);
            print_word(part.c);
            print_word(part.d);
        }
    print("\nhypervisor ");
    if (features.c >> 31) {
        struct leaf below = cpuid(0x40000000, 0);
        print_word(below.b);
        print_word(below.c);
        print_word(below.d);
    }
    print("\n");
    say("signature", features.a);
    say("invariant_tsc", cpuid(0x80000000, 0).a >= 0x80000007 ? cpuid(0x80000007, 0).d >> 8 & 1 : 0);
}

u32 pci_read(u32 device, u32 at) {
    outl(CONFIG_ADDRESS, 0x80000000 | device << 8 | at);
    return inl(CONFIG_DATA);
}

u32 power_management(void) {
    u32 base = pci_read(LPC_BRIDGE, PMBASE) & 0xff80;
    return base == 0xff80 ? 0 : base;
}

void power_off(void) {
    outw(power_management() + PM1_CONTROL, SLEEP_ENABLE);
    for (;;)
        __asm__ volatile("cli; hlt");
}

/* A power-off at once would take away what the other side has not read yet: it types q when it has. */
void say_goodbye(void) {
    for (u64 until = ticks() + PATIENCE; ticks() < until && !heard('q');)
        ;
    power_off();
}

void pace(void) {
    for (u64 until = ticks() + number_option("slow", 0) * TICKS_OF_A_MS; ticks() < until;)
        ;
}

/* Xen's docs/misc/pvh.pandoc: magic, version, flags, number of modules, their list, the command line. */
struct hvm_start_info {
    u32 magic, version, flags, modules;
    u64 module_list, command_line;
};

static const char *command_line(void) {
    const struct hvm_start_info *info = (const struct hvm_start_info *)(u64)start_info;
    return info->magic == 0x336ec578 && info->command_line ? (const char *)info->command_line : "";
}

/* How far two texts go together, up to the end of the first; 0 when they part before. */
static u64 begins(const char *first, const char *text) {
    u64 length = 0;
    for (; first[length]; length++)
        if (first[length] != text[length])
            return 0;
    return length;
}

const char *option(const char *name, const char *otherwise) {
    for (const char *at = command_line(); *at; at++) {
        u64 length = begins(name, at);
        if (length && at[length] == '=')
            return at + length + 1;
        while (at[1] && *at != ' ')
            at++;
    }
    return otherwise;
}

u64 number_option(const char *name, u64 otherwise) {
    const char *digits = option(name, "");
    if (*digits < '0' || *digits > '9')
        return otherwise;
    u64 value = 0;
    for (; *digits >= '0' && *digits <= '9'; digits++)
        value = 10 * value + *digits - '0';
    return value;
}

int listed(const char *word, const char *list) {
    while (*list && *list != ' ') {
        u64 length = begins(word, list);
        if (length && (!list[length] || list[length] == ',' || list[length] == ' '))
            return 1;
        while (*list && *list != ' ' && *list++ != ',')
            ;
    }
    return 0;
}
