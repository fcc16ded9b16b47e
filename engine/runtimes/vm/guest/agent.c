/* Process 1 of the guest: boot, the port to the host, and the loop. */
#include "agent.h"
#include <dirent.h>
#include <linux/vm_sockets.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>

#ifndef BUILD
#define BUILD "unknown"
#endif

char step[256];
struct answer reply;
static int channel = -1, listener = -1, files = -1;
static char queue[4u << 20]; /* frames for the host; the port is read only while an answer has room */
static size_t queue_head, queue_tail;
static struct words words;

int fail(int error, const char *format, ...) {
    va_list list;
    va_start(list, format);
    vsnprintf(step, sizeof step, format, list);
    va_end(list);
    return error;
}

void say(const char *format, ...) {
    char text[512];
    va_list list;
    va_start(list, format);
    int size = vsnprintf(text, sizeof text - 1, format, list);
    va_end(list);
    if (size > (int)sizeof text - 2) size = sizeof text - 2;
    text[size] = '\n';
    (void)!write(2, text, size + 1);
}

void protocol_error(const char *what) {
    say("agent: protocol: %s; the guest ends", what);
    end_guest(0);
}

/* ---- frames out */
static size_t channel_write(const char *data, size_t length) {
    size_t done = 0;
    while (channel >= 0 && done < length) {
        /* more at once on a vsock may be a packet in pieces (Linux 6.12), which vhost-device-vsock 0.3 loses */
        size_t left = length - done, most = listener < 0 ? left : 28 << 10;
        ssize_t count = write(channel, data + done, left < most ? left : most);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) break;
        done += count;
    }
    return done;
}

static void queue_write(void) {
    queue_head += channel_write(queue + queue_head, queue_tail - queue_head);
    if (queue_head == queue_tail) queue_head = queue_tail = 0;
}

void flush_queue(int milliseconds) {
    struct pollfd wait = {channel, POLLOUT, 0};
    queue_write();
    while (queue_head < queue_tail && poll(&wait, 1, milliseconds) > 0 && !(wait.revents & (POLLHUP | POLLERR))) queue_write();
}

size_t queue_room(void) { return sizeof queue - (queue_tail - queue_head); }

char *queue_reserve(void) {
    if (queue_tail + MAX_FRAME > sizeof queue) {
        memmove(queue, queue + queue_head, queue_tail - queue_head);
        queue_tail -= queue_head;
        queue_head = 0;
    }
    if (queue_tail + MAX_FRAME > sizeof queue) protocol_error("the queue to the host is full");
    return queue + queue_tail;
}

void queue_commit(size_t length) { queue_tail += length; }

void send_frame(int type, uint32_t stream, int flag, const void *data, uint32_t length) {
    struct header header = {length, stream, type, flag, 0};
    char *at = queue_reserve();
    memcpy(at, &header, sizeof header);
    if (length) memcpy(at + sizeof header, data, length);
    queue_commit(sizeof header + length);
}

void respond(uint32_t stream, int error, struct answer *answer) {
    if (!answer || error) {
        answer = &reply;
        answer_begin(answer);
        if (error && *step) answer_text(answer, "step", "%s", step);
    }
    uint32_t size = answer_end(answer, stream, error);
    memcpy(queue_reserve(), answer->frame, size);
    queue_commit(size);
}

static void greet(uint32_t stream) {
    struct utsname name;
    struct timespec now;
    uname(&name);
    clock_gettime(CLOCK_BOOTTIME, &now);
    answer_begin(&reply);
    answer_text(&reply, "version", "%d", VERSION);
    answer_text(&reply, "build", "%s", BUILD);
    answer_text(&reply, "arch", "%s", name.machine);
    answer_text(&reply, "kernel", "%s", name.release);
    answer_text(&reply, "boot", "%lld", (long long)now.tv_sec * 1000 + now.tv_nsec / 1000000);
    if (stream) respond(stream, 0, &reply);
    else send_frame(HELLO, 0, 0, reply.frame + sizeof(struct header) + 4, reply.used - sizeof(struct header) - 4);
}

/* ---- frames in */
static char spare[MAX_FRAME + 1], *input = spare; /* the frame that comes: in a slot of the file workers, when one is free */

