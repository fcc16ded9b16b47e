/* Processes and their streams, seen from process 1. */
#include "agent.h"
#include <linux/sched.h>
#include <linux/vm_sockets.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>

#define MOST 256
#define CHUNK (32u << 10)
#define LAST (1u << 20) /* most that a pipe holds */
enum phase { SETUP, WAITING, STARTING, RUNNING };

static struct process {
    int used, main, tty, dial, dead, silent; /* silent: its stream got an error and is over */
    enum phase phase;
    char id[MAX_ID + 1];
    uint32_t stream, asker; /* asker: the REQ that waits for an answer */
    pid_t pid;
    int status_fd, in, out, err; /* a terminal or socket has in == out */
    int code;
    uint32_t bits;
    long long credit;
    char *pending; /* stdin that the process did not take yet, WINDOW bytes */
    uint32_t from, upto, owed; /* owed: taken, not yet credited to the host */
    int in_ended;
    uint32_t after; /* bytes read since it died: others may hold its pipes and write on */
} table[MOST];

static int container_mounts = -1, container_root = -1; /* they keep the container's files for the file verbs */
static struct { /* reaped before their number was known; only where a child is quicker than its parent */
    pid_t pid;
    int status;
} early[8];
static unsigned early_at;

static struct process *by_id(const char *id) {
    for (int i = 0; i < MOST; i++)
        if (table[i].used && !table[i].dial && !table[i].silent && !strcmp(table[i].id, id)) return &table[i];
    return NULL;
}

static struct process *by_stream(uint32_t stream) {
    for (int i = 0; i < MOST; i++)
        if (table[i].used && table[i].stream == stream) return &table[i];
    return NULL;
}

int stream_used(uint32_t stream) {
    struct process *p = by_stream(stream);
    return p && !p->silent;
}

pid_t container_pid(void) {
    for (int i = 0; i < MOST; i++)
        if (table[i].used && table[i].main && !table[i].dead) return table[i].pid;
    return 0;
}

static void shut(int *fd) {
    if (*fd >= 0) close(*fd);
    *fd = -1;
}

static void release(struct process *p) {
    if (p->in == p->out) p->in = -1;
    shut(&p->in);
    shut(&p->out);
    shut(&p->err);
    shut(&p->status_fd);
    free(p->pending);
    memset(p, 0, sizeof *p);
}

static struct process *fresh(uint32_t stream) {
    for (int i = 0; i < MOST; i++) {
        struct process *p = &table[i];
        if (p->used) continue;
        memset(p, 0, sizeof *p);
        p->used = 1;
        p->stream = p->asker = stream;
        p->status_fd = p->in = p->out = p->err = -1;
        p->credit = WINDOW;
        return p;
    }
    return NULL;
}

