/* The file verbs: a process of its own with several threads, each taking one request at a time from one socket.
   Paths are resolved below a root by openat2(RESOLVE_IN_ROOT); a last name is never followed. */
#include "agent.h"
#include <dirent.h>
#include <linux/openat2.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>

#define WORKERS 4
#define HANDLES 1024
#define ROOTS 16
#define MAX_NAMES 512 /* bytes of the names of xattrs that come with attributes */
#define EARLY (64u << 10) /* most bytes that come with OPEN */

#define SLOTS 9
#define ANSWERS 10 /* of the workers: being made, or on their way through process 1 */

pid_t files_pid;
static struct roots { /* shared with process 1, which writes it before a request that needs it goes out */
    char name[ROOTS][32], path[ROOTS][512];
    int taken[SLOTS]; /* by process 1, which reads a frame into one; let go by the worker who has done what it says */
    char slot[SLOTS][MAX_FRAME + 1];
    int lent[ANSWERS]; /* by a worker; let go by process 1, which has read what is there */
    struct answer answer[ANSWERS];
} *roots;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct handle {
    int fd, uses, closing, open;
    int direct; /* 0: not tried, -1: there is none, else the same file past the page cache, for writing */
    uint32_t turn;
    long long ahead; /* up to where its disk was asked for it */
} handles[HANDLES];

#define ALIGNED 4096
#define AHEAD (1ll << 20) /* bytes of a file read in order that its disk is asked for at once */
#define PIECE (1u << 20) /* most bytes of a WRITE from there */
static int scratch = -1; /* the disk on which the host lays down what is to be written; once open it stays */

static struct worker {
    pthread_t thread;
    int socket;
    char bulk[PIECE] __attribute__((aligned(4096))); /* read past the page cache */
    char input[MAX_FRAME + 1], list[32 << 10];
    struct words words;
    struct answer *answer, own; /* own: when all others are lent */
} workers[WORKERS];

struct packed { /* ATTR of protocol.py */
    uint32_t mode, nlink, uid, gid, rdev_major, rdev_minor;
    uint64_t dev, ino, size, blocks;
    int64_t atime, mtime, ctime;
} __attribute__((packed));

int files_root(const char *name, const char *path) {
    for (int i = 0; i < ROOTS; i++) {
        if (*roots->name[i] && strcmp(roots->name[i], name)) continue;
        if (strlen(name) >= sizeof roots->name[i] || strlen(path) >= sizeof roots->path[i]) return ENAMETOOLONG;
        strcpy(roots->path[i], path);
        strcpy(roots->name[i], name);
        return 0;
    }
    return ENOSPC;
}

/* ---- frames without copies: process 1's side */
char *files_slot(void) {
    for (int i = 0; roots && i < SLOTS; i++)
        if (!__atomic_exchange_n(&roots->taken[i], 1, __ATOMIC_ACQUIRE)) return roots->slot[i];
    return NULL;
}

static int slot_of(const char *frame) {
    for (int i = 0; roots && i < SLOTS; i++)
        if (frame == roots->slot[i]) return i;
    return -1;
}

int files_give(int socket, const char *frame, size_t length) {
    int slot = slot_of(frame);
    const void *data = slot < 0 ? (const void *)frame : &slot;
    return send(socket, data, slot < 0 ? length : sizeof slot, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 ? -1 : slot >= 0;
}

const char *files_answer(const char *frame, size_t *length) {
    int number;
    if (*length != sizeof number) return frame;
    memcpy(&number, frame, sizeof number);
    *length = roots->answer[number].used;
    return roots->answer[number].frame;
}

void files_answered(const char *frame) {
    for (int i = 0; i < ANSWERS; i++)
        if (frame == roots->answer[i].frame) __atomic_store_n(&roots->lent[i], 0, __ATOMIC_RELEASE);
}

void files_forget(const char *kept) {
    memset(roots->lent, 0, sizeof roots->lent);
    for (int i = 0; roots && i < SLOTS; i++)
        if (kept != roots->slot[i]) __atomic_store_n(&roots->taken[i], 0, __ATOMIC_RELEASE);
}

/* ---- handles */
static int handle_add(int fd, long long *out) {
    int error = EMFILE;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < HANDLES && error; i++)
        if (!handles[i].open) {
            handles[i] = (struct handle){.fd = fd, .open = 1, .turn = handles[i].turn + 1};
            *out = (long long)handles[i].turn * HANDLES + i;
            error = 0;
        }
    pthread_mutex_unlock(&lock);
    if (error) close(fd);
    return error;
}

static struct handle *handle_find(long long value) {
    struct handle *found = NULL;
    if (value < 0) return NULL;
    pthread_mutex_lock(&lock);
    struct handle *h = &handles[value % HANDLES];
    if (h->open && !h->closing && h->turn == value / HANDLES) {
        h->uses++;
        found = h;
    }
    pthread_mutex_unlock(&lock);
    return found;
}

static struct handle *handle_take(struct words *words, int *error) {
    long long value;
    struct handle *found = number_of(words, "handle", 10, -1, &value) ? NULL : handle_find(value);
    *error = found ? 0 : EBADF;
    return found;
}

/* The lock is held. */
static void handle_shut(struct handle *h) {
    close(h->fd);
    if (h->direct > 0) close(h->direct);
    h->open = 0;
}