static void request(uint32_t stream, char *frame, char *payload, uint32_t length) {
    if (stream_used(stream)) protocol_error("a REQ on a stream in use");
    if (files >= 0) { /* the words are checked there; here only the verb is looked at, the frame goes on as it is */
        uint32_t size;
        char verb[16] = "";
        memcpy(&size, payload, 4);
        if (size < sizeof verb && size <= length - 4) memcpy(verb, payload + 4, size);
        if (is_file_verb(verb)) {
            int given = files_give(files, frame, sizeof(struct header) + length);
            if (given < 0) respond(stream, fail(EAGAIN, "the guest's file workers are all busy"), NULL);
            if (given > 0) input = spare;
            return;
        }
    }
    if (frame != spare) { /* a slot is shared: a process that is forked from here needs the words to stay as they are */
        payload = memcpy(spare, payload, length);
    }
    const char *wrong = split_words(payload, length, &words);
    if (wrong) protocol_error(wrong);
    *step = 0;
    if (!strcmp(words.at[0], "HELLO")) {
        greet(stream);
        return;
    }
    int error = verb_setup(stream, &words);
    if (error == -1) error = verb_process(stream, &words);
    if (error == -1) error = fail(ENOSYS, "no verb %.32s", words.at[0]);
    if (error >= 0) respond(stream, error, NULL);
}

#define SOON (8u << 10)
#define SOON_MICROSECONDS 150
static size_t input_have;

static void input_frame(void) {
    struct header header;
    memcpy(&header, input, sizeof header);
    char *payload = input + sizeof header;
    uint32_t count;
    switch (header.type) {
    case PING: send_frame(PONG, header.stream, 0, payload, header.length); break;
    case DATA: process_data(header.stream, payload, header.length); break;
    case END: process_end(header.stream); break;
    case CREDIT:
        memcpy(&count, payload, 4);
        process_credit(header.stream, count);
        break;
    case REQ: request(header.stream, input, payload, header.length); break;
    }
}

/* Reads what is there, while answers have room. 0: the channel was closed. The host's port brings 4 KiB at a time: of a
   long frame some is let come together, for each turn through poll costs as much as to copy what it brought. */
static int input_read(void) {
    int moved = 1;
    for (int turns = 0; turns < 256 && queue_room() > 2 * MAX_FRAME; turns++) {
        size_t want = sizeof(struct header);
        if (!input_have && input == spare && !(input = files_slot())) input = spare;
        if (input_have >= want) want += ((struct header *)input)->length;
        if (input_have < want) {
            ssize_t count = read(channel, input + input_have, want - input_have);
            if (count < 0 && errno == EAGAIN && moved && want - input_have >= SOON) {
                usleep(SOON_MICROSECONDS);
                moved = 0;
                continue;
            }
            if (count < 0 && (errno == EAGAIN || errno == EINTR)) return 1;
            if (count <= 0) return 0;
            input_have += count;
            moved = 1;
        }
        if (input_have == sizeof(struct header)) {
            const char *wrong = check_header((struct header *)input);
            if (wrong) protocol_error(wrong);
            want = sizeof(struct header) + ((struct header *)input)->length;
        }
        if (input_have == want) {
            input_have = 0;
            input_frame();
        }
    }
    return 1;
}

/* ---- the channel */
static int open_port(const char *name) {
    for (int tries = 0; tries < 2000; tries++) {
        DIR *ports = opendir("/sys/class/virtio-ports");
        struct dirent *entry;
        while (ports && (entry = readdir(ports))) {
            char path[300], text[64];
            if (entry->d_name[0] == '.') continue;
            snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
            if (read_file(path, text, sizeof text) < 0) continue;
            text[strcspn(text, "\n")] = 0;
            if (strcmp(text, name)) continue;
            snprintf(path, sizeof path, "/dev/%s", entry->d_name);
            int fd = open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK);
            if (fd >= 0) {
                closedir(ports);
                return fd;
            }
        }
        if (ports) closedir(ports);
        usleep(1000);
    }
    return -1;
}

static int listen_vsock(unsigned port) {
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = port};
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) return -1;
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 4)) {
        close(fd);
        return -1;
    }
    return fd;
}

static void channel_reset(void) {
    input_have = 0;
    queue_head = queue_tail = 0;
    process_detach();
    if (listener >= 0 && channel >= 0) {
        close(channel);
        channel = -1;
    }
}

static void load_modules(void) {
    static char list[16384];
    if (read_file("/modules.list", list, sizeof list) < 0) return;
    for (char *path = strtok(list, "\n"); path; path = strtok(NULL, "\n")) {
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST)) say("agent: module %s: %s", path, strerror(errno));
        if (fd >= 0) close(fd);
        unlink(path); /* its memory is wanted */
    }
}

/* A container's pivot_root needs a root that is not the initramfs itself. */
static void leave_initramfs(void) {
    mkdir("/root", 0700);
    if (mount("tmpfs", "/root", "tmpfs", 0, "mode=755") || chdir("/root") || mount(".", "/", NULL, MS_MOVE, NULL) ||
        chroot(".") || chdir("/"))
        say("agent: leaving the initramfs: %s", strerror(errno));
}

