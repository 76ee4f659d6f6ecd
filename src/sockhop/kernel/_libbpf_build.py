"""Builds `sockhop.kernel._libbpf`, the cffi extension over libbpf >= 1.1.

API mode: the C compiler checks every declaration here against libbpf's own headers.
"""

from cffi import FFI

CDEF = """
typedef uint32_t __u32;
typedef uint64_t __u64;

/* --- what libbpf would print ------------------------------------------------------------- */
void sockhop_log_reset(void);
const char *sockhop_log(void);

/* --- objects ------------------------------------------------------------------------------ */
struct bpf_object; struct bpf_program; struct bpf_map; struct btf;
struct bpf_object_open_opts {
    size_t sz;
    const char *object_name;
    const char *pin_root_path;
    ...;
};
struct bpf_object *bpf_object__open_file(const char *path,
                                         const struct bpf_object_open_opts *opts);
int bpf_object__load(struct bpf_object *obj);
void bpf_object__close(struct bpf_object *obj);
struct bpf_program *bpf_object__next_program(const struct bpf_object *obj,
                                             struct bpf_program *prog);
const char *bpf_program__name(const struct bpf_program *prog);
int bpf_program__fd(const struct bpf_program *prog);
int bpf_program__set_autoload(struct bpf_program *prog, bool autoload);
struct bpf_map *bpf_object__find_map_by_name(const struct bpf_object *obj, const char *name);
struct bpf_map *bpf_object__next_map(const struct bpf_object *obj, const struct bpf_map *map);
const char *bpf_map__name(const struct bpf_map *map);
const char *bpf_map__pin_path(const struct bpf_map *map);
int bpf_map__fd(const struct bpf_map *map);
int bpf_map__set_max_entries(struct bpf_map *map, __u32 max_entries);
int bpf_map__set_key_size(struct bpf_map *map, __u32 size);
int bpf_map__reuse_fd(struct bpf_map *map, int fd);
__u32 bpf_map__max_entries(const struct bpf_map *map);

/* --- maps --------------------------------------------------------------------------------- */
struct bpf_map_create_opts;
int bpf_map_create(int type, const char *name, __u32 key_size, __u32 value_size,
                   __u32 max_entries, const struct bpf_map_create_opts *opts);
int bpf_map_lookup_elem(int fd, const void *key, void *value);
int bpf_map_update_elem(int fd, const void *key, const void *value, __u64 flags);
int bpf_map_delete_elem(int fd, const void *key);
int bpf_map_lookup_and_delete_elem(int fd, const void *key, void *value);
int bpf_map_get_next_key(int fd, const void *key, void *next_key);
struct bpf_map_batch_opts;
int bpf_map_lookup_batch(int fd, void *in_batch, void *out_batch, void *keys, void *values,
                         __u32 *count, const struct bpf_map_batch_opts *opts);
int bpf_map_update_batch(int fd, const void *keys, const void *values, __u32 *count,
                         const struct bpf_map_batch_opts *opts);
int bpf_map_delete_batch(int fd, const void *keys, __u32 *count,
                         const struct bpf_map_batch_opts *opts);

/* --- pins, ids, info ---------------------------------------------------------------------- */
int bpf_obj_pin(int fd, const char *path);
int bpf_obj_get(const char *path);
int bpf_prog_get_fd_by_id(__u32 id);
int bpf_prog_get_next_id(__u32 start_id, __u32 *next_id);
int bpf_map_get_fd_by_id(__u32 id);
int bpf_map_get_next_id(__u32 start_id, __u32 *next_id);
int bpf_link_get_fd_by_id(__u32 id);
struct bpf_map_info { __u32 type; __u32 id; __u32 key_size; __u32 value_size;
                      __u32 max_entries; __u32 map_flags; char name[16]; ...; };
struct bpf_prog_info { __u32 type; __u32 id; uint8_t tag[8]; __u32 nr_map_ids; __u64 map_ids;
                       char name[16]; ...; };
struct bpf_link_info { __u32 type; __u32 id; __u32 prog_id;
                       struct { __u64 cgroup_id; __u32 attach_type; } cgroup; ...; };
int bpf_obj_get_info_by_fd(int fd, void *info, __u32 *info_len);

/* --- attaching ---------------------------------------------------------------------------- */
enum bpf_attach_type {
    BPF_CGROUP_INET_INGRESS, BPF_CGROUP_INET_EGRESS, BPF_CGROUP_INET_SOCK_CREATE,
    BPF_CGROUP_SOCK_OPS,
    BPF_CGROUP_INET4_BIND, BPF_CGROUP_INET6_BIND,
    BPF_CGROUP_INET4_CONNECT, BPF_CGROUP_INET6_CONNECT,
    BPF_CGROUP_INET4_POST_BIND, BPF_CGROUP_INET6_POST_BIND,
    BPF_CGROUP_UDP4_SENDMSG, BPF_CGROUP_UDP6_SENDMSG,
    BPF_CGROUP_UDP4_RECVMSG, BPF_CGROUP_UDP6_RECVMSG,
    BPF_TRACE_ITER,
    BPF_CGROUP_INET4_GETPEERNAME, BPF_CGROUP_INET6_GETPEERNAME,
    BPF_CGROUP_INET_SOCK_RELEASE,
    ...
};
int bpf_prog_attach(int prog_fd, int attachable_fd, enum bpf_attach_type type,
                    unsigned int flags);
int bpf_prog_detach2(int prog_fd, int attachable_fd, enum bpf_attach_type type);
int bpf_prog_query(int target_fd, enum bpf_attach_type type, __u32 query_flags,
                   __u32 *attach_flags, __u32 *prog_ids, __u32 *prog_cnt);
struct bpf_link_create_opts;
int bpf_link_create(int prog_fd, int target_fd, enum bpf_attach_type type,
                    const struct bpf_link_create_opts *opts);
struct bpf_link_update_opts;
int bpf_link_update(int link_fd, int new_prog_fd, const struct bpf_link_update_opts *opts);
int bpf_link_detach(int link_fd);
int bpf_iter_create(int link_fd);
int sockhop_iter_link(int prog_fd, int map_fd);
int sockhop_kprobe(int pmu, const char *function, int at_return, int prog_fd);
#define BPF_F_ALLOW_MULTI ...
#define BPF_F_ALLOW_OVERRIDE ...
#define BPF_F_QUERY_EFFECTIVE ...

/* --- BTF ---------------------------------------------------------------------------------- */
struct btf_type { __u32 name_off; __u32 info; __u32 size; ...; };
struct btf_member { __u32 name_off; __u32 type; __u32 offset; };
struct btf_array { __u32 type; __u32 index_type; __u32 nelems; };
struct btf *btf__parse(const char *path, void *ext);
void btf__free(struct btf *btf);
int32_t btf__find_by_name_kind(const struct btf *btf, const char *name, __u32 kind);
const struct btf_type *btf__type_by_id(const struct btf *btf, __u32 id);
const char *btf__name_by_offset(const struct btf *btf, __u32 offset);
int64_t btf__resolve_size(const struct btf *btf, __u32 id);
int btf__resolve_type(const struct btf *btf, __u32 id);
uint16_t btf_kind(const struct btf_type *t);
uint16_t btf_vlen(const struct btf_type *t);
struct btf_member *btf_members(const struct btf_type *t);
uint8_t btf_int_encoding(const struct btf_type *t);
#define BTF_KIND_INT ...
#define BTF_KIND_STRUCT ...
#define BTF_INT_SIGNED ...

/* --- what the Python library lacks --------------------------------------------------------- */
int setns(int fd, int nstype);
int sockhop_grace_period(void);
int sockhop_pidfd_getfd(int pidfd, int fd);
int sockhop_open_cgroup(int any_cgroup, __u64 id);
#define CLONE_NEWNET ...

/* --- probes of what the kernel can do ------------------------------------------------------ */
int sockhop_probe_map(int type, int key_size, int value_size, int entries, int flags, int btf_fd);
int sockhop_probe_program(int type, int attach_type, int attach_btf_id, const void *instructions,
                          int count, char *log, int log_size);
int sockhop_probe_kprobe(int pmu, const char *function);
int sockhop_probe_memlock(void);
int libbpf_probe_bpf_map_type(int map_type, const void *opts);
int libbpf_probe_bpf_prog_type(int prog_type, const void *opts);
int libbpf_probe_bpf_helper(int prog_type, int helper_id, const void *opts);
int sockhop_jited_size(int prog_fd);
int bpf_btf_load(const void *btf_data, size_t btf_size, const void *opts);
int bpf_raw_tracepoint_open(const char *name, int prog_fd);
struct btf *btf__load_vmlinux_btf(void);
#define BTF_KIND_FUNC ...
#define BTF_KIND_TYPEDEF ...
#define BPF_SK_MSG_VERDICT ...
#define BPF_TRACE_FENTRY ...
#define BPF_TRACE_RAW_TP ...
#define BPF_MAP_TYPE_ARRAY ...
#define BPF_MAP_TYPE_HASH ...
#define BPF_MAP_TYPE_LRU_HASH ...
#define BPF_MAP_TYPE_RINGBUF ...
#define BPF_MAP_TYPE_SK_STORAGE ...
#define BPF_MAP_TYPE_SOCKHASH ...
#define BPF_MAP_TYPE_SOCKMAP ...
#define BPF_PROG_TYPE_CGROUP_SOCK ...
#define BPF_PROG_TYPE_CGROUP_SOCK_ADDR ...
#define BPF_PROG_TYPE_KPROBE ...
#define BPF_PROG_TYPE_SK_MSG ...
#define BPF_PROG_TYPE_SOCK_OPS ...
#define BPF_PROG_TYPE_TRACING ...
#define BPF_FUNC_get_netns_cookie ...
#define BPF_FUNC_get_socket_cookie ...
#define BPF_FUNC_ktime_get_boot_ns ...
#define BPF_FUNC_msg_redirect_hash ...
#define BPF_FUNC_set_retval ...
#define BPF_FUNC_sk_storage_get ...
#define BPF_FUNC_sock_from_file ...
#define BPF_FUNC_sock_hash_update ...
#define BPF_F_NO_PREALLOC ...
"""

