#define _DEFAULT_SOURCE
#include "vram.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

struct slot {
    _Atomic uint64_t owner;   /* pid and start time in one word; 0: free */
    _Atomic uint64_t start, length;
    _Atomic uint64_t dead_ms; /* when somebody first saw its lock gone; 0: nobody has */
};

static const char *directory(void) {
    const char *set = getenv("FAKEGPU_DIR");
    return set && *set ? set : "/run/fakegpu";
}

static uint64_t now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_BOOTTIME, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

/* ---- configuration ---- */

static void copy(char *to, size_t size, const char *from) { snprintf(to, size, "%s", from); }

static void set_gpu(struct gpu *gpu, const char *key, const char *value) {
    if (!strcmp(key, "uuid")) copy(gpu->uuid, sizeof gpu->uuid, value);
    else if (!strcmp(key, "name")) copy(gpu->name, sizeof gpu->name, value);
    else if (!strcmp(key, "node")) copy(gpu->node, sizeof gpu->node, value);
    else if (!strcmp(key, "minor")) gpu->minor = atoi(value);
    else if (!strcmp(key, "total")) gpu->total = strtoull(value, NULL, 10);
    else if (!strcmp(key, "reserved")) gpu->reserved = strtoull(value, NULL, 10);
    else if (!strcmp(key, "uncounted")) gpu->uncounted = strtoull(value, NULL, 10);
    else if (!strcmp(key, "utilisation")) gpu->utilisation = atoi(value);
    else if (!strcmp(key, "mig")) gpu->mig = atoi(value);
    else if (!strcmp(key, "memory_unsupported")) gpu->memory_unsupported = atoi(value);
    else if (!strcmp(key, "process_bytes_unknown")) gpu->process_bytes_unknown = atoi(value);
    else if (!strcmp(key, "graphics")) gpu->graphics = atoi(value);
    else if (!strcmp(key, "processes_error")) gpu->processes_error = atoi(value);
    else if (!strcmp(key, "handle_error")) gpu->handle_error = atoi(value);
    else if (!strcmp(key, "utilisation_error")) gpu->utilisation_error = atoi(value);
    else if (!strcmp(key, "lost")) gpu->lost = atoi(value);
    else if (!strcmp(key, "compute_mode")) gpu->compute_mode = atoi(value);
    else if (!strcmp(key, "samples_by")) gpu->samples_by = atoi(value);
    else if (!strcmp(key, "hidden_percent")) gpu->hidden_percent = atoi(value);
    else if (!strcmp(key, "hangs")) gpu->hangs = atoi(value);
    else if (!strcmp(key, "lost_serial")) gpu->lost_serial = strtoull(value, NULL, 10);
    else if (!strcmp(key, "ghost") && gpu->ghosts < MAX_GHOSTS) {
        struct ghost *ghost = &gpu->ghost[gpu->ghosts];
        unsigned long long bytes;
        if (sscanf(value, "%u %llu", &ghost->pid, &bytes) == 2) ghost->bytes = bytes, gpu->ghosts++;
    } else if (!strcmp(key, "sample") && gpu->samples < MAX_SAMPLES) {
        struct sample *sample = &gpu->sample[gpu->samples];
        unsigned long long timestamp;
        if (sscanf(value, "%u %u %llu", &sample->pid, &sample->sm, &timestamp) == 3)
            sample->timestamp_us = timestamp, gpu->samples++;
    }
}

static void set(struct config *config, const char *key, const char *value) {
    int index, used;
    if (sscanf(key, "%d.%n", &index, &used) == 1 && index >= 0 && index < MAX_GPUS)
        set_gpu(&config->gpu[index], key + used, value);
    else if (!strcmp(key, "gpus")) config->gpus = atoi(value) < MAX_GPUS ? atoi(value) : MAX_GPUS;
    else if (!strcmp(key, "init_error")) config->init_error = atoi(value);
    else if (!strcmp(key, "insufficient_times")) config->insufficient_times = atoi(value);
    else if (!strcmp(key, "release_delay_ms")) config->release_delay_ms = atol(value);
    else if (!strcmp(key, "slow_ms")) config->slow_ms = atol(value);
    else if (!strcmp(key, "need_nodes")) config->need_nodes = atoi(value);
    else if (!strcmp(key, "larger_entries")) config->larger_entries = atoi(value);
    else if (!strcmp(key, "denied_vanish")) config->denied_vanish = atoi(value);
    else if (!strcmp(key, "hangs")) config->hangs = atoi(value);
    else if (!strcmp(key, "driver_version")) copy(config->driver_version, sizeof config->driver_version, value);
    else if (!strcmp(key, "control_node")) copy(config->control_node, sizeof config->control_node, value);
    else if (!strcmp(key, "uvm_node")) copy(config->uvm_node, sizeof config->uvm_node, value);
}

