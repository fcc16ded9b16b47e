/* The guest's interfaces, by rtnetlink (rtnetlink(7)). */
#include "agent.h"
#include <arpa/inet.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

struct message {
    struct nlmsghdr header;
    char data[512];
};

static void attribute(struct message *message, int type, const void *data, int length) {
    struct rtattr *at = (struct rtattr *)((char *)message + NLMSG_ALIGN(message->header.nlmsg_len));
    at->rta_type = type;
    at->rta_len = RTA_LENGTH(length);
    memcpy(RTA_DATA(at), data, length);
    message->header.nlmsg_len = NLMSG_ALIGN(message->header.nlmsg_len) + RTA_ALIGN(at->rta_len);
}

static void *begin(struct message *message, int type, int flags, int size) {
    memset(message, 0, sizeof *message);
    message->header = (struct nlmsghdr){NLMSG_LENGTH(size), type, NLM_F_REQUEST | NLM_F_ACK | flags, 1, 0};
    return NLMSG_DATA(&message->header);
}

static int talk(int fd, struct message *message) {
    struct {
        struct nlmsghdr header;
        struct nlmsgerr error;
        char rest[4096];
    } answer;
    if (send(fd, message, message->header.nlmsg_len, 0) < 0) return errno;
    ssize_t count = recv(fd, &answer, sizeof answer, 0);
    if (count < 0) return errno;
    if (count < (ssize_t)NLMSG_LENGTH(sizeof answer.error) || answer.header.nlmsg_type != NLMSG_ERROR) return EPROTO;
    return -answer.error.error;
}

/* "10.0.2.15/24" -> family, bytes, prefix */
static int address(char *text, int *family, unsigned char *out, long long *prefix) {
    char *slash = strchr(text, '/');
    if (!slash) return EINVAL;
    *slash = 0;
    *family = strchr(text, ':') ? AF_INET6 : AF_INET;
    int ok = inet_pton(*family, text, out);
    *slash = '/';
    if (ok != 1 || number(slash + 1, 10, prefix) || *prefix < 0 || *prefix > (*family == AF_INET ? 32 : 128)) return EINVAL;
    return 0;
}

static int change_link(int fd, unsigned index, int up, const unsigned char *mac, long long mtu) {
    struct message message;
    struct ifinfomsg *link = begin(&message, RTM_NEWLINK, 0, sizeof *link);
    link->ifi_index = index;
    link->ifi_change = IFF_UP;
    link->ifi_flags = up ? IFF_UP : 0;
    uint32_t number = mtu;
    if (mac) attribute(&message, IFLA_ADDRESS, mac, 6);
    if (mtu) attribute(&message, IFLA_MTU, &number, 4);
    return talk(fd, &message);
}

static int add_address(int fd, unsigned index, char *text) {
    struct message message;
    unsigned char bytes[16];
    long long prefix;
    int family;
    if (address(text, &family, bytes, &prefix)) return fail(EINVAL, "the address %.60s", text);
    int size = family == AF_INET ? 4 : 16;
    struct ifaddrmsg *body = begin(&message, RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, sizeof *body);
    *body = (struct ifaddrmsg){family, prefix, IFA_F_PERMANENT | (family == AF_INET6 ? IFA_F_NODAD : 0), 0, index};
    attribute(&message, IFA_LOCAL, bytes, size);
    attribute(&message, IFA_ADDRESS, bytes, size);
    if (family == AF_INET && prefix < 31) {
        uint32_t all;
        memcpy(&all, bytes, 4);
        all |= htonl(prefix ? 0xffffffffu >> prefix : 0xffffffffu);
        attribute(&message, IFA_BROADCAST, &all, 4);
    }
    int error = talk(fd, &message);
    return error ? fail(error, "the address %.60s", text) : 0;
}