SOURCE = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <linux/bpf.h>
#include <linux/btf.h>
#include <linux/perf_event.h>
#include <bpf/bpf.h>
#include <bpf/btf.h>
#include <bpf/libbpf.h>


/* libbpf's warnings carry the verifier's log. Keep the tail of what it says, print nothing. */
static char log_text[1 << 16];
static size_t log_used;

static int keep(enum libbpf_print_level level, const char *format, va_list args)
{
    char *line;
    int n, drop;

    if (level == LIBBPF_DEBUG || (n = vasprintf(&line, format, args)) < 0)
        return 0;
    /* What is wrong stands at the end of a verifier log. */
    drop = n >= (int)sizeof(log_text) ? n + 1 - (int)sizeof(log_text) : 0;
    if (log_used + n - drop >= sizeof(log_text)) {
        size_t old = log_used + n - drop + 1 - sizeof(log_text);

        memmove(log_text, log_text + old, log_used - old);
        log_used -= old;
    }
    memcpy(log_text + log_used, line + drop, n - drop);
    log_used += n - drop;
    log_text[log_used] = 0;
    free(line);
    return n;
}

static void sockhop_log_reset(void)
{
    libbpf_set_print(keep);
    log_used = 0;
    log_text[0] = 0;
}

static const char *sockhop_log(void)
{
    return log_text;
}

