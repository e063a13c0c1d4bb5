/* net.c - one DHCP client (RFC 2131) for every Ethernet interface.
 *
 * busybox's udhcpc runs a shell script with half a dozen processes at each step, which costs more than the
 * whole exchange. Here a parent watches the kernel for interfaces and keeps one child for each, so that an
 * interface nobody answers on, or one plugged in later, never delays another.
 */
#define _GNU_SOURCE
#include "micro.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_packet.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <net/route.h>
#include <netinet/ip.h>
#include <netinet/udp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

enum { DISCOVER = 1, OFFER, REQUEST, DECLINE, ACK, NAK };
enum {
    OPTION_MASK = 1, OPTION_ROUTER = 3, OPTION_DNS = 6, OPTION_HOSTNAME = 12, OPTION_DOMAIN = 15, OPTION_MTU = 26,
    OPTION_ADDRESS = 50, OPTION_LEASE = 51, OPTION_TYPE = 53, OPTION_SERVER = 54, OPTION_WANTED = 55, OPTION_T1 = 58,
    OPTION_T2 = 59, OPTION_CLIENT = 61, OPTION_RAPID = 80, OPTION_END = 255
};

struct message {
    uint8_t op, hardware, length, hops;
    uint32_t id;
    uint16_t seconds, flags;
    uint32_t client, yours, server, relay;
    uint8_t mac[16], name[64], file[128];
    uint32_t cookie;
    uint8_t options[312];
} __attribute__((packed));

struct packet {
    struct iphdr ip;
    struct udphdr udp;
    struct message message;
} __attribute__((packed));

struct lease {
    uint32_t address, server, mask, router; /* network byte order */
    uint32_t seconds, renew_s, rebind_s;
    uint16_t mtu;
    char resolver[512];
};

static char name[IFNAMSIZ];
static int ifindex;
static uint8_t mac[6];

/* --- messages --------------------------------------------------------------------------------- */

static uint8_t *put_option(uint8_t *out, uint8_t code, const void *data, size_t length)
{
    *out++ = code;
    *out++ = (uint8_t)length;
    memcpy(out, data, length);
    return out + length;
}

/* `lease` is what is asked for in a REQUEST; `renewing` says that its address is in use already. */
static size_t make_message(struct message *out, uint8_t type, uint32_t id, const struct lease *lease, bool renewing)
{
    static const uint8_t wanted[] = {OPTION_MASK, OPTION_ROUTER, OPTION_DNS, OPTION_DOMAIN, OPTION_MTU, OPTION_LEASE, OPTION_T1, OPTION_T2};
    memset(out, 0, sizeof *out);
    out->op = 1;
    out->hardware = 1;
    out->length = sizeof mac;
    out->id = id;
    memcpy(out->mac, mac, sizeof mac);
    out->cookie = htonl(0x63825363);
    out->client = renewing ? lease->address : 0;
    uint8_t *at = put_option(out->options, OPTION_TYPE, &type, 1);
    uint8_t client[7] = {1};
    memcpy(client + 1, mac, sizeof mac);
    at = put_option(at, OPTION_CLIENT, client, sizeof client);
    if (type == DISCOVER)
        at = put_option(at, OPTION_RAPID, "", 0); /* RFC 4039: saves a round trip where the server agrees */
    if (type == REQUEST && !renewing) {
        at = put_option(at, OPTION_ADDRESS, &lease->address, 4);
        at = put_option(at, OPTION_SERVER, &lease->server, 4);
    }
    char host[65];
    if (gethostname(host, sizeof host) == 0 && host[0] && strcmp(host, "(none)") != 0)
        at = put_option(at, OPTION_HOSTNAME, host, strlen(host));
    at = put_option(at, OPTION_WANTED, wanted, sizeof wanted);
    *at++ = OPTION_END;
    size_t length = (size_t)(at - (uint8_t *)out);
    return length < 300 ? 300 : length; /* BOOTP's minimum; some servers drop less */
}

