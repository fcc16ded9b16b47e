/* The agent of a guest: what its files share. The protocol is described in ../protocol.py and ../verbs.py.

   Process 1 is one thread and never blocks on the port. File verbs are answered by a child with several threads
   (files.c), so that a file that hangs does not silence the agent. A container's process is a child too (container.c). */
#pragma once
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

#define VERSION 2
#define BULK (128u << 10)
#define MAX_PAYLOAD (BULK + (4u << 10))
#define MAX_WORDS 8192
#define MAX_PING 64
#define WINDOW (256u << 10)
#define MAX_ID 64
#define MAX_FRAME (MAX_PAYLOAD + sizeof(struct header))

enum { HELLO = 1, REQ, RESP, DATA, END, EXIT, CREDIT, PING, PONG };
enum { EXIT_OOM = 1, EXIT_SIGNALED = 2 };

struct header {
    uint32_t length, stream;
    uint8_t type, flag;
    uint16_t zero;
} __attribute__((packed));

/* frame.c: what comes in. Each returns NULL, or what was wrong. */
struct words {
    int count;
    char *at[MAX_WORDS]; /* each ends with a NUL that is not part of it */
    uint32_t length[MAX_WORDS];
};
struct part { /* of a value whose parts are joined by NUL */
    char *at;
    uint32_t length;
};
const char *check_header(const struct header *header);
const char *split_words(char *payload, uint32_t length, struct words *words); /* writes payload[length] */
char *value_of(struct words *words, const char *key, uint32_t *length);        /* NULL: absent */
char *next_value(struct words *words, const char *key, int *at, uint32_t *length);
int number_of(struct words *words, const char *key, int base, long long fallback, long long *out); /* errno */
int number(const char *text, int base, long long *out);                                            /* errno */
int parts_of(char *value, uint32_t length, struct part *parts, int most);                          /* their number */
int named(char *value, uint32_t length, struct part *rest); /* NAME NUL REST, whatever is in that; errno */

/* frame.c: an answer being built. One per thread. */
struct answer {
    uint32_t used;
    int overflow;
    char frame[sizeof(struct header) + MAX_PAYLOAD];
};
void answer_begin(struct answer *answer);
void answer_add(struct answer *answer, const char *key, const void *data, size_t length);
void answer_text(struct answer *answer, const char *key, const char *format, ...) __attribute__((format(printf, 3, 4)));
uint32_t answer_end(struct answer *answer, uint32_t stream, int error); /* bytes of the frame */

/* agent.c */
extern char step[256]; /* what failed, for people */
int fail(int error, const char *format, ...) __attribute__((format(printf, 2, 3))); /* sets step, returns error */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));           /* on the console */
void send_frame(int type, uint32_t stream, int flag, const void *data, uint32_t length);
void flush_queue(int milliseconds); /* waits for the host to take what is queued */
size_t queue_room(void);
char *queue_reserve(void); /* where a frame may be written; follow with queue_commit */
void queue_commit(size_t length);
void respond(uint32_t stream, int error, struct answer *answer); /* NULL: no words but step */
void protocol_error(const char *what) __attribute__((noreturn));
extern struct answer reply;

/* setup.c */
int verb_setup(uint32_t stream, struct words *words); /* -1: not one of its verbs, -2: answered itself; else errno */
int make_dirs(const char *path, mode_t mode);
int read_file(const char *path, char *buffer, size_t size); /* its bytes, NUL-terminated; -1 */
int write_file(const char *path, const char *data, size_t length); /* errno */
int set_sysctls(struct words *words, const char *key);
void mount_basics(void);
void end_guest(int off) __attribute__((noreturn));

/* net.c */
int verb_net(struct words *words);
void loopback_up(void);

/* cgroup.c */
#define CGROUPS "/sys/fs/cgroup"
#define CGROUP CGROUPS "/container"
void cgroup_prepare(void);
int cgroup_apply(struct words *words);
int cgroup_enter(void);
int cgroup_signal(int signal);
int cgroup_freeze(int state);
long long cgroup_oom_kills(void);
void cgroup_stats(struct answer *answer);
void list_processes(struct answer *answer);

/* process.c: processes and streams, the parent's side */
int verb_process(uint32_t stream, struct words *words);
void process_data(uint32_t stream, const char *data, uint32_t length);
void process_end(uint32_t stream);
void process_credit(uint32_t stream, uint32_t count);
int process_poll(void *pollfds, int most); /* fills struct pollfd; returns their number */
void process_ready(void *pollfds, int count);
void process_reaped(pid_t pid, int status);
void process_flush(void);
void process_forget(void); /* lets the container's mounts go */
void process_detach(void); /* the host is gone: what is written meanwhile is dropped */
pid_t container_pid(void);
int stream_used(uint32_t stream);

/* container.c: the child's side; both end in exec or _exit */
struct child {
    struct words *words;
    int status;             /* socket: M with a terminal, S set up, E errno step */
    int in, out, err;       /* -1: /dev/null for in, the terminal's for all when tty */
    int tty, init;
    int pid_namespace, joins[4]; /* of an EXEC: mnt ipc uts cgroup */
};
void child_run(struct child *child) __attribute__((noreturn));
void child_exec(struct child *child) __attribute__((noreturn));

/* files.c */
int files_start(void);               /* a socket; its frames are REQ and RESP */
int is_file_verb(const char *verb);
int files_root(const char *name, const char *path); /* errno */
char *files_slot(void);              /* where a frame may be read so that it needs not be copied; NULL: none is free */
int files_give(int socket, const char *frame, size_t length); /* -1: not taken; 1: the slot is no longer the caller's */
const char *files_answer(const char *frame, size_t *length);  /* what came from the socket: the answer, which may lie elsewhere */
void files_answered(const char *frame);                       /* it is not looked at any more */
void files_forget(const char *kept);                          /* slots of workers that ended, all but this one */
extern pid_t files_pid;

/* credentials.c */
struct identity {
    long long uid, gid, umask, no_new_privs;
    int has_caps;
    uint64_t caps[5]; /* bounding effective permitted inheritable ambient */
};
int identity_of(struct words *words, struct identity *identity);
int identity_take(struct words *words, struct identity *identity); /* limits, groups, ids, capabilities, seccomp */