/* ---- starting */
static int spawn(struct process *p, struct words *words, struct process *in) {
    static const char *const names[] = {"mnt", "ipc", "uts", "cgroup"};
    int input[2] = {-1, -1}, output[2] = {-1, -1}, errors[2] = {-1, -1}, status[2] = {-1, -1}, own = -1, error = 0;
    struct child child = {.words = words, .pid_namespace = -1, .joins = {-1, -1, -1, -1}, .in = -1, .out = -1, .err = -1};
    char path[64];
    child.tty = p->tty = value_of(words, "tty", NULL) != NULL;
    child.init = value_of(words, "init", NULL) != NULL;
    int wants = value_of(words, "stdin", NULL) != NULL;
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, status)) return fail(errno, "a socket");
    if (!p->tty && ((wants && pipe2(input, O_CLOEXEC)) || pipe2(output, O_CLOEXEC) || pipe2(errors, O_CLOEXEC)))
        error = fail(errno, "pipes");
    for (int i = 0; in && !error && i < 4; i++) {
        snprintf(path, sizeof path, "/proc/%d/ns/%s", in->pid, names[i]);
        if ((child.joins[i] = open(path, O_RDONLY | O_CLOEXEC)) < 0) error = fail(ESRCH, "the container has ended");
    }
    if (in && !error) {
        own = open("/proc/self/ns/pid", O_RDONLY | O_CLOEXEC);
        snprintf(path, sizeof path, "/proc/%d/ns/pid", in->pid);
        int there = open(path, O_RDONLY | O_CLOEXEC);
        if (own < 0 || there < 0 || setns(there, CLONE_NEWPID)) error = fail(ESRCH, "the container has ended");
        if (there >= 0) close(there);
    }
    pid_t pid = -1;
    if (!error) {
        child.in = input[0];
        child.out = output[1];
        child.err = errors[1];
        child.status = status[1];
        unsigned long flags = SIGCHLD | (in ? 0 : CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS);
        pid = syscall(SYS_clone, flags, 0, 0, 0, 0);
        if (!pid) {
            if (in) child_exec(&child);
            else child_run(&child);
        }
        if (pid < 0) error = in && errno == ENOMEM ? fail(ESRCH, "the container has ended") : fail(errno, "a new process");
    }
    if (own >= 0) {
        if (setns(own, CLONE_NEWPID)) say("agent: own pid namespace: %s", strerror(errno));
        close(own);
    }
    for (int i = 0; i < 4; i++) shut(&child.joins[i]);
    shut(&input[0]);
    shut(&output[1]);
    shut(&errors[1]);
    shut(&status[1]);
    p->in = input[1];
    p->out = output[0];
    p->err = errors[0];
    p->status_fd = status[0];
    p->pid = pid;
    if (error) return error;
    int fds[] = {p->in, p->out, p->err, p->status_fd};
    for (int i = 0; i < 4; i++)
        if (fds[i] >= 0) fcntl(fds[i], F_SETFL, fcntl(fds[i], F_GETFL) | O_NONBLOCK);
    for (int i = 0; i < 8; i++)
        if (early[i].pid == pid) {
            early[i].pid = 0;
            process_reaped(pid, early[i].status);
        }
    return 0;
}

static int start_process(uint32_t stream, struct words *words, int main) {
    uint32_t length;
    char *id = value_of(words, "id", &length), *in = value_of(words, "in", NULL);
    struct process *target = NULL;
    if (!id || !length || length > MAX_ID || strlen(id) != length) return fail(EINVAL, "id");
    if (!value_of(words, "argv", NULL)) return fail(EINVAL, "argv");
    if (by_id(id)) return fail(EEXIST, "a process %s", id);
    if (main && container_mounts >= 0) return fail(EEXIST, "the container of this guest");
    if (!main && (!in || !(target = by_id(in)) || !target->main || target->dead || target->phase == SETUP))
        return fail(ESRCH, "no process %s to join", in ? in : "");
    if (main && !value_of(words, "rootfs", NULL)) return fail(EINVAL, "rootfs");
    if (main) {
        int error = cgroup_apply(words);
        if (error) return error;
    }
    struct process *p = fresh(stream);
    if (!p) return fail(EAGAIN, "%d processes run", MOST);
    strcpy(p->id, id);
    p->main = main;
    p->phase = main ? SETUP : STARTING;
    int error = spawn(p, words, target);
    if (error) release(p);
    return error ? error : -2;
}