static void handle_drop(struct handle *h, int closing) {
    if (!h) return;
    pthread_mutex_lock(&lock);
    h->uses--;
    h->closing |= closing;
    if (h->closing && !h->uses) handle_shut(h);
    pthread_mutex_unlock(&lock);
}

static int handle_closing(struct handle *h) {
    pthread_mutex_lock(&lock);
    int closing = h->closing;
    pthread_mutex_unlock(&lock);
    return closing;
}

static void handle_close_all(void) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < HANDLES; i++) {
        struct handle *h = &handles[i];
        if (!h->open) continue;
        h->closing = 1;
        if (!h->uses) handle_shut(h);
    }
    pthread_mutex_unlock(&lock);
}

/* ---- paths; each returns a descriptor, or -1 with errno */
static int resolve(int at, const char *path, uint64_t flags, mode_t mode) {
    struct open_how how = {.flags = flags | O_CLOEXEC, .mode = mode, .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS};
    return syscall(SYS_openat2, at, *path ? path : ".", &how, sizeof how);
}

static int root_of(struct words *words) {
    char *name = value_of(words, "root", NULL);
    for (int i = 0; i < ROOTS; i++)
        if (*roots->name[i] && !strcmp(roots->name[i], name ? name : "container")) return open(roots->path[i], O_PATH | O_DIRECTORY | O_CLOEXEC);
    return errno = ENXIO, -1;
}

static char *path_of(struct words *words, const char *key) {
    uint32_t length;
    char *path = value_of(words, key, &length);
    if (!path || strlen(path) != length || length > 4095) return errno = EINVAL, NULL;
    while (*path == '/') path++;
    return path;
}

static int open_path(struct words *words, uint64_t flags) {
    char *path = path_of(words, "path");
    int root = path ? root_of(words) : -1;
    if (root < 0) return -1;
    int fd = resolve(root, path, flags | O_NOFOLLOW, 0), error = errno;
    close(root);
    return errno = error, fd;
}

/* The folder of `key`, and its last name. */
static int open_parent(struct words *words, const char *key, char **name) {
    char *path = path_of(words, key), copy[4096];
    int root = path ? root_of(words) : -1;
    if (root < 0) return -1;
    strcpy(copy, path);
    char *slash = strrchr(copy, '/');
    if (slash) *slash = 0;
    *name = slash ? path + (slash - copy) + 1 : path;
    int wrong = !**name || !strcmp(*name, ".") || !strcmp(*name, "..");
    int fd = wrong ? -1 : resolve(root, slash ? copy : "", O_PATH | O_DIRECTORY, 0), error = wrong ? EINVAL : errno;
    close(root);
    return errno = error, fd;
}

static int fds_here; /* this process is in /proc/self/fd: a walk there takes an emulated CPU longer than what is done then */

static const char *link_of(int fd, char text[40]) {
    snprintf(text, 40, "%s%d", fds_here ? "" : "/proc/self/fd/", fd);
    return text;
}

static void pack(const struct stat *s, struct packed *out) {
    *out = (struct packed){s->st_mode, s->st_nlink, s->st_uid, s->st_gid, major(s->st_rdev), minor(s->st_rdev), s->st_dev, s->st_ino,
                           s->st_size, s->st_blocks, s->st_atim.tv_sec * 1000000000ll + s->st_atim.tv_nsec,
                           s->st_mtim.tv_sec * 1000000000ll + s->st_mtim.tv_nsec, s->st_ctim.tv_sec * 1000000000ll + s->st_ctim.tv_nsec};
}

/* The names of its xattrs, joined by NUL: their length; -1: not known here. */
static ssize_t names_of(int fd, const char *name, char text[MAX_NAMES]) {
    char link[300];
    ssize_t count = *name ? -1 : flistxattr(fd, text, MAX_NAMES);
    if (*name || (count < 0 && errno == EBADF)) { /* it is open as a path only */
        link_of(fd, link);
        if (*name) snprintf(link + strlen(link), sizeof link - 40, "/%s", name);
        count = *name ? llistxattr(link, text, MAX_NAMES) : listxattr(link, text, MAX_NAMES);
    }
    return count > 0 ? count - 1 : count;
}

static int answer_attr(struct worker *w, int fd, const char *name) {
    struct stat info;
    struct packed packed;
    char names[MAX_NAMES];
    if (fstatat(fd, name, &info, AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH)) return errno;
    pack(&info, &packed);
    answer_add(w->answer, "attr", &packed, sizeof packed);
    ssize_t count = names_of(fd, name, names);
    if (count >= 0) answer_add(w->answer, "names", names, count);
    return 0;
}

/* When a folder's entries last changed: who gets the same twice knows that none came or went in between. */
static void folder_time(int fd, int64_t out[2]) {
    struct stat info;
    out[0] = out[1] = -1;
    if (fstat(fd, &info)) return;
    out[0] = info.st_mtim.tv_sec * 1000000000ll + info.st_mtim.tv_nsec;
    out[1] = info.st_ctim.tv_sec * 1000000000ll + info.st_ctim.tv_nsec;
}

/* FOLDER of verbs.py: as it was `before`, and as it is. */
static void answer_folder(struct worker *w, int fd, const int64_t before[2]) {
    int64_t times[4] = {before[0], before[1]};
    folder_time(fd, times + 2);
    answer_add(w->answer, "folder", times, sizeof times);
}