/* Returns the type of an answer to us, 0 for anything else. */
static int read_message(const struct message *in, size_t length, uint32_t id, struct lease *lease)
{
    if (length < offsetof(struct message, options) || in->op != 2 || in->id != id ||
        memcmp(in->mac, mac, sizeof mac) != 0 || in->cookie != htonl(0x63825363))
        return 0;
    int type = 0;
    memset(lease, 0, sizeof *lease);
    lease->address = in->yours;
    char domain[256] = "", servers[256] = "";
    const uint8_t *at = in->options, *end = (const uint8_t *)in + length;
    while (at < end && *at != OPTION_END) {
        if (*at == 0) {
            at++;
            continue;
        }
        if (at + 2 > end || at + 2 + at[1] > end)
            break;
        uint8_t code = at[0], size = at[1];
        const uint8_t *value = at + 2;
        uint32_t number = 0;
        if (size >= 4)
            memcpy(&number, value, 4);
        if (code == OPTION_TYPE && size == 1)
            type = value[0];
        else if (code == OPTION_MASK)
            lease->mask = number;
        else if (code == OPTION_ROUTER)
            lease->router = number;
        else if (code == OPTION_SERVER)
            lease->server = number;
        else if (code == OPTION_LEASE)
            lease->seconds = ntohl(number);
        else if (code == OPTION_T1)
            lease->renew_s = ntohl(number);
        else if (code == OPTION_T2)
            lease->rebind_s = ntohl(number);
        else if (code == OPTION_MTU && size == 2)
            lease->mtu = (uint16_t)(value[0] << 8 | value[1]);
        else if (code == OPTION_DOMAIN)
            snprintf(domain, sizeof domain, "search %.*s\n", size, (const char *)value);
        else if (code == OPTION_DNS)
            for (int i = 0; i + 4 <= size && strlen(servers) < 200; i += 4)
                sprintf(servers + strlen(servers), "nameserver %d.%d.%d.%d\n", value[i], value[i + 1], value[i + 2], value[i + 3]);
        at += 2 + size;
    }
    snprintf(lease->resolver, sizeof lease->resolver, "%s%s", domain, servers);
    if (!lease->seconds)
        lease->seconds = 3600;
    if (!lease->renew_s || lease->renew_s >= lease->seconds)
        lease->renew_s = lease->seconds / 2;
    if (!lease->rebind_s || lease->rebind_s >= lease->seconds)
        lease->rebind_s = lease->seconds / 8 * 7;
    return type;
}

/* --- the wire --------------------------------------------------------------------------------- */

static uint16_t checksum(const void *data, size_t length)
{
    uint32_t sum = 0;
    const uint8_t *at = data;
    for (; length > 1; length -= 2, at += 2)
        sum += (uint32_t)(at[0] << 8 | at[1]);
    if (length)
        sum += (uint32_t)at[0] << 8;
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return htons((uint16_t)~sum);
}

static struct sockaddr_ll link_address(uint16_t protocol)
{
    struct sockaddr_ll to = {.sll_family = AF_PACKET, .sll_protocol = htons(protocol), .sll_ifindex = ifindex, .sll_halen = 6};
    memset(to.sll_addr, 0xff, 6);
    return to;
}

/* Without an address there is no IP to send with: whole packets then, from 0.0.0.0 to everybody. */
static void broadcast(int raw, const struct message *message, size_t length, uint32_t source)
{
    struct packet packet = {0};
    size_t total = sizeof packet.ip + sizeof packet.udp + length;
    memcpy(&packet.message, message, length);
    packet.udp.source = htons(68);
    packet.udp.dest = htons(67);
    packet.udp.len = htons((uint16_t)(sizeof packet.udp + length));
    packet.ip.version = 4;
    packet.ip.ihl = 5;
    packet.ip.ttl = 64;
    packet.ip.protocol = IPPROTO_UDP;
    packet.ip.saddr = source;
    packet.ip.daddr = INADDR_BROADCAST;
    packet.ip.tot_len = htons((uint16_t)total);
    packet.ip.check = checksum(&packet.ip, sizeof packet.ip);
    struct sockaddr_ll to = link_address(ETH_P_IP); /* the UDP checksum may be left out (RFC 768) */
    sendto(raw, &packet, total, 0, (struct sockaddr *)&to, sizeof to);
}

static int receive(int raw, int timeout_ms, uint32_t id, struct lease *lease)
{
    long deadline = now_ms() + timeout_ms;
    for (;;) {
        long left = deadline - now_ms();
        struct pollfd ready = {raw, POLLIN, 0};
        if (left < 0 || poll(&ready, 1, (int)left) <= 0)
            return 0;
        struct packet packet;
        ssize_t got = recv(raw, &packet, sizeof packet, 0);
        ssize_t head = sizeof packet.ip + sizeof packet.udp;
        if (got < head || packet.ip.protocol != IPPROTO_UDP || packet.ip.ihl != 5 || packet.udp.dest != htons(68))
            continue;
        int type = read_message(&packet.message, (size_t)(got - head), id, lease);
        if (type)
            return type;
    }
}

