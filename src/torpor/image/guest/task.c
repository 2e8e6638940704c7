/* Children: those that work for a request, and the function itself.
 *
 * A task is a child with a pipe to report through. The pipe closes when the child executes a
 * program or ends, so an empty report means that all went well up to there. `start` is over then,
 * and the child is the function; every other task is over when the child has ended as well.
 */
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define REPORT_FD 3
#define LEFTOVERS_DEADLINE_MS 2000

struct task {
    enum task_kind kind; /* TASK_NONE: the slot is free */
    uint64_t connection;
    pid_t pid;
    int pipe; /* -1 once it was read to its end */
    bool ended;
    int status;
    size_t report_bytes;
    char report[MESSAGE_BYTES];
};

static struct task tasks[TASKS_MAX];
struct function function;

void describe_status(int status, char *out, size_t out_bytes)
{
    if (WIFSIGNALED(status))
        snprintf(out, out_bytes, "was killed by signal %d (SIG%s)", WTERMSIG(status),
                 sigabbrev_np(WTERMSIG(status)) ?: "?");
    else
        snprintf(out, out_bytes, "exited with status %d", WEXITSTATUS(status));
}

/* Tell the agent why the task failed; for children only. */
void report(int report_fd, enum fault fault, const char *format, ...)
{
    char text[MESSAGE_BYTES];
    va_list arguments;

    text[0] = fault == FAULT_FUNCTION ? 'f' : 'g';
    va_start(arguments, format);
    vsnprintf(text + 1, sizeof text - 1, format, arguments);
    va_end(arguments);
    if (write(report_fd, text, strlen(text)) < 0)
        _exit(EXIT_FAILURE);
}

/* A child has /dev/null, the console and its report pipe, default signals, a session of its own. */
static void become_child(int pipe_end)
{
    sigset_t none;
    int null = open("/dev/null", O_RDONLY);

    setsid();
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    signal(SIGPIPE, SIG_DFL);
    if (null >= 0)
        dup2(null, STDIN_FILENO);
    if (pipe_end != REPORT_FD)
        dup3(pipe_end, REPORT_FD, O_CLOEXEC);
    close_range(REPORT_FD + 1, ~0U, 0);
}

/* Make the function's root this child's; on a host, only its working directory. */
int enter_root(int report_fd)
{
    if (chdir(mode.root) != 0 || (mode.in_vm && (chroot(".") != 0 || chdir("/") != 0))) {
        report(report_fd, FAULT_GUEST, "root %s: %s", mode.root, strerror(errno));
        return EXIT_FAILURE;
    }
    return EXIT_SUCCESS;
}

/* Returns only when the command could not be executed. */
int exec_command(int report_fd, const void *argument)
{
    const struct command *command = argument;

    if (command->cwd && chdir(command->cwd) != 0) {
        report(report_fd, FAULT_FUNCTION, "working directory %s: %s", command->cwd,
               strerror(errno));
        return EXIT_FAILURE;
    }
    environ = (char **)command->envp;
    execvp(command->argv[0], (char **)command->argv);
    report(report_fd, FAULT_FUNCTION, "cannot execute %s: %s", command->argv[0], strerror(errno));
    return EXIT_FAILURE;
}

static struct task *find_task(enum task_kind kind)
{
    for (size_t i = 0; i < TASKS_MAX; i++)
        if (tasks[i].kind == kind)
            return &tasks[i];
    return NULL;
}

bool task_runs(enum task_kind kind)
{
    for (size_t i = 0; i < TASKS_MAX; i++)
        if (tasks[i].kind != TASK_NONE && (kind == TASK_NONE || tasks[i].kind == kind))
            return true;
    return false;
}

/* Run `work` in a child on behalf of a connection, which gets its reply when that is over. False
 * when it could not begin: the reply is still to be made. */
bool begin_task(enum task_kind kind, uint64_t connection, worker work, const void *argument)
{
    struct task *task = find_task(TASK_NONE);
    int ends[2];

    if (!task || pipe2(ends, O_CLOEXEC) != 0)
        return false;
    pid_t pid = fork();
    if (pid == 0) {
        become_child(ends[1]);
        _exit(work(REPORT_FD, argument));
    }
    close(ends[1]);
    if (pid < 0) {
        close(ends[0]);
        return false;
    }
    fcntl(ends[0], F_SETFL, O_NONBLOCK);
    *task = (struct task){.kind = kind, .connection = connection, .pid = pid, .pipe = ends[0]};
    return true;
}

