/* A libnvidia-ml.so.1 for machines without a GPU: what the real pynvml calls, with the layouts that it expects. */
#define _DEFAULT_SOURCE
#include "vram.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

typedef enum {
    SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9, GPU_IS_LOST = 15, RESET_REQUIRED = 16, ARGUMENT_VERSION_MISMATCH = 25,
    UNKNOWN = 999
} result;

typedef struct handle { int index; } *device;

struct memory { uint64_t total, free, used; };
struct memory_v2 { unsigned version; uint64_t total, reserved, free, used; };
struct process { unsigned pid; uint64_t used; unsigned gpu_instance, compute_instance; };
struct rates { unsigned gpu, memory; };
struct process_sample { unsigned pid; uint64_t timestamp_us; unsigned sm, memory, encoder, decoder; };
struct pci {
    char legacy_id[16];
    unsigned domain, bus, device, device_id, subsystem_id;
    char id[32];
};
_Static_assert(sizeof(struct memory) == 24 && sizeof(struct memory_v2) == 40, "memory");
_Static_assert(sizeof(struct process) == 24 && sizeof(struct process_sample) == 32 && sizeof(struct pci) == 68, "lists");

#define MEMORY_V2 0x02000028u
#define NO_VALUE (~0ULL)
#define NO_INSTANCE 0xFFFFFFFFu

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct config config;
static int clients, insufficient_left;
static uint64_t serial_at_init[MAX_GPUS];
static struct handle handles[MAX_GPUS];

static void refresh(void) {
    if (config_refresh(&config)) insufficient_left = config.insufficient_times;
}

static void nap(void) {
    if (config.slow_ms <= 0) return;
    struct timespec pause = {config.slow_ms / 1000, config.slow_ms % 1000 * 1000000};
    nanosleep(&pause, NULL);
}

/* Does not return as long as the driver (`index` < 0) or that GPU hangs. Other signals than SIGKILL end nothing here. */
static void hang(int index) {
    struct timespec pause = {0, 10000000};
    while (index < 0 ? config.hangs : config.gpu[index].hangs) {
        nanosleep(&pause, NULL);
        refresh();
    }
}

/* Every call: one at a time, as in the driver. */
static result begin(void) {
    pthread_mutex_lock(&mutex);
    refresh();
    hang(-1);
    nap();
    return clients > 0 ? SUCCESS : UNINITIALIZED;
}

static result end(result outcome) {
    pthread_mutex_unlock(&mutex);
    return outcome;
}

static result lost(int index) {
    const struct gpu *gpu = &config.gpu[index];
    return gpu->lost || gpu->lost_serial > serial_at_init[index] ? GPU_IS_LOST : SUCCESS;
}

/* Every call on a device; `*gpu` is set on success. */
static result begin_device(device handle, const struct gpu **gpu) {
    result outcome = begin();
    if (outcome != SUCCESS) return outcome;
    if (handle < handles || handle >= handles + MAX_GPUS || handle->index >= config.gpus) return INVALID_ARGUMENT;
    *gpu = &config.gpu[handle->index];
    hang(handle->index);
    return lost(handle->index);
}

static result put(char *to, unsigned room, const char *text) {
    if (!to) return INVALID_ARGUMENT;
    if (strlen(text) >= room) return INSUFFICIENT_SIZE;
    strcpy(to, text);
    return SUCCESS;
}

/* ---- library ---- */

EXPORT result nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    pthread_mutex_lock(&mutex);
    refresh();
    hang(-1);
    nap();
    if (!config.present) return end(DRIVER_NOT_LOADED);
    if (config.init_error) return end((result)config.init_error);
    if (node_denied(config.control_node, config.need_nodes)) return end(UNKNOWN); /* what the real one says */
    if (clients++ == 0)
        for (int i = 0; i < MAX_GPUS; i++) {
            handles[i].index = i;
            serial_at_init[i] = config.gpu[i].lost_serial;
        }
    return end(SUCCESS);
}

EXPORT result nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

EXPORT result nvmlShutdown(void) {
    result outcome = begin();
    if (outcome == SUCCESS) clients--;
    return end(outcome);
}

EXPORT const char *nvmlErrorString(result code) {
    switch (code) {
    case SUCCESS: return "Success";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case NO_PERMISSION: return "Insufficient Permissions";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case GPU_IS_LOST: return "GPU is lost";
    case RESET_REQUIRED: return "GPU requires reset";
    default: return "Unknown Error";
    }
}

