/* What a clone needs before it may serve: clock, entropy, names, then the function's hooks.
 *
 * The names are files of a file system in memory that is at /run/torpor of every root; /etc/hostname
 * and /etc/hosts are links to two of them. So the agent gives a clone its names itself, and a child,
 * which has the function's root, is for hooks and for links that are missing. A process and files on
 * the scratch disk would be most of what a wake costs where processors are emulated.
 */
#include "guest.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/openat2.h>
#include <linux/random.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/pidfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define HOOKS "etc/torpor/wake.d" /* these paths are relative to the function's root */
#define NAMES_INSIDE "run/torpor"
#define HOOK_TIMEOUT_MS 10000
#define HOSTS_MARK "# torpor"

static const char *const linked_names[] = {"hostname", "hosts"};
#define LINKED_NAMES (sizeof linked_names / sizeof *linked_names)

/* 0, or -1 with errno set. */
int set_clock(uint64_t time_ns)
{
    struct timespec now = {.tv_sec = (time_t)(time_ns / 1000000000),
                           .tv_nsec = (long)(time_ns % 1000000000)};

    return clock_settime(CLOCK_REALTIME, &now);
}

/* Credit the host's bytes to the pool and reseed at once: the next random number in this guest
 * depends on them (random(4)). 0, or -1 with errno set. */
static int add_entropy(const struct wake *wake)
{
    struct {
        int entropy_count;
        int buf_size;
        unsigned char bytes[sizeof wake->entropy];
    } pool = {.entropy_count = (int)wake->entropy_bytes * 8, .buf_size = (int)wake->entropy_bytes};
    int fd = open("/dev/urandom", O_WRONLY | O_CLOEXEC);

    if (fd < 0)
        return -1;
    memcpy(pool.bytes, wake->entropy, wake->entropy_bytes);
    int result = ioctl(fd, RNDADDENTROPY, &pool) == 0 ? ioctl(fd, RNDRESEEDCRNG) : -1;
    close(fd);
    return result;
}

/* What fails, with errno set, or NULL. */
static const char *change_kernel(const struct wake *wake)
{
    const char *hostname = wake->identity.hostname;

    if (set_clock(wake->time_ns) != 0)
        return "clock";
    if (add_entropy(wake) != 0)
        return "entropy";
    return sethostname(hostname, strlen(hostname)) == 0 ? NULL : "host name";
}

/* A reader sees the old file or the new one, never half of one. What the function may have put there
 * is neither followed nor waited for: this is not always a child. 0, or -1 with errno set. */
