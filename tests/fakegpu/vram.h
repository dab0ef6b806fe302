/* Simulated GPUs whose memory the kernel keeps: what libnvidia-ml.so.1 and libfakecuda.so share.
 *
 * A process "allocates" by taking POSIX write locks on byte ranges of gpuN.vram. The kernel drops them exactly when the
 * process is gone (also on exec: the descriptor is close-on-exec, as CUDA's is), refuses ranges that are taken, and tells
 * everybody in /proc/locks, whose pids are those of the reader's own PID namespace.
 *
 * What a dead process held is known from gpuN.slots, a shared table in which every allocation is noted too: a slot whose
 * lock is gone is memory that a slow driver has not given back yet (release_delay_ms). No lock guards the table, since any
 * process may be killed or stopped at any instruction: its words are atomic, and a claimed slot names its claimer.
 */
#ifndef FAKEGPU_VRAM_H
#define FAKEGPU_VRAM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define EXPORT __attribute__((visibility("default")))

enum { MAX_GPUS = 16, MAX_GHOSTS = 16, MAX_SAMPLES = 64, SLOTS = 1024 };

struct ghost {
    unsigned pid;
    uint64_t bytes;
};

struct sample {
    unsigned pid, sm;
    uint64_t timestamp_us; /* 0: the moment of the query */
};

struct gpu {
    char uuid[80], name[96], node[128];
    int minor;
    uint64_t total, reserved, uncounted;
    int utilisation;              /* percent; -1: not supported */
    int mig;                      /* 0 or 1; -1: not supported */
    bool memory_unsupported;      /* memory info: NOT_SUPPORTED */
    bool process_bytes_unknown;   /* every process's bytes: ~0 */
    bool graphics;                /* processes are in the compute and the graphics list */
    int processes_error, handle_error, utilisation_error; /* an nvmlReturn_t to answer with; 0: none */
    bool lost;                    /* GPU_IS_LOST for good */
    int compute_mode;             /* an nvmlComputeMode_t */
    int samples_by;               /* which call knows the work of processes: 0 the old and the new, 1 the new, 2 none */
    int hidden_percent;           /* of each process's bytes: managed memory, which is attributed to nobody */
    bool hangs;                   /* calls on it don't return, until this is unset */
    uint64_t lost_serial;         /* clients initialised before this number grew: GPU_IS_LOST */
    int ghosts, samples;
    struct ghost ghost[MAX_GHOSTS];
    struct sample sample[MAX_SAMPLES];
};

struct config {
    bool present;                 /* false: there is no configuration, hence no driver */
    int gpus, init_error, insufficient_times;
    long release_delay_ms;        /* -1: never */
    long slow_ms;
    bool need_nodes;
    bool larger_entries;          /* the third version of the process lists has entries of 32 bytes, as in branch 535 */
    bool denied_vanish;           /* GPUs whose node is denied are not counted; the rest is numbered anew */
    bool hangs;                   /* no call returns, until this is unset */
    char driver_version[80], control_node[128], uvm_node[128];
    struct gpu gpu[MAX_GPUS];
};

struct range {
    uint64_t start, end;          /* [start, end) */
    unsigned pid;
};

/* The configuration as it is now, read again if the file changed; true if it did. Not thread-safe: callers hold a mutex. */
bool config_refresh(struct config *config);

/* What processes hold of GPU `index`, the delayed included, ordered by start. The caller frees *ranges. */
size_t vram_occupied(const struct config *config, int index, struct range **ranges);

/* 0, or -1 with errno: ENOMEM, or what the files say. */
int vram_allocate(const struct config *config, int index, uint64_t bytes);
int vram_free(const struct config *config, int index, uint64_t bytes);

/* 0, or the errno that says that the device node may not be opened. No driver behind it (ENXIO) is no hindrance. */
int node_denied(const char *node, bool needed);

#endif