EXPORT result nvmlSystemGetDriverVersion(char *version, unsigned length) {
    result outcome = begin();
    return end(outcome ? outcome : put(version, length, config.driver_version));
}

EXPORT result nvmlSystemGetProcessName(unsigned pid, char *name, unsigned length) {
    result outcome = begin();
    if (outcome) return end(outcome);
    char path[64], text[4096] = "";
    snprintf(path, sizeof path, "/proc/%u/cmdline", pid);
    FILE *file = fopen(path, "re");
    if (!file || !fgets(text, sizeof text, file)) outcome = NOT_FOUND;
    if (file) fclose(file);
    if (outcome || !name || !length) return end(outcome ? outcome : INVALID_ARGUMENT);
    snprintf(name, length, "%s", text);
    return end(SUCCESS);
}

/* ---- devices ---- */

/* The GPUs that are counted; fills `shown` with them. */
static int counted(int shown[MAX_GPUS]) {
    int count = 0;
    for (int i = 0; i < config.gpus; i++)
        if (!config.denied_vanish || !node_denied(config.gpu[i].node, config.need_nodes)) shown[count++] = i;
    return count;
}

EXPORT result nvmlDeviceGetCount_v2(unsigned *count) {
    int shown[MAX_GPUS];
    result outcome = begin();
    if (!outcome) *count = (unsigned)counted(shown);
    return end(outcome);
}

static result handle_of(int index, device *handle) {
    const struct gpu *gpu = &config.gpu[index];
    hang(index);
    if (gpu->handle_error) return (result)gpu->handle_error;
    if (node_denied(gpu->node, config.need_nodes)) return NO_PERMISSION;
    if (lost(index)) return GPU_IS_LOST;
    *handle = &handles[index];
    return SUCCESS;
}

EXPORT result nvmlDeviceGetHandleByIndex_v2(unsigned index, device *handle) {
    result outcome = begin();
    if (outcome) return end(outcome);
    int shown[MAX_GPUS];
    return end((int)index < counted(shown) ? handle_of(shown[index], handle) : INVALID_ARGUMENT);
}

EXPORT result nvmlDeviceGetHandleByUUID(const char *uuid, device *handle) {
    result outcome = begin();
    if (outcome) return end(outcome);
    int shown[MAX_GPUS], count = counted(shown);
    for (int i = 0; i < count; i++)
        if (!strcmp(config.gpu[shown[i]].uuid, uuid)) return end(handle_of(shown[i], handle));
    return end(NOT_FOUND);
}

EXPORT result nvmlDeviceGetName(device handle, char *name, unsigned length) {
    const struct gpu *gpu;
    result outcome = begin_device(handle, &gpu);
    return end(outcome ? outcome : put(name, length, gpu->name));
}

EXPORT result nvmlDeviceGetUUID(device handle, char *uuid, unsigned length) {
    const struct gpu *gpu;
    result outcome = begin_device(handle, &gpu);
    return end(outcome ? outcome : put(uuid, length, gpu->uuid));
}

EXPORT result nvmlDeviceGetMinorNumber(device handle, unsigned *minor) {
    const struct gpu *gpu;
    result outcome = begin_device(handle, &gpu);
    if (!outcome) *minor = (unsigned)gpu->minor;
    return end(outcome);
}

EXPORT result nvmlDeviceGetPciInfo_v3(device handle, struct pci *pci) {
    const struct gpu *gpu;
    result outcome = begin_device(handle, &gpu);
    if (outcome) return end(outcome);
    memset(pci, 0, sizeof *pci);
    pci->bus = (unsigned)(handle->index + 1);
    pci->device_id = 0x268410de;
    snprintf(pci->legacy_id, sizeof pci->legacy_id, "0000:%02X:00.0", pci->bus & 0xff);
    snprintf(pci->id, sizeof pci->id, "00000000:%02X:00.0", pci->bus & 0xff);
    return end(SUCCESS);
}

/* Bytes that are neither reserved nor free. */
static uint64_t used_bytes(const struct gpu *gpu, int index) {
    struct range *ranges;
    size_t count = vram_occupied(&config, index, &ranges);
    uint64_t used = gpu->uncounted;
    for (size_t i = 0; i < count; i++) used += ranges[i].end - ranges[i].start;
    free(ranges);
    for (int i = 0; i < gpu->ghosts; i++) used += gpu->ghost[i].bytes;
    return used + gpu->reserved > gpu->total ? gpu->total - gpu->reserved : used;
}