/* ---- verbs: 0 or errno */
static int do_stat(struct worker *w) {
    int error;
    if (value_of(&w->words, "handle", NULL)) {
        struct handle *h = handle_take(&w->words, &error);
        if (!h) return error;
        error = answer_attr(w, h->fd, "");
        handle_drop(h, 0);
        return error;
    }
    int fd = open_path(&w->words, O_PATH);
    if (fd < 0) return errno;
    error = answer_attr(w, fd, "");
    close(fd);
    return error;
}

struct entry { /* linux_dirent64 */
    uint64_t ino;
    int64_t next;
    uint16_t size;
    uint8_t type;
    char name[];
};

/* Entries until the answer is full: 1, or the folder's end: 0. */
static int list_some(struct worker *w, int fd, int *error) {
    char item[sizeof(struct packed) + 256 + MAX_NAMES];
    int64_t at = lseek(fd, 0, SEEK_CUR);
    for (;;) {
        int count = syscall(SYS_getdents64, fd, w->list, sizeof w->list);
        if (count <= 0) return *error = count < 0 ? errno : 0, 0;
        for (int n = 0; n < count;) {
            struct entry *entry = (struct entry *)(w->list + n);
            struct stat info;
            n += entry->size;
            size_t length = strlen(entry->name);
            if (w->answer->used + sizeof item + 96 > sizeof w->answer->frame) {
                if (lseek(fd, at, SEEK_SET) < 0) return *error = errno, 0;
                return *error = 0, 1;
            }
            at = entry->next;
            if (!strcmp(entry->name, ".") || !strcmp(entry->name, "..") || length > 255) continue;
            if (fstatat(fd, entry->name, &info, AT_SYMLINK_NOFOLLOW)) continue; /* gone meanwhile */
            pack(&info, (struct packed *)item);
            memcpy(item + sizeof(struct packed), entry->name, length);
            length += sizeof(struct packed);
            ssize_t names = names_of(fd, entry->name, item + length + 1);
            if (names >= 0) item[length] = 0, length += 1 + names;
            answer_add(w->answer, "entry", item, length);
        }
    }
}

static int do_list(struct worker *w) {
    int error, more;
    char *given = value_of(&w->words, "handle", NULL);
    if (given) {
        struct handle *h = handle_take(&w->words, &error);
        if (!h) return error;
        more = list_some(w, h->fd, &error);
        if (more) answer_text(w->answer, "handle", "%s", given);
        handle_drop(h, !more);
        return error;
    }
    int fd = open_path(&w->words, O_RDONLY | O_DIRECTORY);
    long long handle;
    int64_t before[2];
    if (fd < 0) return errno;
    folder_time(fd, before);
    more = list_some(w, fd, &error);
    if (!more && !error) answer_folder(w, fd, before);
    if (!more) close(fd);
    else if (!(error = handle_add(fd, &handle))) answer_text(w->answer, "handle", "%lld", handle);
    return error;
}

static int do_readlink(struct worker *w) {
    char text[4096];
    int fd = open_path(&w->words, O_PATH);
    if (fd < 0) return errno;
    ssize_t count = readlinkat(fd, "", text, sizeof text);
    int error = count < 0 ? (errno == ENOENT ? EINVAL : errno) : 0;
    if (!error) answer_add(w->answer, "target", text, count);
    close(fd);
    return error;
}

/* Owner and mode of what was made: chown clears bits, so the mode comes last. */
static int own(struct words *words, int parent, const char *name, int chmod_too, mode_t mode) {
    long long uid, gid;
    if (number_of(words, "uid", 10, -1, &uid) || number_of(words, "gid", 10, -1, &gid)) return EINVAL;
    if ((uid != -1 || gid != -1) && fchownat(parent, name, uid, gid, AT_SYMLINK_NOFOLLOW)) return errno;
    if (!chmod_too) return 0;
    int fd = openat(parent, name, O_PATH | O_NOFOLLOW | O_CLOEXEC), error = 0;
    char link[40];
    if (fd < 0 || fchmodat(AT_FDCWD, link_of(fd, link), mode & 07777, 0)) error = errno;
    if (fd >= 0) close(fd);
    return error;
}

/* The same of an open file; what it has already is not set again, which takes longer than to look. */
static int own_open(struct words *words, int fd, mode_t mode) {
    long long uid, gid;
    struct stat info;
    if (number_of(words, "uid", 10, -1, &uid) || number_of(words, "gid", 10, -1, &gid)) return EINVAL;
    if ((uid != -1 || gid != -1) && fchown(fd, uid, gid)) return errno;
    if (fstat(fd, &info)) return errno;
    return (info.st_mode ^ mode) & 07777 && fchmod(fd, mode & 07777) ? errno : 0;
}

static int open_existing(struct worker *w, int flags) {
    struct stat info;
    char link[40];
    int path = open_path(&w->words, O_PATH);
    if (path < 0) return -1;
    int fd = -1, error = 0;
    if (fstat(path, &info)) error = errno;
    else if (!S_ISREG(info.st_mode)) error = S_ISDIR(info.st_mode) ? EISDIR : S_ISLNK(info.st_mode) ? ELOOP : ENXIO;
    else if ((fd = open(link_of(path, link), flags | O_NONBLOCK | O_NOCTTY | O_CLOEXEC)) < 0) error = errno;
    close(path);
    return errno = error, fd;
}

