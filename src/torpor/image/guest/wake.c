/* The work of `wake`, in a child: clock, entropy, names, then the function's hooks. A clone must
 * not serve before all of it is done. */
#include "guest.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/pidfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define HOOKS "etc/torpor/wake.d" /* these paths are relative to the function's root */
#define HOOK_TIMEOUT_MS 10000
#define HOSTS_MARK "# torpor"

static int fail(int report_fd, const char *what)
{
    report(report_fd, FAULT_GUEST, "%s: %s", what, strerror(errno));
    return EXIT_FAILURE;
}

/* 0, or -1 with errno set. */
int set_clock(uint64_t time_ns)
{
    struct timespec now = {.tv_sec = (time_t)(time_ns / 1000000000),
                           .tv_nsec = (long)(time_ns % 1000000000)};

    return clock_settime(CLOCK_REALTIME, &now);
}

/* Credit the host's bytes to the pool and reseed at once: the next random number in this guest
 * depends on them (random(4)). */
static int add_entropy(int report_fd, const struct wake *wake)
{
    struct {
        int entropy_count;
        int buf_size;
        unsigned char bytes[sizeof wake->entropy];
    } pool = {.entropy_count = (int)wake->entropy_bytes * 8, .buf_size = (int)wake->entropy_bytes};
    int fd = open("/dev/urandom", O_WRONLY | O_CLOEXEC);

    memcpy(pool.bytes, wake->entropy, wake->entropy_bytes);
    if (fd < 0 || ioctl(fd, RNDADDENTROPY, &pool) != 0 || ioctl(fd, RNDRESEEDCRNG) != 0)
        return fail(report_fd, "entropy");
    return close(fd);
}

/* A reader sees the old file or the new one, never half of one. */
static int replace_file(int report_fd, const char *path, const char *text)
{
    char temporary[128];

    snprintf(temporary, sizeof temporary, "%s.torpor", path);
    int fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0)
        return fail(report_fd, path);
    bool written = write(fd, text, strlen(text)) == (ssize_t)strlen(text);
    if (close(fd) != 0 || !written || rename(temporary, path) != 0)
        return fail(report_fd, path);
    return 0;
}

/* The hosts file without an earlier host name of ours, and with the one given. */
static int write_hosts(int report_fd, const char *hostname)
{
    char *text = NULL;
    char *line = NULL;
    size_t size = 0;
    size_t line_bytes = 0;
    bool has_localhost = false;
    FILE *old = fopen("etc/hosts", "re");
    FILE *new = open_memstream(&text, &size);

    while (old && getline(&line, &line_bytes, old) > 0) {
        if (strstr(line, HOSTS_MARK))
            continue;
        has_localhost = has_localhost || strstr(line, "localhost");
        line[strcspn(line, "\n")] = '\0';
        fprintf(new, "%s\n", line);
    }
    if (!has_localhost)
        fprintf(new, "127.0.0.1 localhost\n::1 localhost\n");
    fprintf(new, GUEST_ADDRESS " %s " HOSTS_MARK "\n", hostname);
    fclose(new);
    if (old)
        fclose(old);
    return replace_file(report_fd, "etc/hosts", text);
}

/* Host name and instance id as files below the working directory, which is the function's root. */
int write_identity(int report_fd, const struct identity *identity)
{
    char text[sizeof identity->instance + 1];

    mkdir("etc", 0755);
    mkdir("run", 0755);
    mkdir("run/torpor", 0755);
    snprintf(text, sizeof text, "%s\n", identity->instance);
    if (replace_file(report_fd, "run/torpor/instance-id", text) != 0)
        return EXIT_FAILURE;
    snprintf(text, sizeof text, "%s\n", identity->hostname);
    if (replace_file(report_fd, "etc/hostname", text) != 0)
        return EXIT_FAILURE;
    return write_hosts(report_fd, identity->hostname);
}

static void exec_hook(const char *path)
{
    setsid();
    execl(path, path, (char *)NULL);
    dprintf(STDERR_FILENO, "torpor: wake hook %s: %s\n", path, strerror(errno));
    _exit(127);
}

static int run_hook(int report_fd, const char *path)
{
    char text[64];
    int status = 0;
    pid_t pid = fork();

    if (pid == 0)
        exec_hook(path);
    int fd = pid < 0 ? -1 : pidfd_open(pid, 0);
    if (fd < 0)
        return fail(report_fd, path);
    struct pollfd ending = {.fd = fd, .events = POLLIN};
    bool in_time = poll(&ending, 1, HOOK_TIMEOUT_MS) > 0;
    if (!in_time)
        kill(-pid, SIGKILL);
    close(fd);
    waitpid(pid, &status, 0);
    describe_status(status, text, sizeof text);
    if (!in_time)
        report(report_fd, FAULT_FUNCTION, "wake hook /%s did not end within %d s", path,
               HOOK_TIMEOUT_MS / 1000);
    else if (status != 0)
        report(report_fd, FAULT_FUNCTION, "wake hook /%s %s", path, text);
    return in_time ? status : EXIT_FAILURE;
}

static int is_visible(const struct dirent *entry)
{
    return entry->d_name[0] != '.';
}

static bool is_executable(const char *path)
{
    struct stat found;

    return stat(path, &found) == 0 && S_ISREG(found.st_mode) && access(path, X_OK) == 0;
}

static int run_hooks(int report_fd, const char *instance)
{
    char path[512];
    struct dirent **entries = NULL;
    int count = scandir(HOOKS, &entries, is_visible, alphasort);

    if (count < 0 && errno != ENOENT)
        return fail(report_fd, HOOKS);
    clearenv();
    setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 1);
    setenv("TORPOR_INSTANCE_ID", instance, 1);
    for (int i = 0; i < count; i++) {
        snprintf(path, sizeof path, HOOKS "/%s", entries[i]->d_name);
        if (is_executable(path) && run_hook(report_fd, path) != 0)
            return EXIT_FAILURE;
    }
    return 0;
}

static int change_kernel(int report_fd, const struct wake *wake)
{
    const char *hostname = wake->identity.hostname;

    if (set_clock(wake->time_ns) != 0)
        return fail(report_fd, "clock");
    if (add_entropy(report_fd, wake) != 0)
        return EXIT_FAILURE;
    return sethostname(hostname, strlen(hostname)) == 0 ? 0 : fail(report_fd, "host name");
}

int wake_up(int report_fd, const void *argument)
{
    const struct wake *wake = argument;

    umask(022);
    if ((mode.in_vm && change_kernel(report_fd, wake) != 0) || enter_root(report_fd) != 0
        || write_identity(report_fd, &wake->identity) != 0)
        return EXIT_FAILURE;
    return run_hooks(report_fd, wake->identity.instance);
}