/* The first version knows of no reserved bytes and counts them as used. */
EXPORT result nvmlDeviceGetMemoryInfo(device handle, struct memory *memory) {
    const struct gpu *gpu;
    result outcome = begin_device(handle, &gpu);
    if (!outcome && gpu->memory_unsupported) outcome = NOT_SUPPORTED;
    if (outcome) return end(outcome);
    memory->total = gpu->total;
    memory->used = used_bytes(gpu, handle->index) + gpu->reserved;
    memory->free = memory->total - memory->used;
    return end(SUCCESS);
}

#ifndef OLD_DRIVER
EXPORT result nvmlDeviceGetMemoryInfo_v2(device handle, struct memory_v2 *memory) {
    const struct gpu *gpu;
    result outcome = begin_device(handle, &gpu);
    if (!outcome && memory->version != MEMORY_V2) outcome = ARGUMENT_VERSION_MISMATCH;
    if (!outcome && gpu->memory_unsupported) outcome = NOT_SUPPORTED;
    if (outcome) return end(outcome);
    memory->total = gpu->total;
    memory->reserved = gpu->reserved;
    memory->used = used_bytes(gpu, handle->index);
    memory->free = memory->total - memory->reserved - memory->used;
    return end(SUCCESS);
}

/* As branch 535 filled the third version for a while. */
struct larger_process { struct process process; uint64_t protected_bytes; };

static void add(struct process *list, unsigned *count, unsigned pid, uint64_t bytes) {
    for (unsigned i = 0; i < *count; i++)
        if (list[i].pid == pid) {
            list[i].used += bytes;
            return;
        }
    list[(*count)++] = (struct process){pid, bytes, NO_INSTANCE, NO_INSTANCE};
}

static result processes(device handle, unsigned *room, struct process *list, bool graphics, bool larger) {
    const struct gpu *gpu;
    result outcome = begin_device(handle, &gpu);
    if (!outcome && gpu->processes_error) outcome = (result)gpu->processes_error;
    if (outcome) return end(outcome);
    if (!room) return end(INVALID_ARGUMENT);
    if (graphics && !gpu->graphics) return *room = 0, end(SUCCESS);
    struct range *ranges;
    size_t occupied = vram_occupied(&config, handle->index, &ranges);
    struct process *found = calloc(occupied + MAX_GHOSTS, sizeof *found);
    unsigned count = 0;
    for (size_t i = 0; i < occupied; i++) add(found, &count, ranges[i].pid, ranges[i].end - ranges[i].start);
    for (int i = 0; i < gpu->ghosts; i++) add(found, &count, gpu->ghost[i].pid, gpu->ghost[i].bytes);
    bool fits = count <= *room && (list || !count);
    if (fits && list && insufficient_left > 0) {
        /* A process came between the two questions. */
        insufficient_left--;
        fits = false;
    }
    for (unsigned i = 0; fits && i < count; i++) {
        found[i].used = found[i].used * (100 - (unsigned)gpu->hidden_percent) / 100;
        if (gpu->process_bytes_unknown || gpu->mig == 1) found[i].used = NO_VALUE;
        if (larger) ((struct larger_process *)list)[i] = (struct larger_process){found[i], 0};
        else list[i] = found[i];
    }
    *room = count;
    free(found);
    free(ranges);
    return end(fits ? SUCCESS : INSUFFICIENT_SIZE);
}

EXPORT result nvmlDeviceGetComputeRunningProcesses_v3(device handle, unsigned *count, struct process *list) {
    return processes(handle, count, list, false, config.larger_entries);
}

EXPORT result nvmlDeviceGetGraphicsRunningProcesses_v3(device handle, unsigned *count, struct process *list) {
    return processes(handle, count, list, true, config.larger_entries);
}

EXPORT result nvmlDeviceGetComputeRunningProcesses_v2(device handle, unsigned *count, struct process *list) {
    return processes(handle, count, list, false, false);
}

EXPORT result nvmlDeviceGetGraphicsRunningProcesses_v2(device handle, unsigned *count, struct process *list) {
    return processes(handle, count, list, true, false);
}
#endif

EXPORT result nvmlDeviceGetUtilizationRates(device handle, struct rates *rates) {
    const struct gpu *gpu;
    result outcome = begin_device(handle, &gpu);
    if (!outcome && gpu->utilisation_error) outcome = (result)gpu->utilisation_error;
    if (!outcome && (gpu->utilisation < 0 || gpu->mig == 1)) outcome = NOT_SUPPORTED;
    if (!outcome) *rates = (struct rates){(unsigned)gpu->utilisation, (unsigned)gpu->utilisation / 2};
    return end(outcome);
}