/* `data` of the answer. */
static int read_some(struct worker *w, int fd, long long offset, long long size) {
    char *word = w->answer->frame + w->answer->used; /* read into its place */
    ssize_t have = 0;
    while (have < size) {
        ssize_t count = pread(fd, word + 9 + have, size - have, offset + have);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0 && !have) return errno;
        if (count <= 0) break;
        have += count;
    }
    uint32_t length = have + 5;
    memcpy(word, &length, 4);
    memcpy(word + 4, "data=", 5);
    w->answer->used += 4 + length;
    return 0;
}

static int do_open(struct worker *w) {
    char *letters = value_of(&w->words, "flags", NULL), *name;
    long long mode, handle, early;
    int64_t before[2];
    if (!letters || strspn(letters, "rwatcx") != strlen(letters) || number_of(&w->words, "mode", 8, 0644, &mode)) return EINVAL;
    if (number_of(&w->words, "early", 10, 0, &early) || early < 0 || early > EARLY) return EINVAL;
    int writes = strpbrk(letters, "wa") != NULL, fd = -1, error = 0;
    int flags = writes ? (strchr(letters, 'r') ? O_RDWR : O_WRONLY) : O_RDONLY;
    if (strchr(letters, 'a')) flags |= O_APPEND;
    if (strchr(letters, 't')) flags |= O_TRUNC;
    if (strchr(letters, 'c')) {
        int parent = open_parent(&w->words, "path", &name);
        if (parent < 0) return errno;
        folder_time(parent, before);
        fd = openat(parent, name, flags | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK, mode & 07777);
        error = fd < 0 ? errno : own_open(&w->words, fd, mode);
        if (fd >= 0) answer_folder(w, parent, before);
        close(parent);
        if (fd >= 0 && error) return close(fd), error;
        if (fd < 0 && (error != EEXIST || strchr(letters, 'x'))) return error;
    }
    if (fd < 0 && (fd = open_existing(w, flags)) < 0) return errno;
    if ((error = answer_attr(w, fd, ""))) return close(fd), error;
    struct stat info;
    if (early && !fstat(fd, &info) && info.st_size <= early) {
        if ((error = read_some(w, fd, 0, early)) || value_of(&w->words, "whole", NULL)) return close(fd), error;
    }
    if ((error = handle_add(fd, &handle))) return error;
    answer_text(w->answer, "handle", "%lld", handle);
    return 0;
}

/* Of a file read in order: more than the host has asked for, so that its requests find it there. */
static void read_ahead(struct handle *h, long long offset) {
    pthread_mutex_lock(&lock);
    long long from = h->ahead > offset && h->ahead <= offset + 4 * AHEAD ? h->ahead : offset, to = (offset / AHEAD + 4) * AHEAD;
    h->ahead = to;
    pthread_mutex_unlock(&lock);
    if (to > from) posix_fadvise(h->fd, from, to - from, POSIX_FADV_WILLNEED);
}

static int do_read(struct worker *w, struct handle *h) {
    long long offset, size;
    if (number_of(&w->words, "offset", 10, -1, &offset) || offset < 0 || number_of(&w->words, "size", 10, -1, &size) || size < 0 || size > BULK) return EINVAL;
    if (size == BULK && offset < 1ll << 60) read_ahead(h, offset);
    return read_some(w, h->fd, offset, size);
}

/* What the host has laid down on a disk, in w->bulk. 0 or errno. */
static int scratch_read(struct worker *w, long long from, long long size) {
    if (scratch < 0 || from < 0 || from % ALIGNED || size <= 0 || size > PIECE) return EINVAL;
    size_t whole = (size + ALIGNED - 1) / ALIGNED * ALIGNED;
    ssize_t count;
    while ((count = pread(scratch, w->bulk, whole, from)) < 0 && errno == EINTR) continue;
    return count < 0 ? errno : count < size ? EIO : 0;
}

static int do_scratch(struct worker *w) {
    long long at, size;
    char *disk = value_of(&w->words, "disk", NULL);
    if (!disk || number_of(&w->words, "at", 10, -1, &at) || number_of(&w->words, "size", 10, -1, &size)) return EINVAL;
    pthread_mutex_lock(&lock); /* its name is always the same, and other workers may be reading */
    int error = scratch < 0 && (scratch = open(disk, O_RDONLY | O_DIRECT | O_CLOEXEC)) < 0 ? errno : 0;
    pthread_mutex_unlock(&lock);
    if (error || (error = scratch_read(w, at, size))) return error;
    if (size > BULK) return EINVAL;
    answer_add(w->answer, "data", w->bulk, size);
    return 0;
}

/* Where to write what lies in w->bulk: to fill the page cache takes an emulated CPU three times as long as to let the
   disk have it. The kernel keeps the two alike. */
