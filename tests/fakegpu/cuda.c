/* libfakecuda.so: VRAM for programs that know nothing of it (LD_PRELOAD with FAKE_VRAM set) or take it in steps (ctypes).
 *
 * FAKE_VRAM is an amount for each visible GPU ("9GiB", "512M", bytes), or a list of one for each ("4GiB,2GiB"). The
 * constructor takes it and ends the process as CUDA programs do if it can't. Programs that this one executes take none,
 * unless FAKE_VRAM_CHILDREN=1. Visible is what CUDA_VISIBLE_DEVICES says: UUIDs, their beginnings, or indices.
 */
#define _DEFAULT_SOURCE
#include "vram.h"

#include <ctype.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct config config;

static uint64_t parse_size(const char *text) {
    char *unit;
    double number = strtod(text, &unit);
    while (*unit == ' ') unit++;
    const char *scale = strchr("KMGT", toupper((unsigned char)*unit));
    int shift = *unit && scale ? 10 * (int)(scale - "KMGT" + 1) : 0;
    return (uint64_t)(number * (double)(1ULL << shift));
}

static bool denied(int index) {
    return node_denied(config.control_node, false) || node_denied(config.uvm_node, false) ||
           node_denied(config.gpu[index].node, config.need_nodes);
}

/* Fills `visible` with indices. CUDA passes over GPUs whose node it may not open; the first entry of the variable that
   names none of the rest ends the list. */
static int visible_gpus(int visible[MAX_GPUS]) {
    int openable[MAX_GPUS], openables = 0, count = 0;
    for (int i = 0; i < config.gpus; i++)
        if (!denied(i)) openable[openables++] = i;
    const char *variable = getenv("CUDA_VISIBLE_DEVICES");
    if (!variable) {
        memcpy(visible, openable, sizeof(int) * (size_t)openables);
        return openables;
    }
    char *list = strdup(variable), *rest = list, *entry;
    while ((entry = strsep(&rest, ",")) && count < MAX_GPUS) {
        int found = -1;
        for (int i = 0; i < openables && *entry; i++) {
            bool by_index = isdigit((unsigned char)*entry) && atoi(entry) == i;
            if (by_index || !strncmp(config.gpu[openable[i]].uuid, entry, strlen(entry))) {
                found = openable[i];
                break;
            }
        }
        if (found < 0) break;
        visible[count++] = found;
    }
    free(list);
    return count;
}

static void die(const char *message) {
    fprintf(stderr, "CUDA error: %s\n", message);
    fflush(stderr);
    _exit(1);
}

/* Takes `bytes` of the GPU with this UUID (NULL: the first visible one). 0, or -1 with errno: ENOMEM; ENODEV, there is no
   such GPU; EPERM, its node may not be opened. */
EXPORT int fake_alloc(const char *uuid, unsigned long long bytes) {
    pthread_mutex_lock(&mutex);
    config_refresh(&config);
    int visible[MAX_GPUS], index = -1, outcome = -1, why = ENODEV;
    if (!uuid) index = visible_gpus(visible) > 0 ? visible[0] : -1;
    for (int i = 0; uuid && i < config.gpus; i++)
        if (!strcmp(config.gpu[i].uuid, uuid)) index = i;
    if (index >= 0 && denied(index)) why = EPERM;
    else if (index >= 0) outcome = bytes ? vram_allocate(&config, index, bytes) : 0, why = errno;
    pthread_mutex_unlock(&mutex);
    errno = why;
    return outcome;
}

/* Gives back up to `bytes` of what this process took; ~0 is everything. 0, or -1 with errno. */
EXPORT int fake_free(const char *uuid, unsigned long long bytes) {
    pthread_mutex_lock(&mutex);
    config_refresh(&config);
    int visible[MAX_GPUS], index = -1, outcome = -1;
    if (!uuid) index = visible_gpus(visible) > 0 ? visible[0] : -1;
    for (int i = 0; uuid && i < config.gpus; i++)
        if (!strcmp(config.gpu[i].uuid, uuid)) index = i;
    errno = ENODEV;
    if (index >= 0) outcome = vram_free(&config, index, bytes);
    pthread_mutex_unlock(&mutex);
    return outcome;
}

/* How many GPUs the process sees; their UUIDs, separated by commas, go to `uuids` if that is not NULL. */
EXPORT int fake_visible(char *uuids, size_t room) {
    pthread_mutex_lock(&mutex);
    config_refresh(&config);
    int visible[MAX_GPUS], count = visible_gpus(visible);
    size_t used = 0;
    if (uuids && room) *uuids = 0;
    for (int i = 0; uuids && i < count && used < room; i++)
        used += (size_t)snprintf(uuids + used, room - used, "%s%s", i ? "," : "", config.gpu[visible[i]].uuid);
    pthread_mutex_unlock(&mutex);
    return count;
}

__attribute__((constructor)) static void take(void) {
    const char *wanted = getenv("FAKE_VRAM");
    if (!wanted || !*wanted) return;
    char *list = strdup(wanted), *rest = list;
    const char *children = getenv("FAKE_VRAM_CHILDREN");
    if (!children || strcmp(children, "1")) unsetenv("FAKE_VRAM");
    config_refresh(&config);
    int visible[MAX_GPUS], count = visible_gpus(visible), named = 1;
    if (count == 0) die("no CUDA-capable device is detected");
    /* A named GPU that is not there or not allowed is a mistake that the tests want to hear of. */
    const char *variable = getenv("CUDA_VISIBLE_DEVICES");
    for (const char *c = variable; c && *c; c++) named += *c == ',';
    if (variable && named != count) die("no CUDA-capable device is detected");
    const char *each = strchr(list, ',') ? NULL : list;
    for (int i = 0; i < count; i++) {
        const char *entry = each ? each : strsep(&rest, ",");
        uint64_t bytes = entry ? parse_size(entry) : 0;
        if (bytes && vram_allocate(&config, visible[i], bytes) < 0)
            die(errno == ENOMEM ? "out of memory" : strerror(errno));
    }
    free(list);
}