EXPORT result nvmlDeviceGetProcessUtilization(device handle, struct process_sample *samples, unsigned *room,
                                              unsigned long long since_us) {
    const struct gpu *gpu;
    result outcome = begin_device(handle, &gpu);
    if (!outcome && gpu->utilisation_error) outcome = (result)gpu->utilisation_error;
    if (!outcome && (gpu->utilisation < 0 || gpu->mig == 1 || gpu->samples_by > 0)) outcome = NOT_SUPPORTED;
    if (outcome) return end(outcome);
    struct timespec clock;
    clock_gettime(CLOCK_REALTIME, &clock);
    uint64_t now_us = (uint64_t)clock.tv_sec * 1000000 + (uint64_t)clock.tv_nsec / 1000;
    unsigned count = 0;
    for (int i = 0; i < gpu->samples; i++) {
        const struct sample *sample = &gpu->sample[i];
        uint64_t timestamp = sample->timestamp_us ? sample->timestamp_us : now_us;
        if (timestamp <= since_us) continue;
        if (samples && count < *room)
            samples[count] = (struct process_sample){sample->pid, timestamp, sample->sm, sample->sm / 2, 0, 0};
        count++;
    }
    if (!count) return *room = 0, end(NOT_FOUND);
    bool fits = samples && count <= *room;
    *room = count;
    return end(fits ? SUCCESS : INSUFFICIENT_SIZE);
}

#ifndef OLD_DRIVER
struct work { uint64_t timestamp_us; unsigned pid, sm, memory, encoder, decoder, jpeg, optical_flow; };
struct works { unsigned version, count; uint64_t since_us; struct work *list; };

/* The newer call for the same. */
EXPORT result nvmlDeviceGetProcessesUtilizationInfo(device handle, struct works *works) {
    const struct gpu *gpu;
    result outcome = begin_device(handle, &gpu);
    if (!outcome && works->version != 0x01000018u) outcome = ARGUMENT_VERSION_MISMATCH;
    if (!outcome && (gpu->utilisation < 0 || gpu->mig == 1 || gpu->samples_by > 1)) outcome = NOT_SUPPORTED;
    if (outcome) return end(outcome);
    struct timespec clock;
    clock_gettime(CLOCK_REALTIME, &clock);
    uint64_t now_us = (uint64_t)clock.tv_sec * 1000000 + (uint64_t)clock.tv_nsec / 1000;
    unsigned count = 0;
    for (int i = 0; i < gpu->samples; i++) {
        const struct sample *sample = &gpu->sample[i];
        uint64_t timestamp = sample->timestamp_us ? sample->timestamp_us : now_us;
        if (timestamp <= works->since_us) continue;
        if (works->list && count < works->count)
            works->list[count] = (struct work){timestamp, sample->pid, sample->sm, sample->sm / 2, 0, 0, 0, 0};
        count++;
    }
    if (!count) return works->count = 0, end(NOT_FOUND);
    bool fits = works->list && count <= works->count;
    works->count = count;
    return end(fits ? SUCCESS : INSUFFICIENT_SIZE);
}
#endif

EXPORT result nvmlDeviceGetTemperature(device handle, unsigned sensor, unsigned *celsius) {
    const struct gpu *gpu;
    result outcome = begin_device(handle, &gpu);
    if (!outcome) *celsius = sensor ? 0 : 41;
    return end(outcome ? outcome : sensor ? INVALID_ARGUMENT : SUCCESS);
}

EXPORT result nvmlDeviceGetPowerUsage(device handle, unsigned *milliwatts) {
    const struct gpu *gpu;
    result outcome = begin_device(handle, &gpu);
    if (!outcome) *milliwatts = 25000;
    return end(outcome);
}

EXPORT result nvmlDeviceGetComputeMode(device handle, unsigned *mode) {
    const struct gpu *gpu;
    result outcome = begin_device(handle, &gpu);
    if (!outcome) *mode = (unsigned)gpu->compute_mode;
    return end(outcome);
}

EXPORT result nvmlDeviceGetMigMode(device handle, unsigned *current, unsigned *pending) {
    const struct gpu *gpu;
    result outcome = begin_device(handle, &gpu);
    if (!outcome && gpu->mig < 0) outcome = NOT_SUPPORTED;
    if (!outcome) *current = *pending = (unsigned)gpu->mig;
    return end(outcome);
}