static int direct_of(struct handle *h, long long offset, long long size) {
    char link[40];
    if (offset % ALIGNED || size % ALIGNED) return h->fd;
    pthread_mutex_lock(&lock);
    if (!h->direct) {
        int flags = fcntl(h->fd, F_GETFL);
        h->direct = flags < 0 || flags & O_APPEND ? -1 : open(link_of(h->fd, link), O_WRONLY | O_DIRECT | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
        if (!h->direct) h->direct = -1; /* the number of a standard stream, closed here */
    }
    int fd = h->direct < 0 ? h->fd : h->direct;
    pthread_mutex_unlock(&lock);
    return fd;
}

static int do_write(struct worker *w, struct handle *h) {
    long long offset, from, size;
    uint32_t length, have = 0;
    int fd = h->fd, error, why = EIO;
    char *data = value_of(&w->words, "data", &length);
    if (number_of(&w->words, "offset", 10, -1, &offset) || offset < 0) return EINVAL;
    if (!data) {
        if (number_of(&w->words, "from", 10, -1, &from) || number_of(&w->words, "size", 10, -1, &size)) return EINVAL;
        if ((error = scratch_read(w, from, size))) return error;
        if (handle_closing(h)) return EBADF; /* a host that is new may have laid something else there meanwhile */
        data = w->bulk;
        length = size;
        fd = direct_of(h, offset, size);
    }
    if (data != w->bulk && length > BULK) return EINVAL;
    while (have < length) {
        ssize_t count = pwrite(fd, data + have, length - have, offset + have);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0 && errno == EINVAL && fd != h->fd) {
            fd = h->fd;
            continue;
        }
        if (count < 0 && !have) return errno;
        if (count < 0) why = errno;
        if (count <= 0) break;
        have += count;
    }
    answer_text(w->answer, "size", "%u", have);
    if (have < length) answer_text(w->answer, "error", "%d", why);
    struct stat info;
    struct packed packed;
    if (!fstat(fd, &info)) pack(&info, &packed), answer_add(w->answer, "attr", &packed, sizeof packed);
    return 0;
}

static int with_handle(struct worker *w, char verb) {
    int error;
    long long offset, size, mode;
    if (verb == 'C' && value_of(&w->words, "all", NULL)) return handle_close_all(), 0;
    if (verb == 'C' && !value_of(&w->words, "handle", NULL)) return 0; /* `done` has said all */
    struct handle *h = handle_take(&w->words, &error);
    if (!h) return error;
    if (verb == 'R') error = do_read(w, h);
    else if (verb == 'W') error = do_write(w, h);
    else if (verb == 'S') error = (value_of(&w->words, "data", NULL) ? fdatasync(h->fd) : fsync(h->fd)) ? errno : 0;
    else if (verb == 'T') error = number_of(&w->words, "size", 10, -1, &size) || size < 0 ? EINVAL : ftruncate(h->fd, size) ? errno : 0;
    else if (verb == 'A') {
        if (number_of(&w->words, "mode", 10, 0, &mode) || number_of(&w->words, "offset", 10, -1, &offset) || number_of(&w->words, "size", 10, -1, &size))
            error = EINVAL;
        else error = fallocate(h->fd, mode, offset, size) ? errno : 0;
    }
    handle_drop(h, verb == 'C');
    return error;
}

static int do_truncate(struct worker *w) {
    long long size;
    if (value_of(&w->words, "handle", NULL)) return with_handle(w, 'T');
    if (number_of(&w->words, "size", 10, -1, &size) || size < 0) return EINVAL;
    int fd = open_existing(w, O_WRONLY);
    if (fd < 0) return errno;
    int error = ftruncate(fd, size) ? errno : answer_attr(w, fd, "");
    close(fd);
    return error;
}

/* MKNOD MKDIRAT SYMLINK UNLINK RMDIR CHOWN UTIMENS: by the folder and the name */
static int one_time(struct words *words, const char *key, struct timespec *out) {
    char *value = value_of(words, key, NULL);
    long long ns;
    *out = (struct timespec){0, !value ? UTIME_OMIT : UTIME_NOW};
    if (!value || !strcmp(value, "now")) return 0;
    if (number(value, 10, &ns)) return EINVAL;
    *out = (struct timespec){ns / 1000000000, ns % 1000000000};
    if (out->tv_nsec < 0) out->tv_nsec += 1000000000, out->tv_sec--;
    return 0;
}

static int with_name(struct worker *w, const char *verb, int at, const char *name) {
    struct words *words = &w->words;
    long long mode, major_, minor_, uid, gid;
    int error;
    if (!strcmp(verb, "UNLINK")) return unlinkat(at, name, 0) ? errno : 0;
    if (!strcmp(verb, "RMDIR")) return unlinkat(at, name, AT_REMOVEDIR) ? errno : 0;
    if (!strcmp(verb, "SYMLINK")) {
        uint32_t length;
        char *target = value_of(words, "target", &length);
        if (!target || strlen(target) != length) return EINVAL;
        if (symlinkat(target, at, name)) return errno;
        error = own(words, at, name, 0, 0);
    } else {
        if (!value_of(words, "mode", NULL) || number_of(words, "mode", 8, 0, &mode) || number_of(words, "rdev_major", 10, 0, &major_) ||
            number_of(words, "rdev_minor", 10, 0, &minor_) || number_of(words, "uid", 10, -1, &uid) || number_of(words, "gid", 10, -1, &gid))
            return EINVAL;
        if (*verb == 'M' && verb[2] == 'D' ? mkdirat(at, name, mode & 07777) : mknodat(at, name, mode, makedev(major_, minor_))) return errno;
        error = own(words, at, name, 1, mode);
    }
    return error ? error : answer_attr(w, at, name);
}