static void reset(struct config *config) {
    memset(config, 0, sizeof *config);
    copy(config->driver_version, sizeof config->driver_version, "580.65.06");
    copy(config->control_node, sizeof config->control_node, "/dev/nvidiactl");
    copy(config->uvm_node, sizeof config->uvm_node, "/dev/nvidia-uvm");
    for (int i = 0; i < MAX_GPUS; i++) {
        struct gpu *gpu = &config->gpu[i];
        snprintf(gpu->uuid, sizeof gpu->uuid, "GPU-fa4e0000-0000-4000-8000-%012d", i);
        copy(gpu->name, sizeof gpu->name, "NVIDIA Simulated GPU");
        gpu->minor = i;
        gpu->total = 24ULL << 30;
        gpu->reserved = 256ULL << 20;
        gpu->mig = -1;
    }
}

static char *read_whole(const char *path, size_t *length) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return NULL;
    size_t size = 0, room = 16384;
    char *text = malloc(room);
    for (ssize_t got; text && (got = read(fd, text + size, room - size - 1)) > 0;) {
        size += (size_t)got;
        if (room - size < 8192) text = realloc(text, room *= 2);
    }
    close(fd);
    if (!text) abort();
    text[size] = 0;
    *length = size;
    return text;
}

bool config_refresh(struct config *config) {
    static char *seen;
    static bool read_once;
    char path[4096];
    size_t length;
    snprintf(path, sizeof path, "%s/config", directory());
    char *text = read_whole(path, &length);
    /* What a simulated machine comes up with after a reboot, which empties /run. */
    if (!text) text = read_whole("/etc/fakegpu/config", &length);
    if (read_once && (text && seen ? !strcmp(text, seen) : text == seen)) return free(text), false;
    free(seen);
    seen = text ? strdup(text) : NULL;
    read_once = true;
    reset(config);
    config->present = text != NULL;
    for (char *rest = text, *line; rest && (line = strsep(&rest, "\n"));) {
        char *space = strchr(line, ' ');
        if (!space || *line == '#') continue;
        *space = 0;
        set(config, line, space + 1);
    }
    for (int i = 0; i < MAX_GPUS; i++)
        if (!*config->gpu[i].node)
            snprintf(config->gpu[i].node, sizeof config->gpu[i].node, "/dev/nvidia%d", config->gpu[i].minor);
    free(text);
    return true;
}

int node_denied(const char *node, bool needed) {
    int fd = open(node, O_RDWR | O_CLOEXEC | O_NONBLOCK);
    if (fd >= 0) return close(fd), 0;
    if (errno == EPERM || errno == EACCES) return errno;
    return errno == ENOENT && needed ? ENOENT : 0;
}

/* ---- files ---- */

/* Opens a state file; made on first use if it is missing (after a reboot, by whichever root process comes first). */
static int open_state(int index, const char *suffix) {
    char path[4096];
    snprintf(path, sizeof path, "%s/gpu%d.%s", directory(), index, suffix);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd >= 0 || errno != ENOENT) return fd;
    mkdir(directory(), 0755);
    fd = open(path, O_RDWR | O_CLOEXEC | O_CREAT, 0666);
    if (fd >= 0 && fchmod(fd, 0666) < 0) errno = 0;
    return fd;
}

