/* The child's side of RUN and EXEC: from a new process to the program of the container.
   It is alone in its memory: what it says goes by the status socket, and it ends in exec or _exit. */
#include "agent.h"
#include <linux/openat2.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <termios.h>

static struct child *self;
static int root = -1; /* of the container, before it is / */

static void give_up(int error) {
    char text[5 + sizeof step] = "E";
    memcpy(text + 1, &error, 4);
    strcpy(text + 5, step);
    (void)!send(self->status, text, 5 + strlen(step), MSG_NOSIGNAL);
    _exit(127);
}

static void check(int error) {
    if (error) give_up(error);
}

static int in_root(const char *path, uint64_t flags) {
    struct open_how how = {.flags = flags | O_CLOEXEC, .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS};
    return syscall(SYS_openat2, root, path, &how, sizeof how);
}

/* O_PATH of `path` in the container, made as a directory or file with its parents when absent; -1. */
static int target_of(const char *path, int file) {
    char copy[4096];
    if (snprintf(copy, sizeof copy, "%s", path) >= (int)sizeof copy) return errno = ENAMETOOLONG, -1;
    int fd = in_root(*copy ? copy : "/", O_PATH);
    if (fd >= 0 || errno != ENOENT) return fd;
    for (size_t end = strlen(copy); end > 1 && copy[end - 1] == '/'; end--) copy[end - 1] = 0;
    char *name = strrchr(copy, '/');
    if (!name) return errno = EINVAL, -1;
    *name++ = 0;
    int parent = target_of(copy, 0);
    if (parent < 0) return -1;
    if (file) {
        int made = openat(parent, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0644);
        if (made >= 0) close(made);
    } else mkdirat(parent, name, 0755);
    close(parent);
    return in_root(path, O_PATH);
}

static const char *link_of(int fd) {
    static char path[40];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    return path;
}

static int mount_one(char *value, uint32_t length) {
    static const unsigned long propagation = MS_PRIVATE | MS_SLAVE | MS_SHARED | MS_UNBINDABLE;
    struct part part[5];
    struct stat info;
    long long number_, file = 0;
    if (parts_of(value, length, part, 5) != 5 || number(part[3].at, 10, &number_)) return fail(EINVAL, "mount");
    char *source = part[0].at, *target = part[1].at, *type = part[2].at, *data = part[4].at;
    unsigned long flags = number_;
    if (!strcmp(type, "cgroup")) type = "cgroup2", data = "";
    if (flags & MS_BIND) {
        if (stat(source, &info)) return fail(errno, "the source %.200s", source);
        file = !S_ISDIR(info.st_mode);
    }
    int fd = target_of(target, file);
    if (fd < 0) return fail(errno, "the mount point %.200s", target);
    unsigned long first = flags & MS_BIND ? MS_BIND | (flags & MS_REC) : flags & ~(propagation | MS_REC);
    if (mount(source, link_of(fd), *type ? type : NULL, first, flags & MS_BIND ? NULL : data))
        return fail(errno, "the mount of %.80s at %.80s", *type && !(flags & MS_BIND) ? type : source, target);
    close(fd);
    unsigned long more = flags & (MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOATIME | MS_NODIRATIME | MS_RELATIME);
    int again = (flags & MS_BIND) && more;
    if (!again && !(flags & propagation)) return 0;
    if ((fd = target_of(target, file)) < 0) return fail(errno, "the mount point %.200s", target); /* now the mount itself */
    if (again && mount(NULL, link_of(fd), NULL, MS_REMOUNT | MS_BIND | more, NULL)) return fail(errno, "flags of the mount at %.80s", target);
    if ((flags & propagation) && mount(NULL, link_of(fd), NULL, flags & (propagation | MS_REC), NULL))
        return fail(errno, "propagation of the mount at %.80s", target);
    close(fd);
    return 0;
}

static int device(const char *path, mode_t mode, dev_t number_, uid_t uid, gid_t gid) {
    char copy[512];
    if (snprintf(copy, sizeof copy, "%s", path) >= (int)sizeof copy || *copy != '/') return fail(EINVAL, "the device %.80s", path);
    char *name = strrchr(copy, '/');
    *name++ = 0;
    int parent = target_of(copy, 0);
    if (parent < 0) return fail(errno, "the folder of %.80s", path);
    unlinkat(parent, name, 0);
    if (mknodat(parent, name, mode, number_) || fchownat(parent, name, uid, gid, AT_SYMLINK_NOFOLLOW)) return fail(errno, "the device %.80s", path);
    fchmodat(parent, name, mode & 07777, 0);
    close(parent);
    return 0;
}