static int two_names(struct worker *w, const char *verb) {
    char *from, *to;
    long long flags;
    if (number_of(&w->words, "flags", 10, 0, &flags)) return EINVAL;
    int a = open_parent(&w->words, "path", &from);
    if (a < 0) return errno;
    int b = open_parent(&w->words, "to", &to), error = b < 0 ? errno : 0;
    if (!error && *verb == 'R') error = syscall(SYS_renameat2, a, from, b, to, (unsigned)flags) ? errno : 0;
    else if (!error && !(error = linkat(a, from, b, to, 0) ? errno : 0)) error = answer_attr(w, b, to);
    close(a);
    if (b >= 0) close(b);
    return error;
}

/* CHMOD CHOWN UTIMENS *XATTR STATFS: by a descriptor of the object, through its link in /proc where there is no other way */
static int with_object(struct worker *w, const char *verb, int fd) {
    struct words *words = &w->words;
    char link[40], *name = value_of(words, "name", NULL), *value;
    static __thread char text[65536];
    long long a, b;
    uint32_t length;
    struct stat info;
    link_of(fd, link);
    if (!strcmp(verb, "CHMOD")) {
        if (!value_of(words, "mode", NULL) || number_of(words, "mode", 8, 0, &a)) return EINVAL;
        if (fstat(fd, &info)) return errno;
        if (S_ISLNK(info.st_mode)) return EOPNOTSUPP;
        return chmod(link, a & 07777) ? errno : 0;
    }
    if (!strcmp(verb, "CHOWN")) {
        if (number_of(words, "uid", 10, -1, &a) || number_of(words, "gid", 10, -1, &b)) return EINVAL;
        return fchownat(fd, "", a, b, AT_EMPTY_PATH) ? errno : 0;
    }
    if (!strcmp(verb, "UTIMENS")) {
        struct timespec times[2];
        if (one_time(words, "atime", times) || one_time(words, "mtime", times + 1)) return EINVAL;
        return syscall(SYS_utimensat, fd, "", times, AT_EMPTY_PATH) ? errno : 0;
    }
    if (!strcmp(verb, "STATFS")) {
        struct statfs s;
        if (fstatfs(fd, &s)) return errno;
        answer_text(w->answer, "type", "%lld", (long long)s.f_type);
        answer_text(w->answer, "bsize", "%lld", (long long)s.f_bsize);
        answer_text(w->answer, "blocks", "%lld", (long long)s.f_blocks);
        answer_text(w->answer, "bfree", "%lld", (long long)s.f_bfree);
        answer_text(w->answer, "bavail", "%lld", (long long)s.f_bavail);
        answer_text(w->answer, "files", "%lld", (long long)s.f_files);
        answer_text(w->answer, "ffree", "%lld", (long long)s.f_ffree);
        answer_text(w->answer, "namelen", "%lld", (long long)s.f_namelen);
        return 0;
    }
    /* a symlink's own attributes are reached neither by O_PATH nor by /proc: getxattr(link) takes the object itself */
    if (!strcmp(verb, "LISTXATTR")) {
        ssize_t count = listxattr(link, text, sizeof text);
        if (count < 0) return errno;
        for (char *at = text; at < text + count; at += strlen(at) + 1) answer_add(w->answer, "name", at, strlen(at));
        return 0;
    }
    if (!name) return EINVAL;
    if (!strcmp(verb, "GETXATTR")) {
        ssize_t count = getxattr(link, name, text, sizeof text);
        if (count < 0) return errno;
        answer_add(w->answer, "value", text, count);
        return 0;
    }
    if (!strcmp(verb, "REMOVEXATTR")) return removexattr(link, name) ? errno : 0;
    value = value_of(words, "value", &length);
    if (!value || number_of(words, "flags", 10, 0, &a)) return EINVAL;
    return setxattr(link, name, value, length, a) ? errno : 0;
}

/* MAKE: a member of an archive, all of it, below the folder `at`, from which no link is followed. */
static int below(int base, const char *path, const char **name) {
    char copy[4096];
    struct open_how how = {.flags = O_PATH | O_DIRECTORY | O_CLOEXEC, .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS};
    strcpy(copy, path);
    char *slash = strrchr(copy, '/');
    if (slash) *slash = 0;
    *name = slash ? path + (slash - copy) + 1 : path;
    if (!**name || !strcmp(*name, ".") || !strcmp(*name, "..")) return errno = EINVAL, -1;
    return syscall(SYS_openat2, base, slash && *copy ? copy : ".", &how, sizeof how);
}

static int dress(struct words *words, int fd, mode_t mode) {
    struct timespec times[2];
    uint32_t length;
    int error = own_open(words, fd, mode & 07777), at = 1;
    for (char *name; !error && (name = next_value(words, "xattr", &at, &length));) {
        struct part value;
        if (named(name, length, &value)) return EINVAL;
        if (fsetxattr(fd, name, value.at, value.length, 0)) error = errno;
    }
    if (!error && (one_time(words, "mtime", times) || one_time(words, "mtime", times + 1))) error = EINVAL;
    return error ? error : futimens(fd, times) ? errno : 0;
}