static int sockhop_iter_link(int prog_fd, int map_fd)
{
    union bpf_iter_link_info info = { .map.map_fd = map_fd };
    LIBBPF_OPTS(bpf_link_create_opts, opts);

    if (map_fd >= 0) {
        opts.iter_info = &info;
        opts.iter_info_len = sizeof(info);
    }
    return bpf_link_create(prog_fd, 0, BPF_TRACE_ITER, &opts);
}

/* Returns the descriptor of an event that runs the program for as long as it is open. */
static int sockhop_kprobe(int pmu, const char *function, int at_return, int prog_fd)
{
    struct perf_event_attr attr = {
        .type = pmu, .size = sizeof(attr), .config = at_return,
        .kprobe_func = (uintptr_t)function,
    };
    int fd = syscall(SYS_perf_event_open, &attr, -1, 0, -1, PERF_FLAG_FD_CLOEXEC), error;

    if (fd < 0)
        return -errno;
    if (ioctl(fd, PERF_EVENT_IOC_SET_BPF, prog_fd) || ioctl(fd, PERF_EVENT_IOC_ENABLE, 0)) {
        error = errno;
        close(fd);
        return -error;
    }
    return fd;
}

/* Whoever changes a map of maps waits for the programs that run: maybe_wait_bpf_programs(). */
static int sockhop_grace_period(void)
{
    LIBBPF_OPTS(bpf_map_create_opts, opts);
    int inner, outer, result;
    __u32 zero = 0;

    inner = bpf_map_create(BPF_MAP_TYPE_ARRAY, "sockhop_grace", 4, 4, 1, NULL);
    if (inner < 0)
        return inner;
    opts.inner_map_fd = inner;
    outer = bpf_map_create(BPF_MAP_TYPE_ARRAY_OF_MAPS, "sockhop_grace", 4, 4, 1, &opts);
    result = outer < 0 ? outer : bpf_map_update_elem(outer, &zero, &inner, BPF_ANY);
    if (outer >= 0)
        close(outer);
    close(inner);
    return result;
}

