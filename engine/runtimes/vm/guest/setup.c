/* Verbs that set the guest up: clock, entropy, names, mounts, partitions, small files, sysctls; and its end. */
#include "agent.h"
#include <ctype.h>
#include <linux/blkpg.h>
#include <linux/fs.h>
#include <linux/random.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>

int read_file(const char *path, char *buffer, size_t size) {
    size_t have = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return -1;
    while (have < size - 1) {
        ssize_t count = read(fd, buffer + have, size - 1 - have);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) break;
        have += count;
    }
    close(fd);
    buffer[have] = 0;
    return have;
}

int write_file(const char *path, const char *data, size_t length) {
    int fd = open(path, O_WRONLY | O_CLOEXEC), error = 0;
    if (fd < 0) return errno;
    if (write(fd, data, length) != (ssize_t)length) error = errno ? errno : EIO;
    close(fd);
    return error;
}

int make_dirs(const char *path, mode_t mode) {
    char copy[4096];
    if (strlen(path) >= sizeof copy) return ENAMETOOLONG;
    strcpy(copy, path);
    for (char *at = copy + 1; *at; at++) {
        if (*at != '/') continue;
        *at = 0;
        if (mkdir(copy, 0755) && errno != EEXIST) return errno;
        *at = '/';
    }
    return mkdir(copy, mode) && errno != EEXIST ? errno : 0;
}

void mount_basics(void) {
    static const char *const table[][4] = {
        {"proc", "/proc", "proc", ""},      {"sysfs", "/sys", "sysfs", ""},
        {"devtmpfs", "/dev", "devtmpfs", ""}, {"cgroup2", CGROUPS, "cgroup2", ""},
        {"tmpfs", "/run", "tmpfs", "mode=755"}, {"devpts", "/dev/pts", "devpts", "mode=620,ptmxmode=666"},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        make_dirs(table[i][1], 0755);
        if (mount(table[i][0], table[i][1], table[i][2], MS_NOSUID | MS_NOEXEC, table[i][3]) && errno != EBUSY)
            say("agent: mount %s: %s", table[i][1], strerror(errno));
    }
    int console = open("/dev/console", O_RDWR);
    for (int fd = 0; console >= 0 && fd < 3; fd++) dup2(console, fd);
    if (console > 2) close(console);
    write_file("/proc/self/oom_score_adj", "-1000", 5);
    umask(022);
}