static int make_open(struct worker *w, int parent, const char *name, mode_t mode, int dresses) {
    uint32_t length, have = 0;
    struct stat info;
    char *data = value_of(&w->words, "data", &length);
    int flags = (dresses ? O_RDONLY | (S_ISDIR(mode) ? O_DIRECTORY : 0) : O_WRONLY | O_CREAT | O_EXCL) | O_NONBLOCK | O_NOCTTY | O_NOFOLLOW | O_CLOEXEC;
    int fd = openat(parent, name, flags, 0600), error = 0;
    if (fd < 0) return errno;
    if (fstat(fd, &info)) error = errno;
    else if ((info.st_mode ^ mode) & S_IFMT) error = ESTALE;
    while (!error && data && !dresses && have < length) {
        ssize_t count = write(fd, data + have, length - have);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) error = count ? errno : EIO;
        else have += count;
    }
    if (!error) error = dress(&w->words, fd, mode);
    close(fd);
    return error;
}

static int make_one(struct worker *w, int base, int parent, const char *name, mode_t mode) {
    struct words *words = &w->words;
    struct timespec times[2];
    uint32_t length;
    long long major_, minor_;
    const char *last;
    char *path = path_of(words, "link");
    if (path) {
        int there = below(base, path, &last), error = there < 0 ? errno : 0;
        if (!error && linkat(there, last, parent, name, 0)) error = errno;
        if (there >= 0) close(there);
        return error;
    }
    if (value_of(words, "link", NULL)) return EINVAL;
    if (S_ISREG(mode)) return make_open(w, parent, name, mode, 0);
    if (S_ISLNK(mode)) {
        char *target = value_of(words, "target", &length);
        if (!target || strlen(target) != length) return EINVAL;
        if (symlinkat(target, parent, name)) return errno;
    } else {
        if (number_of(words, "rdev_major", 10, 0, &major_) || number_of(words, "rdev_minor", 10, 0, &minor_)) return EINVAL;
        if (mknodat(parent, name, (mode & S_IFMT) | 0600, makedev(major_, minor_))) return errno;
    }
    int error = own(words, parent, name, !S_ISLNK(mode), mode);
    if (!error && (one_time(words, "mtime", times) || one_time(words, "mtime", times + 1))) error = EINVAL;
    return error ? error : utimensat(parent, name, times, AT_SYMLINK_NOFOLLOW) ? errno : 0;
}

static int make_folder(struct worker *w, int parent, const char *name, mode_t mode) {
    struct stat info;
    if (!mkdirat(parent, name, mode & 07777)) return answer_text(w->answer, "made", "1"), 0;
    if (errno != EEXIST) return errno;
    if (fstatat(parent, name, &info, AT_SYMLINK_NOFOLLOW)) return errno;
    return S_ISDIR(info.st_mode) ? 0 : ENOTDIR;
}

static int do_make(struct worker *w) {
    long long mode;
    const char *name = ".";
    char *at = path_of(&w->words, "at"), *path = path_of(&w->words, "path");
    int dresses = value_of(&w->words, "dress", NULL) != NULL;
    if (!at || !path || !value_of(&w->words, "mode", NULL) || number_of(&w->words, "mode", 8, 0, &mode)) return EINVAL;
    if (dresses ? !S_ISREG(mode) && !S_ISDIR(mode) : !strchr("\001\002\004\006\010\012", (mode & S_IFMT) >> 12) || !(mode & S_IFMT)) return EINVAL;
    int root = root_of(&w->words);
    if (root < 0) return errno;
    int base = resolve(root, at, O_PATH | O_DIRECTORY, 0), error = base < 0 ? errno : 0;
    close(root);
    if (error) return error;
    int itself = dresses && !*path, parent = itself ? base : below(base, path, &name);
    if (parent < 0) error = errno;
    else if (dresses) error = make_open(w, parent, name, mode, 1);
    else if (S_ISDIR(mode)) error = make_folder(w, parent, name, mode);
    else if ((error = make_one(w, base, parent, name, mode)) == EEXIST) /* it takes the place of what is there */
        error = unlinkat(parent, name, 0) ? errno : make_one(w, base, parent, name, mode);
    if (parent >= 0 && !itself) close(parent);
    close(base);
    return error;
}

static const char *const by_name[] = {"MKNOD", "MKDIRAT", "SYMLINK", "UNLINK", "RMDIR", NULL};
static const char *const by_object[] = {"CHMOD", "CHOWN", "UTIMENS", "STATFS", "GETXATTR", "LISTXATTR", "SETXATTR", "REMOVEXATTR", NULL};
static const struct {
    const char *verb;
    char letter;
} by_handle[] = {{"READ", 'R'}, {"WRITE", 'W'}, {"FSYNC", 'S'}, {"FALLOCATE", 'A'}, {"CLOSE", 'C'}, {NULL, 0}};
static const struct {
    const char *verb;
    int (*run)(struct worker *);
} others[] = {{"STAT", do_stat}, {"LIST", do_list}, {"READLINK", do_readlink}, {"OPEN", do_open}, {"TRUNCATE", do_truncate}, {"SCRATCH", do_scratch}, {"MAKE", do_make}, {NULL, NULL}};

static int one_of(const char *const *list, const char *verb) {
    while (*list && strcmp(*list, verb)) list++;
    return *list != NULL;
}

