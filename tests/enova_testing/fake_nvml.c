/* A libnvidia-ml.so.1 without a driver, for tests: it says what the file named by ENOVA_FAKE_NVML says.
 *
 * The file is read again at every call, line by line; later lines win:
 *   gpus N               so many GPUs, all alike until a line below says otherwise
 *   gpu I KEY NUMBER     a figure of GPU I: total used reserved util memutil temp power_mw limit_mw sm_mhz mem_mhz
 *                        throttle ecc, and what is told once: max_sm_mhz max_mem_mhz bus_bits cores capability (10 x)
 *                        default_mw links link_version pcie_gen pcie_lanes (0, as at first: it does not tell)
 *   name I TEXT          what the driver calls it
 *   process I PID BYTES  a process that holds memory of GPU I
 *   fail I FUNCTION CODE that function of GPU I returns CODE; FUNCTION * means all; I = -1 means all GPUs
 *   hang I FUNCTION      that function of GPU I does not return while the line stands
 *   init CODE            nvmlInit returns CODE
 * A function that an older driver lacks is left out by compiling with -DWITHOUT_<suffix>, see below.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { GPUS_MAX = 16, PROCESSES_MAX = 8, LINES_MAX = 512 };
enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, VERSION = 25 };
#define MEMORY_V2 0x02000028u
#define TEMPERATURE_V1 0x0100000cu

typedef unsigned int uint;
typedef unsigned long long ulong64;
struct handle { int index; };                       /* what callers hold: never changes, so never locked */
static struct handle handles[GPUS_MAX];
static int initialised;

struct figures {
    ulong64 total, used, reserved, util, memutil, temp, power_mw, limit_mw, sm_mhz, mem_mhz, throttle, ecc;
    ulong64 max_sm_mhz, max_mem_mhz, bus_bits, cores, capability, default_mw, links, link_version, pcie_gen, pcie_lanes;
    char name[96];
    uint pids[PROCESSES_MAX];
    ulong64 held[PROCESSES_MAX];
    int processes, code, hangs;
};

static void set(struct figures *f, const char *key, ulong64 value) {
    const struct { const char *key; ulong64 *at; } keys[] = {
        {"total", &f->total}, {"used", &f->used}, {"reserved", &f->reserved}, {"util", &f->util},
        {"memutil", &f->memutil}, {"temp", &f->temp}, {"power_mw", &f->power_mw}, {"limit_mw", &f->limit_mw},
        {"sm_mhz", &f->sm_mhz}, {"mem_mhz", &f->mem_mhz}, {"throttle", &f->throttle}, {"ecc", &f->ecc},
        {"max_sm_mhz", &f->max_sm_mhz}, {"max_mem_mhz", &f->max_mem_mhz}, {"bus_bits", &f->bus_bits},
        {"cores", &f->cores}, {"capability", &f->capability}, {"default_mw", &f->default_mw}, {"links", &f->links},
        {"link_version", &f->link_version}, {"pcie_gen", &f->pcie_gen}, {"pcie_lanes", &f->pcie_lanes}};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        if (!strcmp(keys[i].key, key)) *keys[i].at = value;
}

static int concerns(int line_index, const char *line_function, int index, const char *function) {
    return (line_index == index || line_index == -1) && (!strcmp(line_function, "*") || !strcmp(line_function, function));
}

/* What the file says of one GPU for one function; returns the number of GPUs. */
static int look(int index, const char *function, struct figures *f, int *init_code) {
    int gpus = 1, i, code;
    uint pid;
    ulong64 value;
    char line[256], word[64];
    struct figures blank = {.total = 85520809984ull, .reserved = 629145600ull, .temp = 35, .power_mw = 70000,
                            .limit_mw = 700000, .sm_mhz = 1980, .mem_mhz = 2619, .name = "NVIDIA H100 80GB HBM3"};
    *f = blank;
    *init_code = SUCCESS;
    const char *path = getenv("ENOVA_FAKE_NVML");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (!file) return gpus;
    for (int n = 0; n < LINES_MAX && fgets(line, sizeof line, file); n++) {
        if (sscanf(line, "gpus %d", &i) == 1) gpus = i < GPUS_MAX ? i : GPUS_MAX;
        else if (sscanf(line, "init %d", &code) == 1) *init_code = code;
        else if (sscanf(line, "gpu %d %63s %llu", &i, word, &value) == 3 && i == index) set(f, word, value);
        else if (sscanf(line, "name %d %95[^\n]", &i, f->name) == 2 && i != index) strcpy(f->name, blank.name);
        else if (sscanf(line, "process %d %u %llu", &i, &pid, &value) == 3 && i == index && f->processes < PROCESSES_MAX) {
            f->pids[f->processes] = pid;
            f->held[f->processes++] = value;
        } else if (sscanf(line, "fail %d %63s %d", &i, word, &code) == 3 && concerns(i, word, index, function)) f->code = code;
        else if (sscanf(line, "hang %d %63s", &i, word) == 2 && concerns(i, word, index, function)) f->hangs = 1;
    }
    fclose(file);
    return gpus;
}