/* Say who has our address now. A host that was already trying to reach it holds a failed neighbour entry, which
 * an announcement may leave alone (arp_accept=0) but a question from us to it corrects at once. */
static void announce(const struct lease *lease)
{
    struct {
        struct arphdr head;
        uint8_t from_mac[6];
        uint32_t from;
        uint8_t to_mac[6];
        uint32_t to;
    } __attribute__((packed)) arp = {
        .head = {htons(ARPHRD_ETHER), htons(ETH_P_IP), 6, 4, htons(ARPOP_REQUEST)}, .from = lease->address};
    memcpy(arp.from_mac, mac, 6);
    int raw = socket(AF_PACKET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    uint32_t targets[] = {lease->address, lease->router ? lease->router : lease->server};
    struct sockaddr_ll to = link_address(ETH_P_ARP);
    for (int i = 0; i < 2; i++) {
        arp.to = targets[i];
        sendto(raw, &arp, sizeof arp, 0, (struct sockaddr *)&to, sizeof to);
    }
    close(raw);
}

/* --- the interface ---------------------------------------------------------------------------- */

static void set_address(int control, unsigned long request, uint32_t address)
{
    struct ifreq change = {0};
    strcpy(change.ifr_name, name);
    struct sockaddr_in *to = (struct sockaddr_in *)&change.ifr_addr;
    to->sin_family = AF_INET;
    to->sin_addr.s_addr = address;
    if (ioctl(control, request, &change) != 0 && address)
        say("net %s: %s", name, strerror(errno));
}

static void bring_up(int control)
{
    struct ifreq change = {0};
    strcpy(change.ifr_name, name);
    ioctl(control, SIOCGIFFLAGS, &change);
    change.ifr_flags |= IFF_UP | IFF_RUNNING;
    ioctl(control, SIOCSIFFLAGS, &change);
}

/* resolv.conf is made of one part for each interface, in the order of their names. */
static void write_resolver(const char *part)
{
    char path[64], all[2048] = "";
    int lock = open("/run/vmctl/resolv.lock", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    flock(lock, LOCK_EX);
    snprintf(path, sizeof path, "/run/vmctl/resolv.%s", name);
    write_text(path, part, 0644);
    struct if_nameindex *all_names = if_nameindex();
    for (struct if_nameindex *one = all_names; one && one->if_index; one++) {
        snprintf(path, sizeof path, "/run/vmctl/resolv.%s", one->if_name);
        char *text = read_file(path, NULL);
        if (text && strlen(all) + strlen(text) < sizeof all)
            strcat(all, text);
        free(text);
    }
    if_freenameindex(all_names);
    write_text("/run/vmctl/resolv.conf", all, 0644);
    close(lock);
}

static void configure(const struct lease *lease)
{
    int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    set_address(control, SIOCSIFADDR, lease->address);
    uint32_t mask = lease->mask ? lease->mask : htonl(0xffffff00);
    set_address(control, SIOCSIFNETMASK, mask);
    set_address(control, SIOCSIFBRDADDR, lease->address | ~mask);
    if (lease->mtu >= 576) {
        struct ifreq change = {.ifr_mtu = lease->mtu};
        strcpy(change.ifr_name, name);
        ioctl(control, SIOCSIFMTU, &change);
    }
    if (lease->router) {
        struct rtentry route = {.rt_flags = RTF_UP | RTF_GATEWAY, .rt_dev = name};
        route.rt_metric = (short)(ifindex + 1); /* the kernel takes one off; the first interface wins */
        ((struct sockaddr_in *)&route.rt_dst)->sin_family = AF_INET;
        ((struct sockaddr_in *)&route.rt_genmask)->sin_family = AF_INET;
        struct sockaddr_in *gateway = (struct sockaddr_in *)&route.rt_gateway;
        gateway->sin_family = AF_INET;
        gateway->sin_addr.s_addr = lease->router;
        if (ioctl(control, SIOCADDRT, &route) != 0 && errno != EEXIST)
            say("net %s: route: %s", name, strerror(errno));
    }
    close(control);
    announce(lease);
}

static void deconfigure(void)
{
    int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    set_address(control, SIOCSIFADDR, 0);
    close(control);
    write_resolver("");
}

/* --- one interface's child ---------------------------------------------------------------------- */

static uint32_t new_id(void)
{
    uint32_t id;
    if (getrandom(&id, sizeof id, GRND_NONBLOCK) != sizeof id)
        id = (uint32_t)now_ms() * 2654435761u ^ (uint32_t)getpid() << 16 ^ (uint32_t)mac[5];
    return id;
}

/* Until there is a lease. The waits grow from a quarter second to eight and never end: a network may come late. */
static void get_lease(int raw, int seed_ready, struct lease *lease)
{
    struct message message;
    for (int wait_ms = 250;; wait_ms = wait_ms < 8000 ? wait_ms * 2 : wait_ms) {
        uint32_t id = new_id();
        size_t length = make_message(&message, DISCOVER, id, NULL, false);
        message.flags = htons(0x8000); /* answer to everybody: we have no address yet */
        broadcast(raw, &message, length, 0);
        int type = receive(raw, wait_ms, id, lease);
        if (type == ACK)
            return;
        if (type != OFFER)
            continue;
        /* The name in the request is the one servers enter into DNS: wait till the seed has told it. */
        struct pollfd known = {seed_ready, POLLIN, 0};
        poll(&known, 1, 3000);
        struct lease granted;
        length = make_message(&message, REQUEST, id, lease, false);
        message.flags = htons(0x8000);
        for (int tries = 0; tries < 3; tries++) {
            broadcast(raw, &message, length, 0);
            type = receive(raw, wait_ms < 1000 ? 1000 : wait_ms, id, &granted);
            if (type == ACK) {
                if (!granted.server)
                    granted.server = lease->server;
                *lease = granted;
                return;
            }
            if (type == NAK)
                break;
        }
    }
}

static void sleep_until(long deadline_ms)
{
    for (long left; (left = deadline_ms - now_ms()) > 0;)
        nap_ms(left > 60000 ? 60000 : (int)left);
}

/* Ask for more time: of the server from T1 on, of anybody from T2 on. False when the lease is lost. */
static bool renew(int raw, struct lease *lease)
{
    long began = now_ms();
    uint32_t id = new_id();
    struct message message;
    struct sockaddr_in us = {.sin_family = AF_INET, .sin_port = htons(68), .sin_addr.s_addr = lease->address};
    struct sockaddr_in server = {.sin_family = AF_INET, .sin_port = htons(67), .sin_addr.s_addr = lease->server};
    if (lease->seconds == 0xffffffff)
        for (;;)
            pause();
    sleep_until(began + lease->renew_s * 1000L);
    for (;;) {
        long age_s = (now_ms() - began) / 1000;
        if (age_s >= lease->seconds)
            return false;
        size_t length = make_message(&message, REQUEST, id, lease, true);
        int udp = -1;
        while (recv(raw, &(struct packet){0}, sizeof(struct packet), MSG_DONTWAIT) > 0)
            ; /* what came by since the last time */
        if (age_s < lease->rebind_s) {
            udp = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
            setsockopt(udp, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int));
            if (bind(udp, (struct sockaddr *)&us, sizeof us) == 0)
                sendto(udp, &message, length, 0, (struct sockaddr *)&server, sizeof server);
        } else {
            broadcast(raw, &message, length, lease->address);
        }
        struct lease granted;
        int type = receive(raw, 4000, id, &granted);
        if (udp >= 0)
            close(udp);
        if (type == ACK && granted.address == lease->address) {
            if (!granted.server)
                granted.server = lease->server;
            *lease = granted;
            return true;
        }
        if (type == NAK)
            return false;
        long edge_s = age_s < lease->rebind_s ? lease->rebind_s : lease->seconds;
        long pause_s = (edge_s - age_s) / 2; /* RFC 2131, 4.4.5: half of what remains */
        nap_ms((int)(pause_s < 1 ? 1000 : pause_s > 600 ? 600000 : pause_s * 1000));
    }
}

static int listen_raw(void)
{
    /* Protocol 0: a socket that receives from birth is first detached by bind(), which waits for an RCU period. */
    int raw = socket(AF_PACKET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct sockaddr_ll here = link_address(ETH_P_IP);
    bind(raw, (struct sockaddr *)&here, sizeof here);
    return raw;
}

static void client_main(int seed_ready, int network_up)
{
    struct lease lease;
    for (;;) {
        int raw = listen_raw();
        get_lease(raw, seed_ready, &lease);
        configure(&lease);
        if (eventfd_write(network_up, 1) != 0) { /* full: somebody knows already */
        }
        struct pollfd mounted = {seed_ready, POLLIN, 0};
        poll(&mounted, 1, -1); /* till then there is no /run to write to */
        char text[INET_ADDRSTRLEN];
        say("net %s %s", name, inet_ntop(AF_INET, &lease.address, text, sizeof text));
        write_resolver(lease.resolver);
        while (renew(raw, &lease))
            configure(&lease);
        close(raw);
        say("net %s: lease lost", name);
        deconfigure();
    }
}

/* --- all interfaces ----------------------------------------------------------------------------- */

static struct {
    int index;
    pid_t pid;
    uint8_t mac[6];
    bool pulled; /* its cable was, since its client began */
} clients[64];

enum { PATIENCE_MS = 400, CARRIER = 1 << 16 /* IFF_LOWER_UP: linux/if.h, which has it, and net/if.h exclude each other */ };
static int control = -1; /* a socket to ask the kernel by */
static long look_again_ms; /* when cards are to be looked at once more; 0: nobody waits for that */

/* There is none where it could not be forked, and -1 would be everybody. */
static void end_client(size_t slot)
{
    if (clients[slot].pid > 0)
        kill(clients[slot].pid, SIGKILL);
}

/* Whether the card has another MAC than its client knows of: it is another machine's now. */
static bool changed(size_t slot, struct ifreq *query)
{
    return ioctl(control, SIOCGIFNAME, query) == 0 && ioctl(control, SIOCGIFHWADDR, query) == 0 &&
           memcmp(query->ifr_hwaddr.sa_data, clients[slot].mac, 6) != 0;
}

/* Whether the card's cable was pulled, and its address, which goes, is that of the network it was in then: who plugs it
 * in may have moved the machine to another one, where the same address is another machine's. One without is asked for. */
static bool came_back(size_t slot, struct ifreq *query)
{
    bool pulled = clients[slot].pulled;
    clients[slot].pulled = false;
    if (!pulled || ioctl(control, SIOCGIFADDR, query) != 0)
        return false;
    end_client(slot); /* first: it may be about to renew that address */
    strcpy(name, query->ifr_name);
    set_address(control, SIOCSIFADDR, 0);
    return true;
}

/* A client for the card as it is now, in place of the one there is. One that has an address, told by who renewed the
 * machine, can wait for its lease: the first login comes first. */
static bool to_be_replaced(size_t slot, int index)
{
    struct ifreq query = {.ifr_ifindex = index};
    if (!changed(slot, &query))
        return came_back(slot, &query);
    memcpy(mac, query.ifr_hwaddr.sa_data, 6);
    if ((look_again_ms == 0 || now_ms() < look_again_ms) && ioctl(control, SIOCGIFADDR, &query) == 0) {
        struct lease told = {.address = ((struct sockaddr_in *)&query.ifr_addr)->sin_addr.s_addr};
        ifindex = index;
        if (look_again_ms == 0) {
            announce(&told); /* whoever waits at the cable asks but once a second */
            look_again_ms = now_ms() + PATIENCE_MS;
        }
        return false;
    }
    end_client(slot);
    return true;
}

/* `plugged`: whether its cable is, and the card runs. `pulled`: whether it is not; at a boot neither is so for a second. */
static void interface_seen(int index, bool plugged, bool pulled, int seed_ready, int network_up)
{
    size_t slot = 0;
    while (slot < 64 && clients[slot].index != index && clients[slot].index != 0)
        slot++;
    if (slot == 64)
        return;
    if (clients[slot].index == index && pulled)
        clients[slot].pulled = true;
    if (clients[slot].index == index && (!plugged || !to_be_replaced(slot, index)))
        return;
    struct ifreq query = {.ifr_ifindex = index};
    bool usable = ioctl(control, SIOCGIFNAME, &query) == 0 && ioctl(control, SIOCGIFHWADDR, &query) == 0 &&
                  query.ifr_hwaddr.sa_family == ARPHRD_ETHER;
    /* What the user makes later (bridges, bonds, veths) is the user's: a device stands behind a real card. */
    char device[64];
    snprintf(device, sizeof device, "/sys/class/net/%s/device", query.ifr_name);
    usable = usable && access(device, F_OK) == 0;
    if (usable) {
        strcpy(name, query.ifr_name);
        memcpy(mac, query.ifr_hwaddr.sa_data, 6);
        ifindex = index;
        bring_up(control);
        clients[slot].index = index;
        memcpy(clients[slot].mac, mac, sizeof mac);
        clients[slot].pulled = false;
        clients[slot].pid = fork_same_root();
        if (clients[slot].pid == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            client_main(seed_ready, network_up);
        }
    }
}

static void interface_gone(int index)
{
    for (size_t slot = 0; slot < 64; slot++)
        if (clients[slot].index == index) {
            end_client(slot);
            clients[slot].index = -1; /* not 0, which would end the search for others */
        }
}

static void loopback_up(void)
{
    strcpy(name, "lo");
    bring_up(control);
}

static void look_at_all(int seed_ready, int network_up)
{
    struct if_nameindex *all = if_nameindex();
    for (struct if_nameindex *one = all; one && one->if_index; one++) {
        struct ifreq query = {0};
        strncpy(query.ifr_name, one->if_name, IFNAMSIZ - 1);
        bool plugged = ioctl(control, SIOCGIFFLAGS, &query) == 0 && query.ifr_flags & IFF_RUNNING;
        interface_seen((int)one->if_index, plugged, false, seed_ready, network_up);
    }
    if_freenameindex(all);
}

/* Waits for news of the cards, but not beyond the time at which they are to be looked at anyway. */
static ssize_t news(int netlink, char *buffer, size_t room, int seed_ready, int network_up)
{
    struct pollfd ready = {netlink, POLLIN, 0};
    long left_ms = look_again_ms ? look_again_ms - now_ms() : -1;
    if (look_again_ms && (left_ms <= 0 || poll(&ready, 1, (int)left_ms) == 0)) {
        look_at_all(seed_ready, network_up);
        look_again_ms = 0;
        return -1;
    }
    return recv(netlink, buffer, room, 0);
}

/* Never returns. `modules` are loaded first: they are the drivers of the cards. */
void net_main(const char *modules, int seed_ready, int network_up)
{
    signal(SIGCHLD, SIG_IGN); /* the kernel reaps them */
    int netlink = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    struct sockaddr_nl here = {.nl_family = AF_NETLINK, .nl_groups = RTMGRP_LINK};
    bind(netlink, (struct sockaddr *)&here, sizeof here);
    load_modules(modules);
    control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    look_at_all(seed_ready, network_up);
    loopback_up();
    for (;;) {
        char buffer[8192] __attribute__((aligned(8)));
        ssize_t got = news(netlink, buffer, sizeof buffer, seed_ready, network_up);
        if (got < 0)
            continue; /* ENOBUFS: some were lost; the next change brings the state again */
        for (struct nlmsghdr *head = (struct nlmsghdr *)buffer; NLMSG_OK(head, (size_t)got); head = NLMSG_NEXT(head, got)) {
            struct ifinfomsg *info = NLMSG_DATA(head);
            if (head->nlmsg_type == RTM_NEWLINK) {
                bool pulled = info->ifi_flags & IFF_UP && !(info->ifi_flags & CARRIER);
                interface_seen(info->ifi_index, info->ifi_flags & IFF_RUNNING, pulled, seed_ready, network_up);
            }
            if (head->nlmsg_type == RTM_DELLINK)
                interface_gone(info->ifi_index);
        }
    }
}

/* Whether something on this machine listens on the TCP port. */
bool listening(int port)
{
    static const char *const tables[] = {"/proc/net/tcp", "/proc/net/tcp6"};
    for (int i = 0; i < 2; i++) {
        char *table = read_file(tables[i], NULL), *rest;
        bool found = false;
        for (char *line = table ? strtok_r(table, "\n", &rest) : NULL; line; line = strtok_r(NULL, "\n", &rest)) {
            unsigned local, state;
            if (sscanf(line, "%*d: %*[0-9A-F]:%x %*[0-9A-F]:%*x %x", &local, &state) == 2)
                found |= local == (unsigned)port && state == 0x0a;
        }
        free(table);
        if (found)
            return true;
    }
    return false;
}
