/* The end of a guest in order: every process gets SIGTERM, later SIGKILL; once all are gone the
 * scratch disk is unmounted, so that its file system is clean without a journal replay. On a host,
 * for tests, only the function's process group is ended. */
#include "guest.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>

static struct {
    enum { STOP_NONE, STOP_ENDING, STOP_UNMOUNTING } state;
    bool killed;
    uint64_t connection;
    int64_t deadline_ms;
} stop;

bool is_stopping(void)
{
    return stop.state != STOP_NONE;
}

/* Whether the processes still have to end: the poll loop then calls advance_stop() regularly. */
bool stop_waits(void)
{
    return stop.state == STOP_ENDING;
}

static void signal_processes(int signal_number)
{
    if (mode.in_vm)
        kill(-1, signal_number);
    else if (function.state == FUNCTION_RUNNING)
        kill(-function.pid, signal_number);
}

static bool all_ended(void)
{
    siginfo_t information;

    if (!mode.in_vm)
        return function.state != FUNCTION_RUNNING;
    return waitid(P_ALL, 0, &information, WEXITED | WNOHANG | WNOWAIT) != 0 && errno == ECHILD;
}

static int work_unmount(int report_fd, const void *argument)
{
    char problem[MESSAGE_BYTES / 2];

    (void)argument;
    if (!mode.in_vm || unmount_disks(problem, sizeof problem))
        return EXIT_SUCCESS;
    report(report_fd, FAULT_GUEST, "%s", problem);
    return EXIT_FAILURE;
}

void begin_stop(uint64_t connection, int64_t deadline_ms)
{
    stop.state = STOP_ENDING;
    stop.connection = connection;
    stop.deadline_ms = deadline_ms;
    signal_processes(SIGTERM);
    advance_stop();
}

void advance_stop(void)
{
    if (stop.state != STOP_ENDING)
        return;
    if (all_ended()) {
        stop.state = STOP_UNMOUNTING;
        if (!begin_task(TASK_STOP, stop.connection, work_unmount, NULL))
            reply_error(stop.connection, FAULT_GUEST, "no child could be started");
    } else if (!stop.killed && now_ms() >= stop.deadline_ms) {
        stop.killed = true;
        signal_processes(SIGKILL);
    }
}