static int mount_verb(struct words *words) {
    char *source = value_of(words, "source", NULL), *target = value_of(words, "target", NULL);
    char *type = value_of(words, "type", NULL), *data = value_of(words, "data", NULL);
    long long flags;
    struct stat info;
    if (!target || *target != '/' || number_of(words, "flags", 10, 0, &flags)) return fail(EINVAL, "MOUNT target, flags");
    for (int tries = 0; source && !strncmp(source, "/dev/", 5) && stat(source, &info) && tries < 200; tries++) usleep(5000);
    int error;
    if ((flags & MS_BIND) && source && !stat(source, &info) && !S_ISDIR(info.st_mode)) {
        char parent[4096];
        snprintf(parent, sizeof parent, "%s", target);
        char *slash = strrchr(parent, '/');
        if (slash != parent) *slash = 0, make_dirs(parent, 0755);
        int fd = open(target, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
        error = fd < 0 ? errno : (close(fd), 0);
    } else error = make_dirs(target, 0755);
    if (error) return fail(error, "making %.200s", target);
    if (mount(source ? source : "none", target, type, flags, data)) return fail(errno, "mount of %.80s at %.80s", source ? source : "", target);
    unsigned long more = flags & (MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC);
    if ((flags & MS_BIND) && more && mount(NULL, target, NULL, MS_REMOUNT | MS_BIND | more, NULL))
        return fail(errno, "flags of the mount at %.200s", target);
    return 0;
}

static int put(struct words *words) {
    char *path = value_of(words, "path", NULL), part[4096];
    uint32_t length;
    char *data = value_of(words, "data", &length);
    long long mode;
    if (!path || !data || number_of(words, "mode", 8, 0644, &mode)) return fail(EINVAL, "PUT path, data, mode");
    snprintf(part, sizeof part, "%s", path);
    char *slash = strrchr(part, '/');
    if (slash && slash != part) *slash = 0, make_dirs(part, 0755);
    snprintf(part, sizeof part, "%.4000s.part", path);
    int fd = open(part, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600), error = 0;
    if (fd < 0) return fail(errno, "writing %.200s", path);
    if (write(fd, data, length) != (ssize_t)length) error = errno ? errno : ENOSPC;
    if (!error && (fchmod(fd, mode) || rename(part, path))) error = errno;
    close(fd);
    if (error) unlink(part);
    return error ? fail(error, "writing %.200s", path) : 0;
}

static int parts(struct words *words) {
    char *disk = value_of(words, "disk", NULL), *value;
    uint32_t length;
    int at = 1, error = 0;
    if (!disk) return fail(EINVAL, "PARTS disk");
    int fd = -1;
    for (int tries = 0; tries < 200 && (fd = open(disk, O_RDONLY | O_CLOEXEC)) < 0 && errno == ENOENT; tries++) usleep(5000);
    if (fd < 0) return fail(errno, "opening %.200s", disk);
    while (!error && (value = next_value(words, "part", &at, &length))) {
        struct part piece[3];
        long long what, start, size;
        if (parts_of(value, length, piece, 3) != 3 || number(piece[0].at, 10, &what) || number(piece[1].at, 10, &start) ||
            number(piece[2].at, 10, &size)) {
            error = fail(EINVAL, "PARTS part");
            break;
        }
        struct blkpg_partition partition = {.start = start, .length = size, .pno = what};
        struct blkpg_ioctl_arg arg = {BLKPG_ADD_PARTITION, 0, sizeof partition, &partition};
        if (ioctl(fd, BLKPG, &arg)) error = fail(errno, "part %lld of %.100s", what, disk);
    }
    close(fd);
    return error;
}

int set_sysctls(struct words *words, const char *key) {
    char *value, path[600];
    uint32_t length;
    int at = 1;
    while ((value = next_value(words, key, &at, &length))) {
        struct part part[2];
        if (parts_of(value, length, part, 2) != 2 || part[0].length > 500 || strstr(part[0].at, "..")) return fail(EINVAL, "%s", key);
        int slashes = strchr(part[0].at, '/') != NULL;
        snprintf(path, sizeof path, "/proc/sys/%s", part[0].at);
        for (char *dot = path + 10; !slashes && *dot; dot++)
            if (*dot == '.') *dot = '/';
        int error = write_file(path, part[1].at, part[1].length);
        if (error) return fail(error, "sysctl %.200s", part[0].at);
    }
    return 0;
}

static int entropy(struct words *words) {
    uint32_t length;
    char *seed = value_of(words, "seed", &length);
    struct {
        struct rand_pool_info info;
        char data[512];
    } pool;
    if (!seed || length > sizeof pool.data) return fail(EINVAL, "ENTROPY seed");
    int fd = open("/dev/urandom", O_RDWR | O_CLOEXEC), error = 0;
    if (fd < 0) return fail(errno, "/dev/urandom");
    pool.info.entropy_count = length * 8;
    pool.info.buf_size = length;
    memcpy(pool.info.buf, seed, length);
    if (ioctl(fd, RNDADDENTROPY, &pool) || ioctl(fd, RNDRESEEDCRNG)) error = fail(errno, "seeding the generator");
    close(fd);
    return error;
}

/* Unmount what can be, last first, so that filesystems of disks are left clean. */
static void unmount_all(void) {
    static char table[65536];
    static char *targets[512];
    for (int turn = 0; turn < 2; turn++) {
        int count = 0;
        if (read_file("/proc/self/mounts", table, sizeof table) < 0) return;
        for (char *line = strtok(table, "\n"); line && count < 512; line = strtok(NULL, "\n")) {
            char *target = strchr(line, ' ');
            if (target && !strncmp(target + 1, "/run/", 5)) targets[count++] = target + 1;
        }
        while (count--) {
            targets[count][strcspn(targets[count], " ")] = 0;
            if (umount2(targets[count], 0)) mount(NULL, targets[count], NULL, MS_REMOUNT | MS_RDONLY, NULL);
        }
    }
}

/* What is mounted below /run, last first; the errno of the last that cannot be. */
static int unmount_run(void) {
    static char table[65536];
    static char *targets[512];
    int count = 0, error = 0;
    if (read_file("/proc/self/mounts", table, sizeof table) < 0) return errno;
    for (char *line = strtok(table, "\n"); line && count < 512; line = strtok(NULL, "\n")) {
        char *target = strchr(line, ' ');
        if (target && !strncmp(target + 1, "/run/", 5)) targets[count++] = target + 1;
    }
    while (count--) {
        targets[count][strcspn(targets[count], " ")] = 0;
        if (umount2(targets[count], 0)) error = fail(errno, "umount %.200s", targets[count]);
    }
    return error;
}

/* The disk with no partition, nothing of it in memory. EBUSY while a filesystem has it. */
static int disk_forget(const char *disk) {
    int error = 0, fd = open(disk, O_RDONLY | O_EXCL | O_CLOEXEC);
    if (fd < 0) return fail(errno, "%.200s", disk);
    for (int number = 1; !error; number++) {
        struct blkpg_partition partition = {.pno = number};
        struct blkpg_ioctl_arg arg = {BLKPG_DEL_PARTITION, 0, sizeof partition, &partition};
        if (ioctl(fd, BLKPG, &arg)) {
            if (errno == ENXIO) break;
            error = fail(errno, "part %d of %.100s", number, disk);
        }
    }
    if (!error && ioctl(fd, BLKFLSBUF, 0)) error = fail(errno, "flushing %.100s", disk);
    close(fd);
    return error;
}

/* As before RUN: for a program that was run to warm the guest up, not for a container. */
static int reset(struct words *words) {
    char *disk;
    int error = EBUSY;
    if (container_pid()) return fail(EBUSY, "the container of this guest");
    process_forget();
    for (int tries = 0; error && tries < 200; tries++) { /* what ended lets go a little later */
        if (tries) usleep(5000);
        error = unmount_run();
        if (!error && rmdir(CGROUP) && errno != ENOENT) error = fail(errno, "the guest's cgroup");
        for (int at = 1; !error && (disk = next_value(words, "disk", &at, NULL));) error = disk_forget(disk);
    }
    cgroup_prepare();
    return error;
}

void end_guest(int off) {
    kill(-1, SIGKILL);
    for (int turns = 0; turns < 500; turns++) { /* what hangs in the kernel is left to it */
        pid_t pid = waitpid(-1, NULL, WNOHANG);
        if (pid < 0) break;
        if (!pid) usleep(1000);
    }
    process_forget();
    rmdir(CGROUP);
    unmount_all();
    sync();
    if (off) reboot(RB_POWER_OFF);
    reboot(RB_AUTOBOOT);
    for (;;) pause();
}

int verb_setup(uint32_t stream, struct words *words) {
    const char *verb = words->at[0];
    long long value;
    uint32_t length;
    char *text;
    if (!strcmp(verb, "MOUNT")) return mount_verb(words);
    if (!strcmp(verb, "UMOUNT")) {
        text = value_of(words, "target", NULL);
        return !text ? fail(EINVAL, "UMOUNT target") : umount2(text, MNT_DETACH) ? fail(errno, "umount %.200s", text) : 0;
    }
    if (!strcmp(verb, "MKDIR")) {
        text = value_of(words, "path", NULL);
        if (!text || *text != '/' || number_of(words, "mode", 8, 0755, &value)) return fail(EINVAL, "MKDIR path, mode");
        int error = make_dirs(text, value);
        return error ? fail(error, "mkdir %.200s", text) : 0;
    }
    if (!strcmp(verb, "PUT")) return put(words);
    if (!strcmp(verb, "ROOT")) {
        char *name = value_of(words, "name", NULL);
        text = value_of(words, "path", NULL);
        if (!name || !*name || !text || *text != '/') return fail(EINVAL, "ROOT name, path");
        int error = files_root(name, text);
        return error ? fail(error, "the root %.40s", name) : 0;
    }
    if (!strcmp(verb, "PARTS")) return parts(words);
    if (!strcmp(verb, "NET")) return verb_net(words);
    if (!strcmp(verb, "SYSCTL")) return set_sysctls(words, "set");
    if (!strcmp(verb, "ENTROPY")) return entropy(words);
    if (!strcmp(verb, "CLOCK")) {
        if (!value_of(words, "ns", NULL) || number_of(words, "ns", 10, 0, &value)) return fail(EINVAL, "CLOCK ns");
        long long slack, off;
        if (number_of(words, "slack", 10, 0, &slack)) return fail(EINVAL, "CLOCK slack");
        struct timespec now;
        clock_gettime(CLOCK_REALTIME, &now);
        off = now.tv_sec * 1000000000ll + now.tv_nsec - value;
        if (off < slack && -off < slack) return 0;
        now = (struct timespec){value / 1000000000, value % 1000000000};
        return clock_settime(CLOCK_REALTIME, &now) ? fail(errno, "setting the clock") : 0;
    }
    if (!strcmp(verb, "HOSTNAME")) {
        text = value_of(words, "name", &length);
        return !text ? fail(EINVAL, "HOSTNAME name") : sethostname(text, length) ? fail(errno, "setting the hostname") : 0;
    }
    if (!strcmp(verb, "RESET")) return reset(words);
    if (!strcmp(verb, "SYNC")) {
        sync();
        return 0;
    }
    if (!strcmp(verb, "POWEROFF")) {
        int off = value_of(words, "off", NULL) != NULL;
        respond(stream, 0, NULL);
        process_flush();
        flush_queue(1000);
        end_guest(off);
    }
    return -1;
}
