/* PID 1 of a torpor guest: boots, then serves the agent's protocol for ever.
 *
 *   init                              in a VM
 *   init --agent ADDRESS:PORT --root DIR   on a host, for tests; port 0 takes a free one
 */
#include "guest.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <time.h>
#include <unistd.h>

struct mode mode = {.in_vm = true, .root = ROOT};

static void log_arguments(const char *format, va_list arguments)
{
    char text[MESSAGE_BYTES];

    vsnprintf(text, sizeof text, format, arguments);
    dprintf(STDERR_FILENO, "torpor: %s\n", text);
}

/* One line on the console. */
void log_line(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    log_arguments(format, arguments);
    va_end(arguments);
}

/* Say why on the console and end: in a VM by a reset, which the VMM reports as its end. */
void die(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    log_arguments(format, arguments);
    va_end(arguments);
    if (mode.in_vm)
        reboot(RB_AUTOBOOT);
    exit(EXIT_FAILURE);
}

int64_t now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static int open_test_listener(int argc, char **argv)
{
    if (argc != 5 || strcmp(argv[1], "--agent") != 0 || strcmp(argv[3], "--root") != 0)
        die("usage: init --agent ADDRESS:PORT --root DIR");
    char *colon = strrchr(argv[2], ':');
    uint64_t port = 0;
    if (!colon || !parse_number(colon + 1, UINT16_MAX, &port))
        die("not ADDRESS:PORT: %s", argv[2]);
    *colon = '\0';
    mode = (struct mode){.in_vm = false, .root = argv[4]};
    /* Orphans come to us as they would to PID 1, and we end with the test that started us. */
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    return open_listener(argv[2], (uint16_t)port);
}

int main(int argc, char **argv)
{
    signal(SIGPIPE, SIG_IGN);
    /* The kernel passes words of its command line that it does not know on to PID 1. */
    if (getpid() != 1 || (argc > 1 && strcmp(argv[1], "--agent") == 0))
        serve(open_test_listener(argc, argv));
    boot();
    serve(open_listener(GUEST_ADDRESS, AGENT_PORT));
}