int task_pipe(size_t index)
{
    return tasks[index].kind == TASK_NONE ? -1 : tasks[index].pipe;
}

static void end_function(int status)
{
    char text[64];

    function.state = FUNCTION_EXITED;
    function.status = status;
    describe_status(status, text, sizeof text);
    log_line("function %s", text);
}

static void reply_failure(const struct task *task)
{
    char text[64];

    if (task->report_bytes) {
        enum fault fault = task->report[0] == 'f' ? FAULT_FUNCTION : FAULT_GUEST;
        reply_error(task->connection, fault, "%.*s", (int)task->report_bytes - 1, task->report + 1);
        return;
    }
    describe_status(task->status, text, sizeof text);
    reply_error(task->connection, FAULT_GUEST, "the agent's child %s", text);
}

void reply_woken(uint64_t connection)
{
    reply_ok(connection, "ok%s", mode.in_vm ? "" : " skipped=clock,entropy,hostname");
}

static void reply_success(const struct task *task)
{
    if (task->kind == TASK_RUN && WIFSIGNALED(task->status))
        reply_ok(task->connection, "ok signal=%d", WTERMSIG(task->status));
    else if (task->kind == TASK_RUN)
        reply_ok(task->connection, "ok status=%d", WEXITSTATUS(task->status));
    else if (task->kind == TASK_WAKE)
        reply_woken(task->connection);
    else
        reply_ok(task->connection, "ok");
}

static void begin_function(const struct task *task)
{
    function = (struct function){.state = FUNCTION_RUNNING, .pid = task->pid};
    reply_ok(task->connection, "ok pid=%d", task->pid);
    if (task->ended)
        end_function(task->status);
}

/* Make the reply if the task is over. What a `run` started is over with it. */
static void settle(struct task *task)
{
    bool started = task->kind == TASK_START && !task->report_bytes;

    if (task->pipe >= 0 || !(task->ended || started))
        return;
    if (started)
        begin_function(task);
    else if (task->report_bytes || (task->kind != TASK_RUN && task->status != 0))
        reply_failure(task);
    else
        reply_success(task);
    if (task->kind == TASK_RUN)
        kill(-task->pid, SIGKILL);
    task->kind = TASK_NONE;
}

void read_task_pipe(size_t index)
{
    struct task *task = &tasks[index];
    ssize_t got = read(task->pipe, task->report + task->report_bytes,
                       sizeof task->report - task->report_bytes);

    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (got > 0) {
        task->report_bytes += (size_t)got;
        return;
    }
    close(task->pipe);
    task->pipe = -1;
    settle(task);
}

static void note_end(pid_t pid, int status)
{
    for (size_t i = 0; i < TASKS_MAX; i++) {
        if (tasks[i].kind == TASK_NONE || tasks[i].pid != pid)
            continue;
        tasks[i].ended = true;
        tasks[i].status = status;
        settle(&tasks[i]);
        return;
    }
    if (function.state == FUNCTION_RUNNING && function.pid == pid)
        end_function(status);
}

void reap_children(void)
{
    int status = 0;
    pid_t pid = 0;

    while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
        note_end(pid, status);
}

/* Kill what warm-up commands left running, which would keep the old root in use. Called when
 * nothing else runs; SIGKILL takes effect at once, so the wait is short. */
bool end_leftovers(void)
{
    int64_t deadline_ms = now_ms() + LEFTOVERS_DEADLINE_MS;
    const struct timespec interval = {.tv_nsec = 10 * 1000 * 1000};
    sigset_t children;

    if (!mode.in_vm)
        return true;
    sigemptyset(&children);
    sigaddset(&children, SIGCHLD);
    kill(-1, SIGKILL);
    for (;;) {
        pid_t pid = waitpid(-1, NULL, WNOHANG);
        if (pid < 0)
            return true;
        if (pid == 0 && sigtimedwait(&children, NULL, &interval) < 0 && now_ms() > deadline_ms)
            return false;
    }
}
