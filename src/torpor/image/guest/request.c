/* What each request does. Everything that takes long is left to a task or to the poll loop. */
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysinfo.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define TIMEOUT_MAX_MS (3600 * 1000)

static struct command command;
static char port_variable[32];
static struct wake wake; /* the last one, for its child */

static void refuse(uint64_t connection, const char *why)
{
    reply_error(connection, FAULT_GUEST, "%s", why);
}

static void begin_or_refuse(enum task_kind kind, uint64_t connection, worker work,
                            const void *argument)
{
    if (!begin_task(kind, connection, work, argument))
        refuse(connection, "no child could be started");
}

static void answer_ping(uint64_t connection, const struct request *request)
{
    struct utsname system;
    char release[3 * sizeof system.release];

    (void)request;
    uname(&system);
    encode_value(system.release, release, sizeof release);
    reply_ok(connection, "ok protocol=%d kernel=%s", PROTOCOL_VERSION, release);
}

static bool has_variable(size_t count, const char *name)
{
    size_t length = strlen(name);

    for (size_t i = 0; i < count; i++)
        if (strncmp(command.envp[i], name, length) == 0 && command.envp[i][length] == '=')
            return true;
    return false;
}

/* PORT of the request wins over a variable of that name; the others are defaults. */
static void take_environment(const struct request *request)
{
    size_t count = 0;

    if (*port_variable)
        command.envp[count++] = port_variable;
    for (size_t i = 0; i < request->count; i++) {
        const struct field *field = &request->fields[i];
        bool is_port = *port_variable && strncmp(field->value, "PORT=", 5) == 0;
        if (strcmp(field->key, "env") == 0 && !is_port)
            command.envp[count++] = field->value;
    }
    if (!has_variable(count, "PATH"))
        command.envp[count++] = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    if (!has_variable(count, "HOME"))
        command.envp[count++] = "HOME=/root";
    command.envp[count] = NULL;
}

static bool take_command(uint64_t connection, const struct request *request)
{
    size_t count = 0;

    for (size_t i = 0; i < request->count; i++)
        if (strcmp(request->fields[i].key, "arg") == 0)
            command.argv[count++] = request->fields[i].value;
    command.argv[count] = NULL;
    command.cwd = field_value(request, "cwd");
    take_environment(request);
    if (count == 0)
        refuse(connection, "a command needs at least one arg");
    return count > 0;
}

static int work_command(int report_fd, const void *argument)
{
    return enter_root(report_fd) == 0 ? exec_command(report_fd, argument) : EXIT_FAILURE;
}

static void answer_run(uint64_t connection, const struct request *request)
{
    *port_variable = '\0';
    if (is_stopping())
        refuse(connection, "the guest is stopping");
    else if (function.state != FUNCTION_NONE)
        refuse(connection, "run is for the time before start");
    else if (task_runs(TASK_RUN) || task_runs(TASK_START))
        refuse(connection, "another command is under way");
    else if (take_command(connection, request))
        begin_or_refuse(TASK_RUN, connection, work_command, &command);
}

static void begin_start(uint64_t connection)
{
    char problem[256];

    if (!end_leftovers())
        refuse(connection, "what an earlier command started does not end");
    else if (mode.in_vm && !mount_function_root(problem, sizeof problem))
        refuse(connection, problem);
    else
        begin_or_refuse(TASK_START, connection, work_command, &command);
}

static void answer_start(uint64_t connection, const struct request *request)
{
    uint64_t port = 0;

    if (!parse_number(field_value(request, "port"), UINT16_MAX, &port) || port == 0) {
        refuse(connection, "start needs a port from 1 to 65535");
        return;
    }
    snprintf(port_variable, sizeof port_variable, "PORT=%" PRIu64, port);
    if (is_stopping())
        refuse(connection, "the guest is stopping");
    else if (function.state != FUNCTION_NONE)
        refuse(connection, "a function was started already");
    else if (task_runs(TASK_NONE))
        refuse(connection, "another request is under way");
    else if (take_command(connection, request))
        begin_start(connection);
}