static void reap(int signals) {
    struct signalfd_siginfo info;
    int status;
    pid_t pid;
    while (read(signals, &info, sizeof info) > 0) continue;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        if (pid == files_pid) {
            say("agent: the file workers ended; new ones start");
            close(files);
            files_forget(input);
            files = files_start();
        } else process_reaped(pid, status);
    }
}

/* A long answer is written from where it was made while the host takes it at once: to copy it takes longer than that. */
static void files_read(void) {
    while (queue_room() > 2 * MAX_FRAME) {
        char *at = queue_reserve();
        ssize_t count = recv(files, at, MAX_FRAME, MSG_DONTWAIT);
        if (count <= 0) return;
        size_t length = count, sent = 0;
        const char *frame = files_answer(at, &length);
        if (length > SOON && queue_head == queue_tail) sent = channel_write(frame, length);
        if (frame != at || sent) memmove(at, frame + sent, length - sent);
        queue_commit(length - sent);
        files_answered(frame);
    }
}

static unsigned boot(int guest) {
    char line[4096], *at;
    if (guest) {
        load_modules();
        leave_initramfs();
    }
    mount_basics();
    loopback_up();
    cgroup_prepare();
    if (read_file("/proc/cmdline", line, sizeof line) < 0) return 0;
    return (at = strstr(line, "fd.vsock=")) ? strtoul(at + 9, NULL, 10) : 0;
}

/* With an argument it is process 1 of a pid namespace, not of a guest, and that descriptor is the channel (for tests). */
int main(int argc, char **argv) {
    static struct pollfd fds[1100];
    if (argc > 1 && !strcmp(argv[1], "warm")) return puts("warm") < 0; /* a container's program, for warming guests up */
    int given = argc > 1 ? atoi(argv[1]) : -1;
    unsigned port = boot(given < 0);
    sigset_t mask;
    sigemptyset(&mask);
    sigaddset(&mask, SIGCHLD);
    sigprocmask(SIG_BLOCK, &mask, NULL);
    signal(SIGPIPE, SIG_IGN);
    int signals = signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK);
    if (given >= 0) {
        channel = given;
        fcntl(channel, F_SETFD, FD_CLOEXEC);
        fcntl(channel, F_SETFL, O_RDWR | O_NONBLOCK);
    } else if (port) listener = listen_vsock(port);
    else channel = open_port("fd.agent");
    if (channel < 0 && listener < 0) {
        say("agent: no port to the host: %s", strerror(errno));
        end_guest(0);
    }
    files = files_start();
    int greeted = 0;
    for (;;) {
        if (channel >= 0 && !greeted) {
            greet(0);
            greeted = 1;
        }
        process_flush();
        queue_write();
        size_t room = queue_room();
        fds[0] = (struct pollfd){channel, (room > 2 * MAX_FRAME ? POLLIN : 0) | (queue_head < queue_tail ? POLLOUT : 0), 0};
        fds[1] = (struct pollfd){signals, POLLIN, 0};
        fds[2] = (struct pollfd){room > 2 * MAX_FRAME ? files : -1, POLLIN, 0};
        fds[3] = (struct pollfd){channel < 0 ? listener : -1, POLLIN, 0}; /* one host at a time: the next waits for its HELLO */
        int count = 4 + process_poll(fds + 4, sizeof fds / sizeof *fds - 4);
        if (poll(fds, count, -1) < 0) continue;
        if (fds[2].revents & POLLIN) files_read();
        if (fds[1].revents & POLLIN) reap(signals);
        process_ready(fds + 4, count - 4);
        if (fds[3].revents & POLLIN) {
            struct sockaddr_vm peer = {0};
            socklen_t size = sizeof peer;
            int fd = accept4(listener, (struct sockaddr *)&peer, &size, SOCK_CLOEXEC | SOCK_NONBLOCK);
            if (fd >= 0 && peer.svm_cid != VMADDR_CID_HOST) close(fd); /* of this guest: no host of ours */
            else if (fd >= 0) {
                channel = fd;
                greeted = 0;
                continue;
            }
        }
        if (fds[0].revents & POLLIN) {
            if (!input_read()) fds[0].revents |= POLLHUP;
            else fds[0].revents &= ~POLLHUP;
        }
        if (fds[0].revents & (POLLHUP | POLLERR)) { /* nobody is there: wait for somebody, who is greeted anew */
            channel_reset();
            if (given >= 0) end_guest(0);
            if (greeted || listener >= 0) greeted = 0;
            struct pollfd wait = {channel, POLLOUT, 0};
            while (channel >= 0 && (poll(&wait, 1, 0), wait.revents & (POLLHUP | POLLERR))) {
                usleep(10000);
                reap(signals);
            }
        }
    }
}