static int sockhop_pidfd_getfd(int pidfd, int fd)
{
    return syscall(SYS_pidfd_getfd, pidfd, fd, 0);
}

static int sockhop_open_cgroup(int any_cgroup, __u64 id)
{
    union {
        struct file_handle handle;
        char room[sizeof(struct file_handle) + sizeof(id)];
    } of = { .handle = { .handle_bytes = sizeof(id), .handle_type = 0xfe } };

    /* 0xfe is FILEID_KERNFS (include/linux/exportfs.h). */
    memcpy(of.room + offsetof(struct file_handle, f_handle), &id, sizeof(id));
    return open_by_handle_at(any_cgroup, &of.handle, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
}

/* Key and value of a map with BTF have its type 1. */
static int sockhop_probe_map(int type, int key_size, int value_size, int entries, int flags,
                             int btf_fd)
{
    LIBBPF_OPTS(bpf_map_create_opts, opts, .map_flags = flags);

    if (btf_fd >= 0) {
        opts.btf_fd = btf_fd;
        opts.btf_key_type_id = opts.btf_value_type_id = 1;
    }
    return bpf_map_create(type, "sockhop_probe", key_size, value_size, entries, &opts);
}

static int sockhop_probe_program(int type, int attach_type, int attach_btf_id,
                                 const void *instructions, int count, char *log, int log_size)
{
    LIBBPF_OPTS(bpf_prog_load_opts, opts, .expected_attach_type = attach_type,
                .attach_btf_id = attach_btf_id, .log_buf = log, .log_size = log_size,
                .log_level = 1);

    return bpf_prog_load(type, "sockhop_probe", "GPL", instructions, count, &opts);
}

static int sockhop_probe_kprobe(int pmu, const char *function)
{
    struct perf_event_attr attr = {
        .type = pmu, .size = sizeof(attr), .disabled = 1, .kprobe_func = (uintptr_t)function,
    };
    int fd = syscall(SYS_perf_event_open, &attr, -1, 0, -1, PERF_FLAG_FD_CLOEXEC);

    return fd < 0 ? -errno : fd;
}

/* Not through libbpf, which raises RLIMIT_MEMLOCK first. */
static int sockhop_probe_memlock(void)
{
    union bpf_attr attr = { .map_type = BPF_MAP_TYPE_ARRAY, .key_size = 4, .value_size = 4,
                            .max_entries = 1 };
    int fd = syscall(SYS_bpf, BPF_MAP_CREATE, &attr, sizeof(attr));

    return fd < 0 ? -errno : fd;
}

static int sockhop_jited_size(int prog_fd)
{
    struct bpf_prog_info info = {};
    __u32 size = sizeof(info);
    int result = bpf_obj_get_info_by_fd(prog_fd, &info, &size);

    return result < 0 ? result : (int)info.jited_prog_len;
}
"""

ffibuilder = FFI()
ffibuilder.cdef(CDEF)
ffibuilder.set_source("sockhop.kernel._libbpf", SOURCE, libraries=["bpf"])

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