/* The shared table of allocations, mapped once per process; NULL if it can't be: then memory is never late. */
static struct slot *slots(int index) {
    static struct slot *mapped[MAX_GPUS];
    static char mapped_from[MAX_GPUS][64];
    if (mapped[index]) {
        /* The tests may have made the directory anew under a process that lives on. */
        char path[4096], identity[64];
        struct stat st;
        snprintf(path, sizeof path, "%s/gpu%d.slots", directory(), index);
        if (stat(path, &st) == 0) {
            snprintf(identity, sizeof identity, "%lx:%lx", (unsigned long)st.st_dev, (unsigned long)st.st_ino);
            if (!strcmp(identity, mapped_from[index])) return mapped[index];
        }
        munmap(mapped[index], SLOTS * sizeof(struct slot));
        mapped[index] = NULL;
    }
    int fd = open_state(index, "slots");
    if (fd < 0) return NULL;
    struct stat st;
    if (fstat(fd, &st) == 0 && (st.st_size >= (off_t)(SLOTS * sizeof(struct slot)) ||
                                ftruncate(fd, SLOTS * sizeof(struct slot)) == 0)) {
        void *map = mmap(NULL, SLOTS * sizeof(struct slot), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (map != MAP_FAILED) {
            mapped[index] = map;
            snprintf(mapped_from[index], sizeof mapped_from[index], "%lx:%lx", (unsigned long)st.st_dev,
                     (unsigned long)st.st_ino);
        }
    }
    close(fd); /* of the table, not of the file with the locks: nothing is lost */
    return mapped[index];
}

/* ---- who holds what ---- */

/* /proc/locks comes in pages, and a lock that goes between two of them can hide another: read until two readings agree. */
static char *read_locks(void) {
    size_t length = 0, again = 0;
    char *text = read_whole("/proc/locks", &length);
    for (int tries = 0; text && length > 3500 && tries < 8; tries++) {
        char *second = read_whole("/proc/locks", &again);
        bool same = second && again == length && !memcmp(text, second, length);
        free(text);
        text = second, length = again;
        if (same) break;
    }
    return text;
}

struct ranges {
    struct range *items;
    size_t count, room;
};

static void push(struct ranges *ranges, struct range range) {
    if (ranges->count == ranges->room) {
        ranges->room = ranges->room ? ranges->room * 2 : 32;
        ranges->items = realloc(ranges->items, ranges->room * sizeof *ranges->items);
        if (!ranges->items) abort();
    }
    ranges->items[ranges->count++] = range;
}

static void push_locks(struct ranges *ranges, int index) {
    char path[4096];
    struct stat st;
    snprintf(path, sizeof path, "%s/gpu%d.vram", directory(), index);
    if (stat(path, &st) < 0) return; /* stat, not open: closing a descriptor would drop this process's own locks */
    char *text = read_locks(), *rest = text, *line;
    while (rest && (line = strsep(&rest, "\n"))) {
        unsigned major, minor;
        unsigned long inode;
        unsigned long long first, last;
        long pid;
        if (sscanf(line, "%*d: POSIX %*s WRITE %ld %x:%x:%lu %llu %llu", &pid, &major, &minor, &inode, &first, &last) != 6)
            continue;
        if (inode == st.st_ino && major == major(st.st_dev) && minor == minor(st.st_dev) && pid > 0)
            push(ranges, (struct range){first, last + 1, (unsigned)pid});
    }
    free(text);
}

static unsigned owner_pid(uint64_t owner) { return (unsigned)(owner >> 40); }

static uint64_t own_identity(void) {
    static _Atomic uint64_t known;
    uint64_t cached = atomic_load(&known);
    if (owner_pid(cached) == (unsigned)getpid()) return cached;
    size_t length;
    char *text = read_whole("/proc/self/stat", &length), *field = text ? strrchr(text, ')') : NULL;
    unsigned long long start = 0;
    if (field) sscanf(field + 1, " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %llu", &start);
    free(text);
    cached = (uint64_t)getpid() << 40 | (start & ((1ULL << 40) - 1));
    atomic_store(&known, cached);
    return cached;
}

static int by_start(const void *left, const void *right) {
    const struct range *a = left, *b = right;
    return a->start < b->start ? -1 : a->start > b->start;
}

size_t vram_occupied(const struct config *config, int index, struct range **out) {
    struct noted {
        uint64_t owner, start, length;
        int slot;
    } noted[SLOTS];
    int notes = 0;
    struct slot *table = slots(index);
    /* Slots first, locks second: a slot is written after its lock is taken and cleared before it is dropped, so that one
       without a lock is what a dead process left. */
    for (int i = 0; table && i < SLOTS; i++) {
        uint64_t owner = atomic_load(&table[i].owner);
        if (owner)
            noted[notes++] = (struct noted){owner, atomic_load(&table[i].start), atomic_load(&table[i].length), i};
    }
    struct ranges ranges = {0};
    push_locks(&ranges, index);
    size_t live = ranges.count;
    for (int i = 0; i < notes; i++) {
        struct noted *note = &noted[i];
        struct slot *slot = &table[note->slot];
        bool held = false, taken_over = false;
        for (size_t j = 0; j < live; j++) {
            struct range *lock = &ranges.items[j];
            if (lock->start >= note->start + note->length || lock->end <= note->start) continue;
            if (lock->pid == owner_pid(note->owner)) held = true;
            else taken_over = true;
        }
        if (held) {
            atomic_store(&slot->dead_ms, 0);
            continue;
        }
        if (!note->length) { /* just claimed, or its claimer died before it wrote the rest */
            char path[64];
            snprintf(path, sizeof path, "/proc/%u", owner_pid(note->owner));
            if (access(path, F_OK) < 0) atomic_compare_exchange_strong(&slot->owner, &note->owner, 0);
            continue;
        }
        if (atomic_load(&slot->owner) != note->owner || atomic_load(&slot->length) != note->length) continue; /* freed */
        uint64_t now = now_ms(), dead = 0;
        if (atomic_compare_exchange_strong(&slot->dead_ms, &dead, now)) dead = now;
        bool late = config->release_delay_ms < 0 || now - dead < (uint64_t)config->release_delay_ms;
        if (late && !taken_over)
            push(&ranges, (struct range){note->start, note->start + note->length, owner_pid(note->owner)});
        else
            atomic_compare_exchange_strong(&slot->owner, &note->owner, 0);
    }
    if (ranges.count) qsort(ranges.items, ranges.count, sizeof *ranges.items, by_start);
    *out = ranges.items;
    return ranges.count;
}

/* ---- taking and giving back ---- */

/* The descriptor that this process's locks hang on. It is never closed: closing any descriptor of the file drops them. */
static int vram_fd(int index) {
    static int fds[MAX_GPUS];
    struct stat have, want;
    char path[4096];
    snprintf(path, sizeof path, "%s/gpu%d.vram", directory(), index);
    if (fds[index] > 0 && fstat(fds[index], &have) == 0 && stat(path, &want) == 0 && have.st_ino == want.st_ino &&
        have.st_dev == want.st_dev)
        return fds[index];
    fds[index] = open_state(index, "vram");
    return fds[index];
}

static int lock_range(int fd, short type, uint64_t start, uint64_t end) {
    struct flock lock = {.l_type = type, .l_whence = SEEK_SET, .l_start = (off_t)start, .l_len = (off_t)(end - start)};
    return fcntl(fd, F_SETLK, &lock);
}

static void note(int index, struct range range) {
    struct slot *table = slots(index);
    for (int i = 0; table && i < SLOTS; i++) {
        uint64_t nobody = 0;
        if (!atomic_compare_exchange_strong(&table[i].owner, &nobody, own_identity())) continue;
        atomic_store(&table[i].length, 0);
        atomic_store(&table[i].dead_ms, 0);
        atomic_store(&table[i].start, range.start);
        atomic_store(&table[i].length, range.end - range.start);
        return;
    }
}

static uint64_t capacity(const struct gpu *gpu) {
    uint64_t lost = gpu->reserved + gpu->uncounted;
    for (int i = 0; i < gpu->ghosts; i++) lost += gpu->ghost[i].bytes;
    return gpu->total > lost ? gpu->total - lost : 0;
}

int vram_allocate(const struct config *config, int index, uint64_t bytes) {
    uint64_t limit = capacity(&config->gpu[index]);
    int fd = vram_fd(index);
    if (fd < 0) return -1;
    /* A GPU maps pages, so memory in pieces is as good as in one: take gaps until it is enough. Who loses a race for a gap
       gives back what it took and looks again. */
    for (int tries = 0; tries < 200; tries++) {
        struct range *taken = NULL;
        size_t count = vram_occupied(config, index, &taken);
        struct ranges gaps = {0};
        uint64_t at = 0, missing = bytes;
        for (size_t i = 0; i <= count && missing && at < limit; i++) {
            uint64_t end = i < count && taken[i].start < limit ? taken[i].start : limit;
            if (end > at) {
                uint64_t size = end - at < missing ? end - at : missing;
                push(&gaps, (struct range){at, at + size, 0});
                missing -= size;
            }
            if (i < count && taken[i].end > at) at = taken[i].end;
        }
        free(taken);
        size_t got = 0;
        if (!missing)
            while (got < gaps.count && lock_range(fd, F_WRLCK, gaps.items[got].start, gaps.items[got].end) == 0) got++;
        bool done = !missing && got == gaps.count;
        int why = missing ? ENOMEM : errno;
        for (size_t i = 0; i < got; i++) {
            if (done) note(index, gaps.items[i]);
            else lock_range(fd, F_UNLCK, gaps.items[i].start, gaps.items[i].end);
        }
        free(gaps.items);
        if (done) return 0;
        errno = why;
        if (why != EAGAIN && why != EACCES) return -1;
    }
    errno = ENOMEM;
    return -1;
}

int vram_free(const struct config *config, int index, uint64_t bytes) {
    (void)config;
    struct slot *table = slots(index);
    int fd = vram_fd(index);
    if (fd < 0 || !table) return -1;
    uint64_t self = own_identity();
    for (int i = SLOTS - 1; i >= 0 && bytes; i--) {
        if (atomic_load(&table[i].owner) != self) continue;
        uint64_t start = atomic_load(&table[i].start), length = atomic_load(&table[i].length);
        uint64_t part = length < bytes ? length : bytes;
        if (part == length) atomic_store(&table[i].owner, 0);
        else atomic_store(&table[i].length, length - part);
        if (lock_range(fd, F_UNLCK, start + length - part, start + length) < 0) return -1;
        bytes -= part;
    }
    return 0;
}