int is_file_verb(const char *verb) {
    for (int i = 0; by_handle[i].verb; i++)
        if (!strcmp(by_handle[i].verb, verb)) return 1;
    for (int i = 0; others[i].verb; i++)
        if (!strcmp(others[i].verb, verb)) return 1;
    return !strcmp(verb, "RENAME") || !strcmp(verb, "LINK") || one_of(by_name, verb) || one_of(by_object, verb);
}

static int changes_object(const char *verb) { return strcmp(verb, "STATFS") && strcmp(verb, "GETXATTR") && strcmp(verb, "LISTXATTR"); }

/* An object, and its folder where it has one: resolved once, for the host is told of both. */
static int open_object(struct worker *w, int *folder) {
    char *name;
    *folder = open_parent(&w->words, "path", &name);
    if (*folder < 0) return errno == EINVAL ? open_path(&w->words, O_PATH) : -1; /* the root itself has none */
    int fd = openat(*folder, name, O_PATH | O_NOFOLLOW | O_CLOEXEC), error = errno;
    if (fd < 0) close(*folder);
    return errno = error, fd;
}

static int serve(struct worker *w) {
    const char *verb = w->words.at[0];
    char *name;
    for (int i = 0; by_handle[i].verb; i++)
        if (!strcmp(by_handle[i].verb, verb)) return with_handle(w, by_handle[i].letter);
    for (int i = 0; others[i].verb; i++)
        if (!strcmp(others[i].verb, verb)) return others[i].run(w);
    if (!strcmp(verb, "RENAME") || !strcmp(verb, "LINK")) return two_names(w, verb);
    int names = one_of(by_name, verb), changes = !names && changes_object(verb), folder = -1, error;
    if (!names && !one_of(by_object, verb)) return ENOSYS;
    int fd = names ? open_parent(&w->words, "path", &name) : changes ? open_object(w, &folder) : open_path(&w->words, O_PATH);
    if (fd < 0) return errno;
    if (names) {
        int64_t before[2];
        folder_time(fd, before);
        if (!(error = with_name(w, verb, fd, name))) answer_folder(w, fd, before);
    } else if (!(error = with_object(w, verb, fd)) && changes) {
        error = answer_attr(w, fd, "");
        int64_t times[2];
        if (!error && folder >= 0) folder_time(folder, times), answer_folder(w, folder, times);
    }
    if (folder >= 0) close(folder);
    close(fd);
    return error;
}

/* What the host has done with: closed before the request is looked at. */
static void close_done(struct words *words) {
    long long value;
    char *text;
    for (int at = 1; (text = next_value(words, "done", &at, NULL));)
        if (!number(text, 10, &value)) handle_drop(handle_find(value), 1);
}

static void *work(void *argument) {
    struct worker *w = argument;
    for (;;) {
        struct header header;
        int slot = -1;
        char *frame = w->input;
        ssize_t count = recv(w->socket, frame, MAX_FRAME, 0);
        if (count < 0 && errno == EINTR) continue;
        if (count == sizeof slot) {
            memcpy(&slot, frame, sizeof slot);
            frame = roots->slot[slot];
        } else if (count < (ssize_t)sizeof header) _exit(0); /* process 1 closed it */
        memcpy(&header, frame, sizeof header);
        int lent = 0;
        while (lent < ANSWERS && __atomic_exchange_n(&roots->lent[lent], 1, __ATOMIC_ACQUIRE)) lent++;
        w->answer = lent < ANSWERS ? &roots->answer[lent] : &w->own;
        answer_begin(w->answer);
        int error = EINVAL;
        if (!split_words(frame + sizeof header, header.length, &w->words)) {
            close_done(&w->words);
            error = serve(w);
        }
        if (slot >= 0) __atomic_store_n(&roots->taken[slot], 0, __ATOMIC_RELEASE);
        if (error) answer_begin(w->answer);
        uint32_t size = answer_end(w->answer, header.stream, error);
        const void *told = lent < ANSWERS ? (const void *)&lent : w->answer->frame;
        while (send(w->socket, told, lent < ANSWERS ? sizeof lent : size, MSG_NOSIGNAL) < 0 && errno == EINTR) continue;
    }
}

int files_start(void) {
    int pair[2], size = 16 << 20;
    if (!roots && (roots = mmap(NULL, sizeof *roots, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)) == MAP_FAILED) {
        say("agent: no memory for the roots");
        end_guest(0);
    }
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair)) return -1;
    for (int i = 0; i < 2; i++) setsockopt(pair[i], SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size);
    files_pid = fork();
    if (files_pid) {
        close(pair[1]);
        if (files_pid > 0) return pair[0];
        close(pair[0]);
        return -1;
    }
    int keep = 3;
    if (pair[1] != keep && dup2(pair[1], keep) < 0) _exit(1);
    syscall(SYS_close_range, 4u, ~0u, 0u);
    umask(0);
    fds_here = !chdir("/proc/self/fd");
    for (int i = 0; i < WORKERS; i++) {
        workers[i].socket = keep;
        if (i && pthread_create(&workers[i].thread, NULL, work, &workers[i])) say("agent: one file worker less: %s", strerror(errno));
    }
    work(&workers[0]);
    _exit(0);
}