static int devices(struct words *words) {
    static const struct {
        const char *path;
        int major, minor;
    } usual[] = {{"/dev/null", 1, 3}, {"/dev/zero", 1, 5}, {"/dev/full", 1, 7}, {"/dev/random", 1, 8}, {"/dev/urandom", 1, 9}, {"/dev/tty", 5, 0}};
    static const char *const links[][2] = {{"/proc/self/fd", "fd"}, {"/proc/self/fd/0", "stdin"}, {"/proc/self/fd/1", "stdout"},
                                           {"/proc/self/fd/2", "stderr"}, {"pts/ptmx", "ptmx"}, {"/proc/kcore", "core"}};
    int error = 0, at = 1, dev = target_of("/dev", 0);
    char *value;
    uint32_t length;
    if (dev < 0) return fail(errno, "/dev");
    for (size_t i = 0; !error && i < sizeof usual / sizeof *usual; i++)
        error = device(usual[i].path, S_IFCHR | 0666, makedev(usual[i].major, usual[i].minor), 0, 0);
    for (size_t i = 0; i < sizeof links / sizeof *links; i++) symlinkat(links[i][0], dev, links[i][1]);
    close(dev);
    while (!error && (value = next_value(words, "device", &at, &length))) {
        struct part part[6];
        long long mode, n[4];
        error = parts_of(value, length, part, 6) != 6 || number(part[1].at, 8, &mode);
        for (int i = 0; !error && i < 4; i++) error = number(part[2 + i].at, 10, &n[i]);
        error = error ? fail(EINVAL, "device") : device(part[0].at, mode, makedev(n[0], n[1]), n[2], n[3]);
    }
    return error;
}

static int cover(struct words *words) { /* in the container's root */
    char *path;
    struct stat info;
    for (int at = 1; (path = next_value(words, "readonly", &at, NULL));) {
        if (mount(path, path, NULL, MS_BIND | MS_REC, NULL)) {
            if (errno == ENOENT) continue;
            return fail(errno, "readonly %.200s", path);
        }
        if (mount(NULL, path, NULL, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL)) return fail(errno, "readonly %.200s", path);
    }
    for (int at = 1; (path = next_value(words, "masked", &at, NULL));) {
        if (stat(path, &info)) continue;
        if (S_ISDIR(info.st_mode) ? mount("tmpfs", path, "tmpfs", MS_RDONLY, "size=0k") : mount("/dev/null", path, NULL, MS_BIND, NULL))
            return fail(errno, "masking %.200s", path);
    }
    if (value_of(words, "readonly_rootfs", NULL) && mount(NULL, "/", NULL, MS_BIND | MS_REMOUNT | MS_RDONLY, NULL)) return fail(errno, "the root read-only");
    return 0;
}

static int filesystem(struct words *words) {
    char *rootfs = value_of(words, "rootfs", NULL), *value;
    uint32_t length;
    int error, at = 1;
    if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL)) return fail(errno, "a private mount namespace");
    if (mount(rootfs, rootfs, NULL, MS_BIND | MS_REC, NULL) || (root = open(rootfs, O_PATH | O_DIRECTORY | O_CLOEXEC)) < 0)
        return fail(errno, "the root %.200s", rootfs);
    while ((value = next_value(words, "mount", &at, &length)))
        if ((error = mount_one(value, length))) return error;
    if ((error = devices(words))) return error;
    if (fchdir(root) || syscall(SYS_pivot_root, ".", ".") || umount2(".", MNT_DETACH) || chdir("/")) return fail(errno, "changing the root");
    return cover(words);
}

