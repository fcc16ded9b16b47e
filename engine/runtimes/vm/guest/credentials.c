/* What a process may do: limits, groups, ids, capabilities, seccomp. Run by the child, last before exec. */
#include "agent.h"
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>

int identity_of(struct words *words, struct identity *id) {
    uint32_t length;
    char *caps = value_of(words, "caps", &length);
    if (number_of(words, "uid", 10, 0, &id->uid) || number_of(words, "gid", 10, 0, &id->gid) || id->uid < 0 || id->gid < 0 ||
        id->uid > 0xfffffffell || id->gid > 0xfffffffell || number_of(words, "umask", 8, 022, &id->umask))
        return fail(EINVAL, "uid, gid, umask");
    id->no_new_privs = value_of(words, "no_new_privs", NULL) != NULL;
    id->has_caps = caps != NULL;
    if (!caps) return 0;
    struct part part[5];
    if (parts_of(caps, length, part, 5) != 5) return fail(EINVAL, "caps");
    for (int i = 0; i < 5; i++) {
        long long mask;
        if (number(part[i].at, 16, &mask)) return fail(EINVAL, "caps");
        id->caps[i] = mask;
    }
    return 0;
}

static int limits(struct words *words) {
    char *value;
    uint32_t length;
    int at = 1;
    while ((value = next_value(words, "rlimit", &at, &length))) {
        struct part part[3];
        long long resource, soft, hard;
        if (parts_of(value, length, part, 3) != 3 || number(part[0].at, 10, &resource) || number(part[1].at, 10, &soft) ||
            number(part[2].at, 10, &hard))
            return fail(EINVAL, "rlimit");
        struct rlimit limit = {soft, hard};
        if (prlimit(0, resource, &limit, NULL)) return fail(errno, "the limit %lld", resource);
    }
    return 0;
}

static int groups(struct words *words) {
    static gid_t list[1024];
    char *value;
    long long gid;
    int at = 1, count = 0;
    while ((value = next_value(words, "group", &at, NULL))) {
        if (count == 1024 || number(value, 10, &gid) || gid < 0 || gid > 0xfffffffell) return fail(EINVAL, "group");
        list[count++] = gid;
    }
    return syscall(SYS_setgroups, count, list) ? fail(errno, "setting the groups") : 0;
}

static int filter(struct words *words) {
    uint32_t length;
    char *program = value_of(words, "seccomp", &length);
    long long flags;
    if (!program) return 0;
    if (length % sizeof(struct sock_filter) || !length || length > 4096 * sizeof(struct sock_filter) ||
        number_of(words, "seccomp_flags", 10, 0, &flags))
        return fail(EINVAL, "seccomp");
    void *aligned = malloc(length);
    if (!aligned) return fail(ENOMEM, "seccomp");
    memcpy(aligned, program, length);
    struct sock_fprog code = {length / sizeof(struct sock_filter), aligned};
    return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, (unsigned)flags, &code) < 0 ? fail(errno, "the seccomp filter") : 0;
}

static int drop_bounding(uint64_t keep) {
    for (int cap = 0; cap < 64; cap++) {
        if (prctl(PR_CAPBSET_READ, cap, 0, 0, 0) < 0) break; /* above the kernel's last */
        if (!(keep >> cap & 1) && prctl(PR_CAPBSET_DROP, cap, 0, 0, 0)) return fail(errno, "dropping the capability %d", cap);
    }
    return 0;
}

static int set_caps(const uint64_t caps[5]) {
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct data[2];
    for (int half = 0; half < 2; half++)
        data[half] = (struct __user_cap_data_struct){caps[1] >> 32 * half, caps[2] >> 32 * half, caps[3] >> 32 * half};
    if (syscall(SYS_capset, &header, data)) return fail(errno, "setting the capabilities");
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
    for (int cap = 0; cap < 64; cap++)
        if (caps[4] >> cap & 1 && prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap, 0, 0))
            return fail(errno, "the ambient capability %d", cap);
    return 0;
}

int identity_take(struct words *words, struct identity *id) {
    int error;
    struct stat info;
    for (int fd = 0; fd < 3; fd++) /* so that /dev/stdout can be opened by who runs */
        if (!fstat(fd, &info) && (S_ISFIFO(info.st_mode) || (S_ISCHR(info.st_mode) && isatty(fd)))) (void)!fchown(fd, id->uid, -1);
    if ((error = limits(words))) return error;
    umask(id->umask & 0777);
    /* Without no_new_privs only CAP_SYS_ADMIN may set a filter: before it is dropped. With it as late as can be. */
    if (!id->no_new_privs && (error = filter(words))) return error;
    if (id->has_caps && (error = drop_bounding(id->caps[0]))) return error;
    if ((error = groups(words))) return error;
    if (id->has_caps) prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0);
    if (syscall(SYS_setresgid, (gid_t)id->gid, (gid_t)id->gid, (gid_t)id->gid)) return fail(errno, "setting the group");
    if (syscall(SYS_setresuid, (uid_t)id->uid, (uid_t)id->uid, (uid_t)id->uid)) return fail(errno, "setting the user");
    if (id->has_caps && (error = set_caps(id->caps))) return error;
    if (!id->no_new_privs) return 0;
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) return fail(errno, "no_new_privs");
    return filter(words);
}