/* What a child says of its start. */
static void status_ready(struct process *p) {
    char text[300], control[CMSG_SPACE(sizeof(int))];
    struct iovec part = {text, sizeof text - 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    ssize_t count = recvmsg(p->status_fd, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    if (count < 0 && (errno == EAGAIN || errno == EINTR)) return;
    text[count < 0 ? 0 : count] = 0;
    struct cmsghdr *head = count > 0 ? CMSG_FIRSTHDR(&message) : NULL;
    if (count > 0 && text[0] == 'M' && head && head->cmsg_type == SCM_RIGHTS && p->out < 0) {
        memcpy(&p->out, CMSG_DATA(head), sizeof(int));
        p->in = p->out;
        fcntl(p->out, F_SETFL, fcntl(p->out, F_GETFL) | O_NONBLOCK);
        return;
    }
    uint32_t asker = p->asker;
    p->asker = 0;
    if (count > 0 && text[0] == 'S' && p->phase == SETUP) {
        char path[64];
        snprintf(path, sizeof path, "/proc/%d/ns/mnt", p->pid);
        container_mounts = open(path, O_RDONLY | O_CLOEXEC);
        snprintf(path, sizeof path, "/proc/%d/root", p->pid);
        container_root = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
        snprintf(path, sizeof path, "/proc/1/fd/%d", container_root);
        files_root("container", path);
        p->phase = WAITING;
        answer_begin(&reply);
        answer_text(&reply, "pid", "%d", p->pid);
        if (asker) respond(asker, 0, &reply);
        return;
    }
    int error = 0;
    if (count > 4 && text[0] == 'E') {
        memcpy(&error, text + 1, 4);
        fail(error, "%s", text + 5);
    } else if (p->phase == SETUP) error = fail(EIO, "the process ended during its set-up");
    shut(&p->status_fd);
    if (!asker) return;
    if (error && (p->phase == SETUP || !p->main)) p->silent = 1; /* RESP is the last of this stream */
    if (!error && !p->main) {
        answer_begin(&reply);
        answer_text(&reply, "pid", "%d", p->pid);
        respond(asker, 0, &reply);
    } else respond(asker, error, NULL);
    p->phase = RUNNING;
}

static int start_verb(uint32_t stream, struct process *p) {
    if (!p->main || p->phase != WAITING) return fail(EBUSY, "%s was started already", p->id);
    if (p->dead || send(p->status_fd, "G", 1, MSG_NOSIGNAL) != 1) return fail(ESRCH, "%s has ended", p->id);
    p->phase = STARTING;
    p->asker = stream;
    return -2;
}

static int dial(uint32_t stream, struct words *words) {
    char *kind = value_of(words, "kind", NULL);
    long long port;
    if (!kind || !value_of(words, "port", NULL) || number_of(words, "port", 10, 0, &port) || port < 1 || port > 0xffffffffll)
        return fail(EINVAL, "DIAL port, kind");
    struct timeval limit = {0, 250000}; /* whoever is asked is in this kernel: nothing else waits longer for it */
    int fd = -1, error = EINVAL;
    for (int turn = 0; turn < (strcmp(kind, "vsock") ? 2 : 1); turn++) {
        struct sockaddr_in v4 = {AF_INET, htons(port), {htonl(INADDR_LOOPBACK)}, {0}};
        struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_port = htons(port), .sin6_addr = IN6ADDR_LOOPBACK_INIT};
        struct sockaddr_vm vm = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_LOCAL, .svm_port = port};
        int tcp = !strcmp(kind, "tcp") && port < 65536;
        if (!tcp && strcmp(kind, "vsock")) return fail(EINVAL, "DIAL port, kind");
        struct sockaddr *to = !tcp ? (struct sockaddr *)&vm : turn ? (struct sockaddr *)&v6 : (struct sockaddr *)&v4;
        socklen_t size = !tcp ? sizeof vm : turn ? sizeof v6 : sizeof v4;
        fd = socket(to->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd < 0) {
            if (!turn) error = errno;
            continue;
        }
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
        if (!tcp) setsockopt(fd, AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT, &limit, sizeof limit);
        if (!connect(fd, to, size)) break;
        if (!turn) error = errno == EINPROGRESS ? ETIMEDOUT : errno;
        shut(&fd);
    }
    if (fd < 0) return fail(error, "%s port %lld in the guest", kind, port);
    struct process *p = fresh(stream);
    if (!p) {
        close(fd);
        return fail(EAGAIN, "%d processes run", MOST);
    }
    fcntl(fd, F_SETFL, O_NONBLOCK);
    p->dial = 1;
    p->phase = RUNNING;
    p->asker = 0;
    p->in = p->out = fd;
    return 0;
}

