/* The container's cgroup (v2): limits, what it uses, its processes. */
#include "agent.h"
#include <dirent.h>
#include <poll.h>
#include <sys/stat.h>
#include <time.h>

void cgroup_prepare(void) {
    static const char *const controllers[] = {"+cpu", "+memory", "+pids", "+io", "+cpuset"};
    for (size_t i = 0; i < sizeof controllers / sizeof *controllers; i++) /* each alone: a kernel may lack one */
        write_file(CGROUPS "/cgroup.subtree_control", controllers[i], strlen(controllers[i]));
    if (mkdir(CGROUP, 0755) && errno != EEXIST) say("agent: %s: %s", CGROUP, strerror(errno));
}

int cgroup_apply(struct words *words) {
    char *value, path[200];
    uint32_t length;
    int at = 1;
    while ((value = next_value(words, "cgroup", &at, &length))) {
        struct part part[2];
        if (parts_of(value, length, part, 2) != 2 || !part[0].length || part[0].length > 64 ||
            strspn(part[0].at, "abcdefghijklmnopqrstuvwxyz0123456789._") != part[0].length)
            return fail(EINVAL, "cgroup");
        snprintf(path, sizeof path, CGROUP "/%s", part[0].at);
        int error = write_file(path, part[1].at, part[1].length);
        if (error) return fail(error, "%.64s = %.64s in the guest's cgroup", part[0].at, part[1].at);
    }
    return 0;
}

int cgroup_enter(void) { return write_file(CGROUP "/cgroup.procs", "0", 1); }

static long long value_in(const char *text, const char *name) {
    size_t size = strlen(name);
    for (const char *line = text; line; line = strchr(line, '\n')) {
        line += *line == '\n';
        if (!strncmp(line, name, size) && line[size] == ' ') return atoll(line + size + 1);
    }
    return 0;
}

long long cgroup_oom_kills(void) {
    char text[512];
    return read_file(CGROUP "/memory.events", text, sizeof text) < 0 ? 0 : value_in(text, "oom_kill");
}

int cgroup_signal(int signal) {
    static char text[65536];
    if (signal == SIGKILL && !write_file(CGROUP "/cgroup.kill", "1", 1)) return 0;
    if (read_file(CGROUP "/cgroup.procs", text, sizeof text) < 0) return fail(errno, "the guest's cgroup");
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n"))
        if (atoi(line) > 1) kill(atoi(line), signal);
    return 0;
}

int cgroup_freeze(int state) {
    char text[256];
    int error = write_file(CGROUP "/cgroup.freeze", state ? "1" : "0", 1);
    if (error) return fail(error, "freezing the guest's cgroup");
    int fd = open(CGROUP "/cgroup.events", O_RDONLY | O_CLOEXEC);
    for (int tries = 0; fd >= 0 && tries < 20; tries++) {
        ssize_t count = pread(fd, text, sizeof text - 1, 0);
        text[count < 0 ? 0 : count] = 0;
        if (value_in(text, "frozen") == state) {
            close(fd);
            return 0;
        }
        struct pollfd wait = {fd, POLLPRI, 0};
        poll(&wait, 1, 50);
    }
    if (fd >= 0) close(fd);
    return fail(EAGAIN, "the guest's processes did not %s in a second", state ? "freeze" : "thaw");
}

void cgroup_stats(struct answer *answer) {
    static const char *const files[] = {"cpu.stat", "memory.current", "memory.peak", "memory.max", "memory.swap.current",
                                        "memory.events", "memory.stat", "pids.current", "pids.max", "io.stat",
                                        "cpu.max"};
    static const char *const system[][2] = {{"uptime", "/proc/uptime"}, {"loadavg", "/proc/loadavg"},
                                            {"meminfo", "/proc/meminfo"}, {"net.dev", "/proc/net/dev"},
                                            {"net.snmp", "/proc/net/snmp"}};
    static char text[16384];
    char path[200];
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        snprintf(path, sizeof path, CGROUP "/%s", files[i]);
        int length = read_file(path, text, sizeof text);
        if (length >= 0) answer_add(answer, files[i], text, length);
    }
    for (size_t i = 0; i < sizeof system / sizeof *system; i++) {
        int length = read_file(system[i][1], text, sizeof text);
        if (length >= 0) answer_add(answer, system[i][0], text, length);
    }
}

/* The pid in its innermost namespace, the container's: the last number of NSpid (a kernel with pid namespaces has it). */
static int pid_inside(int pid) {
    char path[64], text[4096];
    snprintf(path, sizeof path, "/proc/%d/status", pid);
    if (read_file(path, text, sizeof text) <= 0) return pid;
    char *line = strstr(text, "\nNSpid:");
    if (!line) return pid;
    char *end = strchr(++line, '\n');
    if (end) *end = 0;
    char *last = strrchr(line, '\t');
    return last ? atoi(last + 1) : pid;
}

static void one_process(struct answer *answer, int pid) {
    char path[64], stat_text[1024], command[2048], line[4096];
    struct stat info;
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    if (read_file(path, stat_text, sizeof stat_text) <= 0 || stat(path, &info)) return;
    char *open = strchr(stat_text, '('), *close = strrchr(stat_text, ')');
    if (!open || !close) return;
    *close = 0;
    char state;
    int parent;
    unsigned long user, kernel, threads;
    unsigned long long start;
    long pages;
    if (sscanf(close + 2, "%c %d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu %*d %*d %*d %*d %lu %*d %llu %*u %ld", &state,
               &parent, &user, &kernel, &threads, &start, &pages) != 7)
        return;
    snprintf(path, sizeof path, "/proc/%d/cmdline", pid);
    int length = read_file(path, command, sizeof command);
    while (length > 0 && !command[length - 1]) length--;
    for (int i = 0; i < length; i++)
        if (!command[i]) command[i] = 0x1f;
    int size = snprintf(line, sizeof line, "%d%c%d%c%d%c%u%c%c%c%llu%c%lu%c%lld%c%lu%c%s%c%.*s", pid, 0, pid_inside(pid), 0,
                        parent, 0, info.st_uid, 0, state, 0, start, 0, user + kernel, 0, (long long)pages * sysconf(_SC_PAGESIZE), 0, threads, 0, open + 1, 0,
                        length < 0 ? 0 : length, command);
    answer_add(answer, "proc", line, size < (int)sizeof line ? size : (int)sizeof line - 1);
}

void list_processes(struct answer *answer) {
    static char text[65536];
    if (read_file(CGROUP "/cgroup.procs", text, sizeof text) < 0) return;
    for (char *line = strtok(text, "\n"); line && answer->used < MAX_PAYLOAD - 8192; line = strtok(NULL, "\n"))
        one_process(answer, atoi(line));
}