/* One that is not there is gone already. */
static int remove_address(int fd, unsigned index, char *text) {
    struct message message;
    unsigned char bytes[16];
    long long prefix;
    int family;
    if (address(text, &family, bytes, &prefix)) return fail(EINVAL, "the address %.60s", text);
    struct ifaddrmsg *body = begin(&message, RTM_DELADDR, 0, sizeof *body);
    *body = (struct ifaddrmsg){family, prefix, 0, 0, index};
    attribute(&message, IFA_LOCAL, bytes, family == AF_INET ? 4 : 16);
    int error = talk(fd, &message);
    return error && error != EADDRNOTAVAIL ? fail(error, "the address %.60s", text) : 0;
}

static int add_route(int fd, unsigned index, char *value, uint32_t length) {
    struct message message;
    struct part part[3];
    unsigned char to[16], by[16];
    long long prefix, metric = 0;
    int family, count = parts_of(value, length, part, 3);
    if (count < 2 || (count > 2 && (number(part[2].at, 10, &metric) || metric < 0 || metric > UINT32_MAX)) || address(part[0].at, &family, to, &prefix) ||
        (part[1].length && inet_pton(family, part[1].at, by) != 1))
        return fail(EINVAL, "a route");
    int size = family == AF_INET ? 4 : 16;
    struct rtmsg *body = begin(&message, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, sizeof *body);
    *body = (struct rtmsg){.rtm_family = family, .rtm_dst_len = prefix, .rtm_table = RT_TABLE_MAIN, .rtm_protocol = RTPROT_STATIC,
                           .rtm_scope = part[1].length || family == AF_INET6 ? RT_SCOPE_UNIVERSE : RT_SCOPE_LINK,
                           .rtm_type = RTN_UNICAST};
    if (prefix) attribute(&message, RTA_DST, to, size);
    if (part[1].length) attribute(&message, RTA_GATEWAY, by, size);
    attribute(&message, RTA_OIF, &index, 4);
    uint32_t priority = metric;
    if (metric) attribute(&message, RTA_PRIORITY, &priority, 4);
    int error = talk(fd, &message);
    return error ? fail(error, "the route %.60s by %.60s", part[0].at, part[1].at) : 0;
}

static int interface(int fd, struct words *words, unsigned index) {
    unsigned char mac[6];
    char *text, *value;
    uint32_t length;
    long long mtu, up;
    int at, error, rest = 0;
    if (number_of(words, "mtu", 10, 0, &mtu) || mtu < 0 || mtu > 65536 || number_of(words, "up", 10, 0, &up))
        return fail(EINVAL, "NET mtu, up");
    text = value_of(words, "mac", NULL);
    if (text) {
        if (sscanf(text, "%2hhx:%2hhx:%2hhx:%2hhx:%2hhx:%2hhx%n", mac, mac + 1, mac + 2, mac + 3, mac + 4, mac + 5, &rest) != 6 ||
            text[rest])
            return fail(EINVAL, "NET mac");
        if ((error = change_link(fd, index, 0, NULL, 0))) return fail(error, "taking the interface down");
    }
    if ((text || mtu) && (error = change_link(fd, index, 0, text ? mac : NULL, mtu))) return fail(error, "its mac or mtu");
    if (up && (error = change_link(fd, index, 1, NULL, 0))) return fail(error, "taking the interface up");
    for (at = 1; (value = next_value(words, "gone", &at, NULL));)
        if ((error = remove_address(fd, index, value))) return error;
    for (at = 1; (value = next_value(words, "addr", &at, NULL));)
        if ((error = add_address(fd, index, value))) return error;
    for (at = 1; (value = next_value(words, "route", &at, &length));)
        if ((error = add_route(fd, index, value, length))) return error;
    return 0;
}

int verb_net(struct words *words) {
    char *name = value_of(words, "iface", NULL);
    unsigned index = name ? if_nametoindex(name) : 0;
    if (!index) return fail(ENODEV, "the interface %.32s", name ? name : "");
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    if (fd < 0) return fail(errno, "netlink");
    int error = interface(fd, words, index);
    close(fd);
    return error;
}

void loopback_up(void) {
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE), error = fd < 0 ? errno : change_link(fd, 1, 1, NULL, 0);
    if (error) say("agent: the loopback interface: %s", strerror(error));
    if (fd >= 0) close(fd);
}