int verb_process(uint32_t stream, struct words *words) {
    const char *verb = words->at[0];
    long long value, other;
    if (!strcmp(verb, "RUN")) return start_process(stream, words, 1);
    if (!strcmp(verb, "EXEC")) return start_process(stream, words, 0);
    if (!strcmp(verb, "DIAL")) return dial(stream, words);
    if (!strcmp(verb, "LIMITS")) return cgroup_apply(words);
    if (!strcmp(verb, "KILLALL")) {
        if (number_of(words, "signal", 10, SIGKILL, &value) || value < 1 || value > 64) return fail(EINVAL, "KILLALL signal");
        return cgroup_signal(value);
    }
    if (!strcmp(verb, "FREEZE")) {
        if (number_of(words, "state", 10, 1, &value) || (value != 0 && value != 1)) return fail(EINVAL, "FREEZE state");
        return cgroup_freeze(value);
    }
    if (!strcmp(verb, "STATS") || !strcmp(verb, "PS")) {
        answer_begin(&reply);
        if (*verb == 'S') cgroup_stats(&reply);
        else list_processes(&reply);
        respond(stream, 0, &reply);
        return -2;
    }
    if (strcmp(verb, "START") && strcmp(verb, "SIGNAL") && strcmp(verb, "RESIZE")) return -1;
    char *id = value_of(words, "id", NULL);
    struct process *p = id ? by_id(id) : NULL;
    if (!p || p->dead) return fail(ESRCH, "no process %.64s", id ? id : "");
    if (!strcmp(verb, "START")) return start_verb(stream, p);
    if (!strcmp(verb, "SIGNAL")) {
        if (number_of(words, "signal", 10, -1, &value) || value < 0 || value > 64) return fail(EINVAL, "SIGNAL signal");
        return kill(value_of(words, "group", NULL) ? -p->pid : p->pid, value) ? fail(errno, "signal %lld", value) : 0;
    }
    if (!p->tty || p->out < 0) return fail(ENOTTY, "%s has no terminal", p->id);
    if (number_of(words, "rows", 10, 0, &value) || number_of(words, "columns", 10, 0, &other) || (value | other) & ~0xffffll)
        return fail(EINVAL, "RESIZE rows, columns");
    struct winsize size = {value, other, 0, 0};
    return ioctl(p->out, TIOCSWINSZ, &size) ? fail(errno, "resizing") : 0;
}

/* ---- their bytes */
static void credit_host(struct process *p, uint32_t count) {
    p->owed += count;
    if (p->owed < WINDOW / 4 || !p->stream) return; /* the host has the rest of its window meanwhile */
    send_frame(CREDIT, p->stream, 0, &p->owed, 4);
    p->owed = 0;
}

static void feed_input(struct process *p) {
    while (p->from < p->upto && p->in >= 0) {
        ssize_t count = write(p->in, p->pending + p->from, p->upto - p->from);
        if (count < 0 && errno == EAGAIN) return;
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) count = p->upto - p->from; /* nobody reads it: dropped, and credited */
        p->from += count;
        credit_host(p, count);
    }
    if (p->from == p->upto) p->from = p->upto = 0;
    if (p->in < 0 || !p->in_ended || p->upto || p->tty) return;
    if (p->dial) shutdown(p->in, SHUT_WR);
    if (p->in == p->out) p->in = -1;
    else shut(&p->in);
}

void process_data(uint32_t stream, const char *data, uint32_t length) {
    struct process *p = by_stream(stream);
    if (!p || p->silent) return; /* it crossed an EXIT */
    if (!p->pending && !(p->pending = malloc(WINDOW))) protocol_error("no memory for stdin");
    if (p->in_ended || length > WINDOW - (p->upto - p->from)) protocol_error("DATA without credit");
    if (p->upto + length > WINDOW) {
        memmove(p->pending, p->pending + p->from, p->upto - p->from);
        p->upto -= p->from;
        p->from = 0;
    }
    memcpy(p->pending + p->upto, data, length);
    p->upto += length;
    if (p->in < 0 && (!p->tty || p->phase == RUNNING)) { /* no stdin, or closed: as if read by nobody */
        credit_host(p, length);
        p->from = p->upto = 0;
    } else feed_input(p);
}

void process_end(uint32_t stream) {
    struct process *p = by_stream(stream);
    if (!p || p->silent) return;
    p->in_ended = !p->tty;
    feed_input(p);
}

void process_credit(uint32_t stream, uint32_t count) {
    struct process *p = by_stream(stream);
    if (!p) return;
    p->credit += count;
    if (!count || p->credit > WINDOW) protocol_error("a CREDIT above the window");
}

void process_detach(void) {
    for (int i = 0; i < MOST; i++) {
        struct process *p = &table[i];
        if (!p->used) continue;
        p->stream = p->asker = 0;
        p->credit = WINDOW;
        if (p->dial) release(p);
    }
}