static int replace_file(int directory, const char *name, const char *text)
{
    char temporary[64];
    ssize_t length = (ssize_t)strlen(text);

    snprintf(temporary, sizeof temporary, ".%s", name);
    unlinkat(directory, temporary, 0);
    int fd = openat(directory, temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (fd < 0)
        return -1;
    ssize_t written = write(fd, text, strlen(text));
    close(fd);
    if (written == length)
        return renameat(directory, temporary, directory, name);
    if (written >= 0)
        errno = ENOSPC;
    return -1;
}

/* The hosts file `old`, which is closed if there is one, without an earlier host name of ours and with
 * this one. 0, or -1 with errno set. */
static int write_hosts(int names, int old, const char *hostname)
{
    char *text = NULL;
    char *line = NULL;
    size_t size = 0;
    size_t line_bytes = 0;
    bool has_localhost = false;
    FILE *from = old < 0 ? NULL : fdopen(old, "re");
    FILE *to = open_memstream(&text, &size);

    while (from && getline(&line, &line_bytes, from) > 0) {
        if (strstr(line, HOSTS_MARK))
            continue;
        has_localhost = has_localhost || strstr(line, "localhost");
        line[strcspn(line, "\n")] = '\0';
        fprintf(to, "%s\n", line);
    }
    if (!has_localhost)
        fprintf(to, "127.0.0.1 localhost\n::1 localhost\n");
    fprintf(to, GUEST_ADDRESS " %s " HOSTS_MARK "\n", hostname);
    fclose(to);
    if (from)
        fclose(from);
    int result = replace_file(names, "hosts", text);
    free(line);
    free(text);
    return result;
}

static int open_names(void)
{
    char path[PATH_MAX];

    if (mode.in_vm)
        return open(NAMES, O_PATH | O_DIRECTORY | O_CLOEXEC);
    snprintf(path, sizeof path, "%s/run", mode.root);
    mkdir(path, 0755);
    snprintf(path, sizeof path, "%s/" NAMES_INSIDE, mode.root);
    mkdir(path, 0755);
    return open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
}

/* The hosts file in a directory, or -1; of what else there may be of that name nothing. */
static int open_hosts(int directory)
{
    struct stat found;
    int fd = openat(directory, "hosts", O_RDONLY | O_NONBLOCK | O_CLOEXEC | O_NOFOLLOW);

    if (fd >= 0 && (fstat(fd, &found) != 0 || !S_ISREG(found.st_mode))) {
        close(fd);
        return -1;
    }
    return fd;
}

/* 0, or -1 with errno set. */
static int write_names(const struct identity *identity)
{
    char text[sizeof identity->instance + 1];
    int names = open_names();

    if (names < 0)
        return -1;
    snprintf(text, sizeof text, "%s\n", identity->instance);
    int result = replace_file(names, "instance-id", text);
    snprintf(text, sizeof text, "%s\n", identity->hostname);
    if (result == 0)
        result = replace_file(names, "hostname", text);
    if (result == 0)
        result = write_hosts(names, open_hosts(names), identity->hostname);
    int why = errno;
    close(names);
    errno = why;
    return result;
}

/* What of a wake needs no child. What fails, with errno set, or NULL. */
const char *wake_up(const struct wake *wake)
{
    const char *failed = mode.in_vm ? change_kernel(wake) : NULL;

    if (!failed && write_names(&wake->identity) != 0)
        failed = "names in /" NAMES_INSIDE;
    return failed;
}

static void target_of(const char *name, char *target, size_t target_bytes)
{
    snprintf(target, target_bytes, "../" NAMES_INSIDE "/%s", name);
}

static bool is_linked(int etc, const char *name)
{
    char wanted[64];
    char found[64];

    target_of(name, wanted, sizeof wanted);
    ssize_t length = readlinkat(etc, name, found, sizeof found);
    return length == (ssize_t)strlen(wanted) && memcmp(found, wanted, (size_t)length) == 0;
}

/* A directory of the function's root, found as from inside it (openat2(2)). */
static int open_in_root(const char *path)
{
    struct open_how how = {.flags = O_PATH | O_DIRECTORY | O_CLOEXEC, .resolve = RESOLVE_IN_ROOT};
    int root = open(mode.root, O_PATH | O_DIRECTORY | O_CLOEXEC);
    int found = (int)syscall(SYS_openat2, root, path, &how, sizeof how);
    int why = errno;

    if (root >= 0)
        close(root);
    errno = why;
    return found;
}

/* Whether there are hooks, or a link is missing. */
bool wake_needs_child(void)
{
    int hooks = open_in_root(HOOKS);
    bool needs = hooks >= 0 || errno != ENOENT;
    int etc = needs ? -1 : open_in_root("etc");

    for (size_t i = 0; i < LINKED_NAMES; i++)
        needs = needs || !is_linked(etc, linked_names[i]);
    if (hooks >= 0)
        close(hooks);
    if (etc >= 0)
        close(etc);
    return needs;
}

static int fail(int report_fd, const char *what)
{
    report(report_fd, FAULT_GUEST, "%s: %s", what, strerror(errno));
    return EXIT_FAILURE;
}

static int link_name(int etc, const char *name)
{
    char target[64];
    char temporary[64];

    target_of(name, target, sizeof target);
    snprintf(temporary, sizeof temporary, ".%s.torpor", name);
    unlinkat(etc, temporary, 0);
    if (symlinkat(target, etc, temporary) != 0)
        return -1;
    return renameat(etc, temporary, etc, name);
}

/* Make the links that are missing; a hosts file that is there, the image's or one that the function
 * has put there, goes on with our line. */
static int link_names(int report_fd, const char *hostname)
{
    mkdir("etc", 0755);
    int etc = open("etc", O_PATH | O_DIRECTORY | O_CLOEXEC);
    int names = open(NAMES_INSIDE, O_PATH | O_DIRECTORY | O_CLOEXEC);

    for (size_t i = 0; i < LINKED_NAMES; i++) {
        const char *name = linked_names[i];
        if (is_linked(etc, name))
            continue;
        int old = strcmp(name, "hosts") == 0 ? openat(etc, name, O_RDONLY | O_CLOEXEC) : -1;
        if ((old >= 0 && write_hosts(names, old, hostname) != 0) || link_name(etc, name) != 0)
            return fail(report_fd, name);
    }
    close(etc);
    close(names);
    return 0;
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

/* The rest of a wake, in a child. */
int finish_wake(int report_fd, const void *argument)
{
    const struct wake *wake = argument;

    umask(022);
    if (enter_root(report_fd) != 0 || link_names(report_fd, wake->identity.hostname) != 0)
        return EXIT_FAILURE;
    return run_hooks(report_fd, wake->identity.instance);
}