static void refuse_port(uint64_t connection, uint16_t port, enum listening found)
{
    if (found == LISTENING_LOOPBACK)
        reply_error(connection, FAULT_FUNCTION,
                    "port %d is listened on, but not on 0.0.0.0: it cannot be reached from outside "
                    "the guest", port);
    else
        reply_error(connection, FAULT_FUNCTION, "nothing listens on port %d", port);
}

/* Answer an `await` if the time has come; false when it is to be asked again. */
bool answer_await(uint64_t connection, uint16_t port, int64_t deadline_ms)
{
    char text[64];
    enum listening found = find_listener(port);

    if (function.state == FUNCTION_EXITED) {
        describe_status(function.status, text, sizeof text);
        reply_error(connection, FAULT_FUNCTION, "the function %s", text);
    } else if (found == LISTENING) {
        reply_ok(connection, "ok");
    } else if (now_ms() >= deadline_ms) {
        refuse_port(connection, port, found);
    } else {
        return false;
    }
    return true;
}

static void answer_await_request(uint64_t connection, const struct request *request)
{
    uint64_t port = 0;
    uint64_t timeout_ms = 0;

    if (!parse_number(field_value(request, "port"), UINT16_MAX, &port) || port == 0
        || !parse_number(field_value(request, "timeout_ms"), TIMEOUT_MAX_MS, &timeout_ms)) {
        refuse(connection, "await needs a port and a timeout_ms of at most an hour");
        return;
    }
    if (function.state == FUNCTION_NONE) {
        refuse(connection, "no function was started");
        return;
    }
    int64_t deadline_ms = now_ms() + (int64_t)timeout_ms;
    if (!answer_await(connection, (uint16_t)port, deadline_ms))
        hold_for_port(connection, (uint16_t)port, deadline_ms);
}

static bool take_entropy(const char *text)
{
    size_t length = text ? strlen(text) : 0;

    wake.entropy_bytes = length / 2;
    if (length < 32 || length % 2 || wake.entropy_bytes > sizeof wake.entropy)
        return false;
    for (size_t i = 0; i < wake.entropy_bytes; i++) {
        unsigned int byte = 0;
        if (strspn(text + 2 * i, "0123456789abcdefABCDEF") < 2
            || sscanf(text + 2 * i, "%2x", &byte) != 1)
            return false;
        wake.entropy[i] = (unsigned char)byte;
    }
    return true;
}

/* One line each in the files they go to. */
static bool take_name(const char *text, char *name, size_t name_bytes)
{
    if (!text || !*text || strlen(text) >= name_bytes || strpbrk(text, " \t\r\n"))
        return false;
    strcpy(name, text);
    return true;
}

static bool take_wake(const struct request *request)
{
    struct identity *identity = &wake.identity;

    return parse_number(field_value(request, "time_ns"), INT64_MAX, &wake.time_ns)
           && take_entropy(field_value(request, "entropy"))
           && take_name(field_value(request, "hostname"), identity->hostname,
                        sizeof identity->hostname)
           && take_name(field_value(request, "instance"), identity->instance,
                        sizeof identity->instance);
}

static void answer_wake(uint64_t connection, const struct request *request)
{
    if (task_runs(TASK_WAKE) || task_runs(TASK_START) || is_stopping()) {
        refuse(connection, "another request is under way");
        return;
    }
    if (!take_wake(request)) {
        refuse(connection, "wake needs time_ns, entropy (16 to 512 bytes in hexadecimal), hostname "
                           "(up to 64 bytes) and instance (up to 255), names without white space");
        return;
    }
    const char *failed = wake_up(&wake);
    if (failed)
        reply_error(connection, FAULT_GUEST, "%s: %s", failed, strerror(errno));
    else if (wake_needs_child())
        begin_or_refuse(TASK_WAKE, connection, finish_wake, &wake);
    else
        reply_woken(connection);
}

static void answer_clock(uint64_t connection, const struct request *request)
{
    uint64_t time_ns = 0;

    if (!parse_number(field_value(request, "time_ns"), INT64_MAX, &time_ns))
        refuse(connection, "clock needs time_ns");
    else if (mode.in_vm && set_clock(time_ns) != 0)
        reply_error(connection, FAULT_GUEST, "clock: %s", strerror(errno));
    else
        reply_ok(connection, "ok%s", mode.in_vm ? "" : " skipped=clock");
}