/* Moves what one output has into the queue. Without end while the process is alive; to the last byte when it is dead. */
static void drain(struct process *p, int *fd, int flag) {
    while (*fd >= 0 && p->credit > 0 && queue_room() > 4 * MAX_FRAME) {
        struct header header = {0, p->stream, DATA, flag, 0};
        size_t most = p->credit < CHUNK ? (size_t)p->credit : CHUNK;
        char *at = queue_reserve();
        ssize_t count = read(*fd, at + sizeof header, most);
        if (count < 0 && errno == EINTR) continue;
        if (count > 0) {
            if (!p->silent && p->stream) {
                header.length = count;
                memcpy(at, &header, sizeof header);
                queue_commit(sizeof header + count);
                p->credit -= count;
            }
            if (!p->dead) return;
            p->after += count;
            if (p->after < LAST) continue;
        }
        if (count < 0 && errno == EAGAIN && !p->dead) return; /* what a dead one left open is closed here */
        if (fd == &p->out && p->in == p->out && !p->dial) p->in = -1;
        if (p->dial && p->in == p->out) *fd = -1; /* the other direction may go on */
        else shut(fd);
        if (!p->silent && p->stream) send_frame(END, p->stream, flag, NULL, 0);
    }
}

int process_poll(void *fds, int most) {
    struct pollfd *at = fds;
    int count = 0, room = queue_room() > 4 * MAX_FRAME;
    for (int i = 0; i < MOST && count + 4 <= most; i++) {
        struct process *p = &table[i];
        if (!p->used) continue;
        if (p->status_fd >= 0 && p->asker) at[count++] = (struct pollfd){p->status_fd, POLLIN, 0};
        if (room && p->credit > 0 && p->phase != SETUP) {
            if (p->out >= 0) at[count++] = (struct pollfd){p->out, POLLIN, 0};
            if (p->err >= 0) at[count++] = (struct pollfd){p->err, POLLIN, 0};
        }
        if (p->in >= 0 && p->upto) at[count++] = (struct pollfd){p->in, POLLOUT, 0};
    }
    return count;
}

void process_ready(void *fds, int count) {
    struct pollfd *at = fds;
    for (int n = 0; n < count; n++) {
        if (!at[n].revents) continue;
        for (int i = 0; i < MOST; i++) {
            struct process *p = &table[i];
            if (!p->used) continue;
            if (at[n].fd == p->status_fd) status_ready(p);
            else if (at[n].fd == p->out && at[n].events == POLLIN) drain(p, &p->out, 1);
            else if (at[n].fd == p->err) drain(p, &p->err, 2);
            else if (at[n].fd == p->in && at[n].events == POLLOUT) feed_input(p);
            else continue;
            break;
        }
    }
}

void process_reaped(pid_t pid, int status) {
    for (int i = 0; i < MOST; i++) {
        struct process *p = &table[i];
        if (!p->used || p->dial || p->dead || p->pid != pid) continue;
        for (int n = 0; n < 4 && p->status_fd >= 0 && p->asker; n++) status_ready(p); /* its last words, then the end */
        p->dead = 1;
        p->code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
        if (WIFSIGNALED(status)) p->bits |= EXIT_SIGNALED;
        if (p->code == 137 && cgroup_oom_kills() > 0) p->bits |= EXIT_OOM;
        return;
    }
    early[early_at].pid = pid;
    early[early_at].status = status;
    early_at = (early_at + 1) % 8;
}

void process_forget(void) {
    shut(&container_mounts);
    shut(&container_root);
}

void process_flush(void) {
    for (int i = 0; i < MOST; i++) {
        struct process *p = &table[i];
        if (!p->used || !(p->dead || p->dial)) continue;
        if (p->dead) {
            drain(p, &p->out, 1);
            drain(p, &p->err, 2);
        }
        if (p->out >= 0 || p->err >= 0 || (p->dial && p->in >= 0)) continue;
        if (p->dead && !p->silent && p->stream) {
            struct {
                int32_t code;
                uint32_t bits;
            } body = {p->code, p->bits};
            send_frame(EXIT, p->stream, 0, &body, sizeof body);
        }
        release(p);
    }
}