/* The figures for a call, or the code that it must return. */
static int enter(const struct handle *handle, const char *function, struct figures *f) {
    int init_code;
    if (!initialised) return UNINITIALIZED;
    if (handle < handles || handle >= handles + GPUS_MAX) return INVALID;
    for (;;) {
        if (handle->index >= look(handle->index, function, f, &init_code)) return INVALID;
        if (!f->hangs) return f->code;
        usleep(10000);
    }
}

#define CALL(name) struct figures f; int code = enter(handle, name, &f); if (code) return code

int nvmlInitWithFlags(uint flags) {
    struct figures f;
    int code;
    (void)flags;
    look(0, "Init", &f, &code);
    if (code) return code;
    for (int i = 0; i < GPUS_MAX; i++) handles[i].index = i;
    initialised = 1;
    return SUCCESS;
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { initialised = 0; return SUCCESS; }
const char *nvmlErrorString(int code) { return code == SUCCESS ? "Success" : "an error that the test asked for"; }

int nvmlDeviceGetCount_v2(uint *count) {
    struct figures f;
    int code;
    if (!initialised) return UNINITIALIZED;
    *count = (uint)look(0, "Count", &f, &code);
    return SUCCESS;
}
int nvmlDeviceGetHandleByIndex_v2(uint index, struct handle **out) {
    if (index >= GPUS_MAX) return INVALID;
    struct handle *handle = &handles[index];
    CALL("HandleByIndex");
    *out = handle;
    return SUCCESS;
}
int nvmlDeviceGetUUID(struct handle *handle, char *out, uint size) {
    CALL("UUID");
    snprintf(out, size, "GPU-%08x-1111-2222-3333-%012x", 0xe0a0 + handle->index, handle->index);
    return SUCCESS;
}
int nvmlDeviceGetName(struct handle *handle, char *out, uint size) {
    CALL("Name");
    snprintf(out, size, "%s", f.name);
    return SUCCESS;
}
struct pci { char legacy[16]; uint domain, bus, device, id, subsystem; char bus_id[32]; };
int nvmlDeviceGetPciInfo_v3(struct handle *handle, struct pci *out) {
    CALL("PciInfo");
    memset(out, 0, sizeof *out);
    snprintf(out->bus_id, sizeof out->bus_id, "00000000:%02X:00.0", 0x10 + handle->index);
    return SUCCESS;
}
struct memory { ulong64 total, free, used; };
int nvmlDeviceGetMemoryInfo(struct handle *handle, struct memory *out) {
    CALL("MemoryInfo");
    out->total = f.total;
    out->used = f.used + f.reserved;
    out->free = out->total - out->used;
    return SUCCESS;
}
#ifndef WITHOUT_MEMORY_V2
struct memory2 { uint version; ulong64 total, reserved, free, used; };
int nvmlDeviceGetMemoryInfo_v2(struct handle *handle, struct memory2 *out) {
    CALL("MemoryInfo");
    if (out->version != MEMORY_V2) return VERSION;
    out->total = f.total;
    out->reserved = f.reserved;
    out->used = f.used;
    out->free = f.total - f.used - f.reserved;
    return SUCCESS;
}
#endif
struct utilization { uint gpu, memory; };
int nvmlDeviceGetUtilizationRates(struct handle *handle, struct utilization *out) {
    CALL("UtilizationRates");
    out->gpu = (uint)f.util;
    out->memory = (uint)f.memutil;
    return SUCCESS;
}
int nvmlDeviceGetPowerUsage(struct handle *handle, uint *out) { CALL("PowerUsage"); *out = (uint)f.power_mw; return SUCCESS; }
int nvmlDeviceGetEnforcedPowerLimit(struct handle *handle, uint *out) {
    CALL("EnforcedPowerLimit");
    *out = (uint)f.limit_mw;
    return SUCCESS;
}
#ifndef WITHOUT_TEMPERATURE_V
struct temperature { uint version, sensor; int celsius; };
int nvmlDeviceGetTemperatureV(struct handle *handle, struct temperature *out) {
    CALL("Temperature");
    if (out->version != TEMPERATURE_V1) return VERSION;
    out->celsius = (int)f.temp;
    return SUCCESS;
}
#endif
int nvmlDeviceGetTemperature(struct handle *handle, uint sensor, uint *out) {
    CALL("Temperature");
    (void)sensor;
    *out = (uint)f.temp;
    return SUCCESS;
}
int nvmlDeviceGetClockInfo(struct handle *handle, uint type, uint *out) {
    CALL("ClockInfo");
    if (type != 1 && type != 2) return NOT_SUPPORTED;
    *out = (uint)(type == 2 ? f.mem_mhz : f.sm_mhz);
    return SUCCESS;
}
#ifndef WITHOUT_EVENT_REASONS
int nvmlDeviceGetCurrentClocksEventReasons(struct handle *handle, ulong64 *out) {
    CALL("ThrottleReasons");
    *out = f.throttle;
    return SUCCESS;
}
#endif
int nvmlDeviceGetCurrentClocksThrottleReasons(struct handle *handle, ulong64 *out) {
    CALL("ThrottleReasons");
    *out = f.throttle;
    return SUCCESS;
}
int nvmlDeviceGetTotalEccErrors(struct handle *handle, uint error, uint counter, ulong64 *out) {
    CALL("TotalEccErrors");
    if (error != 1 || counter != 1) return NOT_SUPPORTED;  /* uncorrected, aggregate */
    *out = f.ecc;
    return SUCCESS;
}
/* Facts that are told once; a card that the file says nothing of does not tell them. */
#define TOLD(function, figure) \
    int nvmlDeviceGet##function(struct handle *handle, uint *out) { \
        CALL(#function); \
        if (!f.figure) return NOT_SUPPORTED; \
        *out = (uint)f.figure; \
        return SUCCESS; \
    }
TOLD(MemoryBusWidth, bus_bits)
TOLD(NumGpuCores, cores)
TOLD(PowerManagementDefaultLimit, default_mw)
TOLD(MaxPcieLinkGeneration, pcie_gen)
TOLD(MaxPcieLinkWidth, pcie_lanes)
int nvmlDeviceGetMaxClockInfo(struct handle *handle, uint type, uint *out) {
    CALL("MaxClockInfo");
    if (type != 1 && type != 2) return NOT_SUPPORTED;
    *out = (uint)(type == 2 ? f.max_mem_mhz : f.max_sm_mhz);
    return SUCCESS;
}
int nvmlDeviceGetCudaComputeCapability(struct handle *handle, int *major, int *minor) {
    CALL("CudaComputeCapability");
    if (!f.capability) return NOT_SUPPORTED;
    *major = (int)f.capability / 10;
    *minor = (int)f.capability % 10;
    return SUCCESS;
}
int nvmlDeviceGetNvLinkState(struct handle *handle, uint link, uint *out) {
    CALL("NvLinkState");
    if (link >= 18) return INVALID;
    *out = link < f.links;
    return SUCCESS;
}
int nvmlDeviceGetNvLinkVersion(struct handle *handle, uint link, uint *out) {
    CALL("NvLinkVersion");
    if (link >= f.links) return INVALID;
    *out = (uint)f.link_version;
    return SUCCESS;
}
struct process { uint pid; ulong64 bytes; uint gpu_instance, compute_instance; };
int nvmlDeviceGetComputeRunningProcesses_v3(struct handle *handle, uint *count, struct process *out) {
    CALL("ComputeRunningProcesses");
    uint room = *count;
    *count = (uint)f.processes;
    if (room < *count) return TOO_SMALL;
    for (int i = 0; i < f.processes; i++) out[i] = (struct process){f.pids[i], f.held[i], ~0u, ~0u};
    return SUCCESS;
}