/* A terminal of the container's own devpts; its master goes to process 1. */
static int terminal(struct child *child) {
    char control[CMSG_SPACE(sizeof(int))] = {0}, path[40];
    uint32_t length;
    char *size = value_of(child->words, "size", &length);
    struct part part[2];
    int zero = 0, name;
    int master = open("/dev/pts/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (master < 0) master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (master < 0 || ioctl(master, TIOCSPTLCK, &zero) || ioctl(master, TIOCGPTN, &name)) return fail(errno, "a terminal in the container");
    if (size) {
        long long rows, columns;
        if (parts_of(size, length, part, 2) != 2 || number(part[0].at, 10, &rows) || number(part[1].at, 10, &columns)) return fail(EINVAL, "size");
        struct winsize window = {rows, columns, 0, 0};
        ioctl(master, TIOCSWINSZ, &window);
    }
    snprintf(path, sizeof path, "/dev/pts/%d", name);
    int slave = open(path, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (slave < 0) return fail(errno, "the terminal %s", path);
    struct iovec data = {"M", 1};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    *head = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
    memcpy(CMSG_DATA(head), &master, sizeof(int));
    if (sendmsg(child->status, &message, MSG_NOSIGNAL) < 0) return fail(errno, "handing the terminal over");
    close(master);
    if (value_of(child->words, "rootfs", NULL)) { /* /dev/console is the terminal of the container's process */
        int fd = open("/dev/console", O_WRONLY | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0620);
        if (fd >= 0) close(fd);
        if (fd >= 0 && mount(path, "/dev/console", NULL, MS_BIND, NULL)) return fail(errno, "/dev/console");
    }
    child->in = child->out = child->err = slave;
    return 0;
}

static int stdio(struct child *child) {
    if (child->in < 0 && (child->in = open("/dev/null", O_RDONLY | O_CLOEXEC)) < 0) return fail(errno, "/dev/null");
    if (dup2(child->in, 0) < 0 || dup2(child->out, 1) < 0 || dup2(child->err, 2) < 0) return fail(errno, "stdio");
    if (child->tty && ioctl(0, TIOCSCTTY, 0)) return fail(errno, "a controlling terminal");
    return 0;
}

static int execute(struct words *words) {
    static char *argv[MAX_WORDS + 1], *env[MAX_WORDS + 1];
    const char *path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    char full[4096], *value;
    int count = 0, error = ENOENT;
    for (int at = 1; (value = next_value(words, "argv", &at, NULL));) argv[count++] = value;
    count = 0;
    for (int at = 1; (value = next_value(words, "env", &at, NULL));) {
        env[count++] = value;
        if (!strncmp(value, "PATH=", 5)) path = value + 5;
    }
    if (strchr(argv[0], '/')) {
        execve(argv[0], argv, env);
        return fail(errno, "exec %.200s", argv[0]);
    }
    while (*argv[0]) {
        size_t size = strcspn(path, ":");
        if (snprintf(full, sizeof full, "%.*s/%s", (int)size, size ? path : ".", argv[0]) < (int)sizeof full) {
            execve(full, argv, env);
            if (errno != ENOENT && errno != ENOTDIR) error = errno;
            if (error != ENOENT && error != EACCES) break;
        }
        if (!path[size]) break;
        path += size + 1;
    }
    return fail(error, "exec %.200s (looked for in $PATH)", argv[0]);
}

/* Process 1 of a container with `init`: reaps, forwards signals, ends as its child does. */
static void reaper(pid_t pid) {
    sigset_t all;
    int status, signal_;
    for (int fd = 0; fd < 3; fd++) close(fd);
    close(self->status);
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL);
    for (;;) {
        pid_t ended;
        while ((ended = waitpid(-1, &status, WNOHANG)) > 0)
            if (ended == pid) _exit(WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
        if (!sigwait(&all, &signal_) && signal_ != SIGCHLD) kill(pid, signal_);
    }
}

/* Nothing of process 1 may be reached by who is in the container already, through /proc/PID of this process. */
static void close_others(struct child *child) {
    int keep[] = {child->status, child->in, child->out, child->err, child->joins[0], child->joins[1], child->joins[2], child->joins[3]};
    int count = sizeof keep / sizeof *keep;
    unsigned from = 3;
    for (;;) {
        int next = -1;
        for (int i = 0; i < count; i++)
            if (keep[i] >= (int)from && (next < 0 || keep[i] < next)) next = keep[i];
        if (next < 0) break;
        if ((unsigned)next > from) syscall(SYS_close_range, from, (unsigned)next - 1, 0u);
        from = next + 1;
    }
    syscall(SYS_close_range, from, ~0u, 0u);
}

static void begin(struct child *child) {
    sigset_t none;
    self = child;
    *step = 0;
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    close_others(child);
    sigemptyset(&none);
    for (int number_ = 1; number_ < 65; number_++) signal(number_, SIG_DFL);
    sigprocmask(SIG_SETMASK, &none, NULL);
    int error = cgroup_enter();
    check(error ? fail(error, "entering the guest's cgroup") : 0);
    char *score = value_of(child->words, "oom_score_adj", NULL);
    if (!score) score = "0";
    error = write_file("/proc/self/oom_score_adj", score, strlen(score));
    check(error ? fail(error, "oom_score_adj") : 0);
}

static void finish(struct child *child, struct identity *identity) {
    char *cwd = value_of(child->words, "cwd", NULL);
    setsid();
    check(stdio(child));
    if (cwd && *cwd) {
        make_dirs(cwd, 0755);
        if (chdir(cwd)) check(fail(errno, "the working directory %.200s", cwd));
    }
    check(identity_take(child->words, identity));
    give_up(execute(child->words));
}

void child_run(struct child *child) {
    struct identity identity;
    uint32_t length;
    char *text, go;
    begin(child);
    check(identity_of(child->words, &identity));
    if ((text = value_of(child->words, "hostname", &length)) && sethostname(text, length)) check(fail(errno, "the hostname"));
    if ((text = value_of(child->words, "domainname", &length)) && setdomainname(text, length)) check(fail(errno, "the domainname"));
    check(set_sysctls(child->words, "sysctl"));
    if (unshare(CLONE_NEWCGROUP)) check(fail(errno, "a cgroup namespace"));
    check(filesystem(child->words));
    if (child->tty) check(terminal(child));
    if (send(child->status, "S", 1, MSG_NOSIGNAL) != 1) _exit(127);
    if (recv(child->status, &go, 1, 0) != 1) _exit(127);
    if (child->init) {
        pid_t pid = fork();
        if (pid < 0) check(fail(errno, "a process below init"));
        if (pid) reaper(pid);
    }
    finish(child, &identity);
    _exit(127);
}

void child_exec(struct child *child) {
    struct identity identity;
    begin(child);
    check(identity_of(child->words, &identity));
    for (int i = 0; i < 4; i++)
        if (setns(child->joins[i], 0)) check(fail(ESRCH, "the container has ended"));
    if (chdir("/")) check(fail(errno, "the container's root"));
    if (child->tty) check(terminal(child));
    finish(child, &identity);
    _exit(127);
}
