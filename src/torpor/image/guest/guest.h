/* What the parts of the guest's init share. The protocol is described in docs/guest-protocol.md.
 *
 *   init.c      command line, PID 1's duties
 *   boot.c      modules, file systems, network
 *   agent.c     connections and the poll loop
 *   line.c      requests and replies as lines
 *   request.c   what each request does
 *   task.c      children that work for a request, and the function
 *   stop.c      ending everything in order
 *   wake.c      the work of `wake`
 *   port.c      who listens on a TCP port
 */
#ifndef TORPOR_GUEST_H
#define TORPOR_GUEST_H

#define _GNU_SOURCE

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define PROTOCOL_VERSION 1
#define LINE_BYTES 65536 /* a request with its newline */
#define FIELDS_MAX 1024
#define MESSAGE_BYTES 1024
#define REPLY_BYTES (3 * MESSAGE_BYTES + 256)
#define PRINTF(at, first) __attribute__((format(printf, at, first)))

#define GUEST_ADDRESS "172.16.0.2"
#define GATEWAY_ADDRESS "172.16.0.1"
#define AGENT_PORT 1024
#define ROOT "/root"   /* where the function's root is mounted */
#define NAMES "/names" /* what is at /run/torpor in it */

/* How this process runs: as PID 1 of a VM, or as an agent on a host for tests, which mounts
 * nothing, changes no root and leaves clock, entropy and host name alone. */
struct mode {
    bool in_vm;
    const char *root;
};
extern struct mode mode;

/* Whose fault an error is: the guest's own, or the function's code and files. */
enum fault { FAULT_GUEST, FAULT_FUNCTION };

struct field {
    const char *key;
    const char *value;
};

struct request {
    const char *verb;
    size_t count;
    struct field fields[FIELDS_MAX];
};

/* line.c */
bool parse_request(char *line, struct request *request, char *problem, size_t problem_bytes);
const char *field_value(const struct request *request, const char *key);
bool parse_number(const char *text, uint64_t maximum, uint64_t *number);
size_t encode_value(const char *value, char *out, size_t out_bytes);

/* agent.c */
void reply_ok(uint64_t connection, const char *format, ...) PRINTF(2, 3);
void reply_error(uint64_t connection, enum fault fault, const char *format, ...) PRINTF(3, 4);
void hold_for_port(uint64_t connection, uint16_t port, int64_t deadline_ms);
int open_listener(const char *address, uint16_t port);
void serve(int listener) __attribute__((noreturn));

/* request.c */
void handle_request(uint64_t connection, const struct request *request);
bool answer_await(uint64_t connection, uint16_t port, int64_t deadline_ms);

/* task.c */
enum task_kind { TASK_NONE, TASK_RUN, TASK_START, TASK_WAKE, TASK_SYNC, TASK_STOP };
enum function_state { FUNCTION_NONE, FUNCTION_RUNNING, FUNCTION_EXITED };

struct function {
    enum function_state state;
    pid_t pid;
    int status; /* of waitpid(2) */
};
extern struct function function;

struct command {
    const char *argv[FIELDS_MAX + 1];
    const char *envp[FIELDS_MAX + 8];
    const char *cwd;
};

/* The work of a child; what it has to say goes through report(). Returns the exit status. */
typedef int (*worker)(int report_fd, const void *argument);

#define TASKS_MAX 8
bool begin_task(enum task_kind kind, uint64_t connection, worker work, const void *argument);
bool task_runs(enum task_kind kind); /* TASK_NONE: any */
int task_pipe(size_t index);         /* -1 when the slot has nothing to read */
void read_task_pipe(size_t index);
void reap_children(void);
bool end_leftovers(void);
void report(int report_fd, enum fault fault, const char *format, ...) PRINTF(3, 4);
int enter_root(int report_fd);
int exec_command(int report_fd, const void *command);
void reply_woken(uint64_t connection);
void describe_status(int status, char *out, size_t out_bytes);

/* stop.c */
void begin_stop(uint64_t connection, int64_t deadline_ms);
void advance_stop(void);
bool is_stopping(void);
bool stop_waits(void);

/* wake.c */
struct identity {
    char hostname[65];
    char instance[256];
};

struct wake {
    struct identity identity;
    uint64_t time_ns;
    unsigned char entropy[512];
    size_t entropy_bytes;
};
int set_clock(uint64_t time_ns);
const char *wake_up(const struct wake *wake);
bool wake_needs_child(void);
int finish_wake(int report_fd, const void *wake);

/* port.c */
enum listening { LISTENING_NOWHERE, LISTENING_LOOPBACK, LISTENING };
enum listening find_listener(uint16_t port);

/* boot.c */
void boot(void);
bool mount_function_root(char *problem, size_t problem_bytes);
bool unmount_disks(char *problem, size_t problem_bytes);

/* init.c */
void log_line(const char *format, ...) PRINTF(1, 2);
void die(const char *format, ...) PRINTF(1, 2) __attribute__((noreturn));
int64_t now_ms(void);

#endif