static int work_sync(int report_fd, const void *argument)
{
    int fd = open(argument, O_RDONLY | O_CLOEXEC);

    sync();
    if (fd >= 0 && syncfs(fd) == 0)
        return EXIT_SUCCESS;
    report(report_fd, FAULT_GUEST, "sync: %s", strerror(errno));
    return EXIT_FAILURE;
}

static void answer_sync(uint64_t connection, const struct request *request)
{
    (void)request;
    begin_or_refuse(TASK_SYNC, connection, work_sync, mode.in_vm ? "/scratch" : mode.root);
}

static void answer_stop(uint64_t connection, const struct request *request)
{
    uint64_t timeout_ms = 0;

    if (!parse_number(field_value(request, "timeout_ms"), TIMEOUT_MAX_MS, &timeout_ms))
        refuse(connection, "stop needs a timeout_ms of at most an hour");
    else if (is_stopping())
        refuse(connection, "the guest is stopping");
    else
        begin_stop(connection, now_ms() + (int64_t)timeout_ms);
}

static void describe_function(char *out, size_t out_bytes)
{
    if (function.state == FUNCTION_NONE)
        snprintf(out, out_bytes, "none");
    else if (function.state == FUNCTION_RUNNING)
        snprintf(out, out_bytes, "running pid=%d", function.pid);
    else if (WIFSIGNALED(function.status))
        snprintf(out, out_bytes, "exited signal=%d", WTERMSIG(function.status));
    else
        snprintf(out, out_bytes, "exited status=%d", WEXITSTATUS(function.status));
}

static void answer_stats(uint64_t connection, const struct request *request)
{
    struct sysinfo information;
    struct timespec clock;
    struct timespec uptime;
    char state[64];

    (void)request;
    sysinfo(&information);
    clock_gettime(CLOCK_REALTIME, &clock);
    clock_gettime(CLOCK_BOOTTIME, &uptime);
    describe_function(state, sizeof state);
    reply_ok(connection,
             "ok uptime_ms=%" PRId64 " clock_ns=%" PRId64 " memory_total_bytes=%" PRIu64
             " memory_free_bytes=%" PRIu64 " function=%s",
             (int64_t)uptime.tv_sec * 1000 + uptime.tv_nsec / 1000000,
             (int64_t)clock.tv_sec * 1000000000 + clock.tv_nsec,
             (uint64_t)information.totalram * information.mem_unit,
             (uint64_t)information.freeram * information.mem_unit, state);
}

static const struct verb {
    const char *name;
    const char *keys; /* between spaces */
    void (*answer)(uint64_t connection, const struct request *request);
} verbs[] = {
    {"ping", " ", answer_ping},
    {"run", " arg env cwd ", answer_run},
    {"start", " arg env cwd port ", answer_start},
    {"await", " port timeout_ms ", answer_await_request},
    {"wake", " time_ns entropy hostname instance ", answer_wake},
    {"clock", " time_ns ", answer_clock},
    {"sync", " ", answer_sync},
    {"stats", " ", answer_stats},
    {"stop", " timeout_ms ", answer_stop},
};

static const struct field *find_unknown(const struct verb *verb, const struct request *request)
{
    char key[64];

    for (size_t i = 0; i < request->count; i++) {
        snprintf(key, sizeof key, " %s ", request->fields[i].key);
        if (!strstr(verb->keys, key))
            return &request->fields[i];
    }
    return NULL;
}

/* Answer now, or see to it that the connection is answered later: exactly one reply either way. */
void handle_request(uint64_t connection, const struct request *request)
{
    for (size_t i = 0; i < sizeof verbs / sizeof *verbs; i++) {
        if (strcmp(verbs[i].name, request->verb) != 0)
            continue;
        const struct field *unknown = find_unknown(&verbs[i], request);
        if (unknown)
            reply_error(connection, FAULT_GUEST, "%s has no field '%.40s'", request->verb,
                        unknown->key);
        else
            verbs[i].answer(connection, request);
        return;
    }
    reply_error(connection, FAULT_GUEST, "unknown request '%.40s'", request->verb);
}
