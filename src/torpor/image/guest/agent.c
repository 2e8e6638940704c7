/* Connections and the poll loop: one thread that never waits for a client or for a child.
 *
 * A connection has at most one request under way; what it sent after that stays unread until the
 * reply is out. A line longer than LINE_BYTES is skipped and answered by an error. When all places
 * are taken, the connection that has been idle for longest gives way, then the one that has waited
 * for a port for longest: its other end may have been gone since before the snapshot that this
 * guest woke from.
 */
#include "guest.h"

#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <unistd.h>

#define CONNECTIONS_MAX 16
_Static_assert(TASKS_MAX < CONNECTIONS_MAX, "tasks must not take all places");
#define POLL_INTERVAL_MS 20

struct connection {
    uint64_t id; /* 0: the place is free */
    int fd;
    bool busy;       /* a request is under way */
    bool discarding; /* inside a line that was too long */
    bool ended;      /* the other side sends no more */
    uint16_t await_port;
    int64_t await_deadline_ms;
    int64_t used_ms;
    size_t in_bytes;
    size_t out_bytes;
    char in[LINE_BYTES];
    char out[REPLY_BYTES];
};

static struct connection connections[CONNECTIONS_MAX];
static uint64_t last_id;

static struct connection *find_connection(uint64_t id)
{
    for (size_t i = 0; i < CONNECTIONS_MAX; i++)
        if (id && connections[i].id == id)
            return &connections[i];
    return NULL;
}

static void drop(struct connection *connection)
{
    close(connection->fd);
    connection->id = 0;
}

static void flush(struct connection *connection)
{
    ssize_t sent = send(connection->fd, connection->out, connection->out_bytes, MSG_NOSIGNAL);

    if (sent < 0) {
        if (errno != EAGAIN && errno != EINTR)
            drop(connection);
        return;
    }
    connection->out_bytes -= (size_t)sent;
    memmove(connection->out, connection->out + sent, connection->out_bytes);
}

static void put_reply(uint64_t id, const char *line, size_t length)
{
    struct connection *connection = find_connection(id);

    if (!connection)
        return;
    connection->busy = false;
    connection->await_port = 0;
    connection->used_ms = now_ms();
    memcpy(connection->out, line, length);
    connection->out_bytes = length;
    flush(connection);
}

/* The values in `format`'s arguments must be encoded already. */
void reply_ok(uint64_t connection, const char *format, ...)
{
    char line[REPLY_BYTES];
    va_list arguments;

    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line - 1, format, arguments);
    va_end(arguments);
    size_t used = (size_t)length < sizeof line - 1 ? (size_t)length : sizeof line - 2;
    line[used++] = '\n';
    put_reply(connection, line, used);
}

void reply_error(uint64_t connection, enum fault fault, const char *format, ...)
{
    char message[MESSAGE_BYTES];
    char encoded[3 * MESSAGE_BYTES];
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    encode_value(message, encoded, sizeof encoded);
    reply_ok(connection, "error %s%s", encoded, fault == FAULT_FUNCTION ? " fault=function" : "");
}

/* Answer the connection's `await` later: answer_await() is asked again and again. */
void hold_for_port(uint64_t id, uint16_t port, int64_t deadline_ms)
{
    struct connection *connection = find_connection(id);

    if (!connection)
        return;
    connection->await_port = port;
    connection->await_deadline_ms = deadline_ms;
}

static void handle_line(struct connection *connection, char *line)
{
    static struct request request;
    char problem[128];

    connection->busy = true;
    connection->used_ms = now_ms();
    if (parse_request(line, &request, problem, sizeof problem))
        handle_request(connection->id, &request);
    else
        reply_error(connection->id, FAULT_GUEST, "%s", problem);
}

static void consume(struct connection *connection, size_t length)
{
    connection->in_bytes -= length;
    memmove(connection->in, connection->in + length, connection->in_bytes);
}

/* Take one line or one overlong piece from what was read; false when there is none yet. */
static bool take_line(struct connection *connection)
{
    static char line[LINE_BYTES];
    char *newline = memchr(connection->in, '\n', connection->in_bytes);
    size_t length = newline ? (size_t)(newline - connection->in) + 1 : connection->in_bytes;

    if (!newline) {
        if (connection->discarding || connection->in_bytes == LINE_BYTES) {
            connection->discarding = true;
            connection->in_bytes = 0;
        }
        return false;
    }
    memcpy(line, connection->in, length);
    line[length - 1] = '\0';
    consume(connection, length);
    if (connection->discarding) {
        connection->discarding = false;
        reply_error(connection->id, FAULT_GUEST, "line is longer than %d bytes", LINE_BYTES);
    } else if (memchr(line, '\0', length - 1)) {
        reply_error(connection->id, FAULT_GUEST, "line has a NUL byte");
    } else {
        handle_line(connection, line);
    }
    return true;
}

/* Do all that the connection allows now: send, then requests while none is under way. */
static void advance(struct connection *connection)
{
    uint64_t id = connection->id;

    if (connection->out_bytes)
        flush(connection);
    while (connection->id == id && !connection->busy && !connection->out_bytes
           && take_line(connection))
        ;
    if (connection->id == id && connection->ended && !connection->busy && !connection->out_bytes)
        drop(connection);
}

static void receive(struct connection *connection)
{
    ssize_t got = recv(connection->fd, connection->in + connection->in_bytes,
                       LINE_BYTES - connection->in_bytes, 0);

    if (got > 0)
        connection->in_bytes += (size_t)got;
    else if (got == 0)
        connection->ended = true;
    else if (errno != EAGAIN && errno != EINTR)
        drop(connection);
}

static void handle_events(struct connection *connection, short events)
{
    if (events & POLLIN)
        receive(connection);
    else if (events & (POLLERR | POLLHUP))
        drop(connection);
}

static short wanted_events(const struct connection *connection)
{
    bool reads = !connection->busy && !connection->ended && !connection->out_bytes
                 && connection->in_bytes < LINE_BYTES;

    return (short)((reads ? POLLIN : 0) | (connection->out_bytes ? POLLOUT : 0));
}

/* Whether `one` is to give way rather than `other`: the idle before those that wait for a port, to
 * whom a lost reply costs nothing but asking again; then the one that was used longer ago. */
static bool yields_before(const struct connection *one, const struct connection *other)
{
    if (!other || one->busy != other->busy)
        return !other || !one->busy;
    return one->used_ms < other->used_ms;
}

/* A free place, made by dropping a connection if need be. Tasks are fewer than places, so there is
 * always one that may go. */
static struct connection *make_place(void)
{
    struct connection *oldest = NULL;

    for (size_t i = 0; i < CONNECTIONS_MAX; i++) {
        struct connection *connection = &connections[i];
        if (!connection->id)
            return connection;
        if ((!connection->busy || connection->await_port) && yields_before(connection, oldest))
            oldest = connection;
    }
    if (oldest)
        drop(oldest);
    return oldest;
}

/* In a VM only the host may ask: what runs in the guest could be made to send requests for others.
 */
static bool is_welcome(const struct sockaddr_in *peer)
{
    return !mode.in_vm || peer->sin_addr.s_addr == inet_addr(GATEWAY_ADDRESS);
}

static void accept_connection(int listener)
{
    struct sockaddr_in peer = {0};
    socklen_t length = sizeof peer;
    int fd = accept4(listener, (struct sockaddr *)&peer, &length, SOCK_CLOEXEC | SOCK_NONBLOCK);

    if (fd < 0)
        return;
    struct connection *place = is_welcome(&peer) ? make_place() : NULL;
    if (!place) {
        close(fd);
        return;
    }
    place->id = ++last_id;
    place->fd = fd;
    place->busy = place->discarding = place->ended = false;
    place->await_port = 0;
    place->used_ms = now_ms();
    place->in_bytes = place->out_bytes = 0;
}

int open_listener(const char *address, uint16_t port)
{
    struct sockaddr_in bound = {.sin_family = AF_INET, .sin_port = htons(port)};
    socklen_t length = sizeof bound;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int)) != 0
        || inet_pton(AF_INET, address, &bound.sin_addr) != 1
        || bind(fd, (struct sockaddr *)&bound, sizeof bound) != 0 || listen(fd, 64) != 0
        || getsockname(fd, (struct sockaddr *)&bound, &length) != 0)
        die("agent cannot listen on %s:%d: %s", address, port, strerror(errno));
    log_line("agent listens on %s:%d", address, ntohs(bound.sin_port));
    return fd;
}

static void check_awaits(void)
{
    for (size_t i = 0; i < CONNECTIONS_MAX; i++) {
        struct connection *connection = &connections[i];
        if (connection->id && connection->await_port)
            answer_await(connection->id, connection->await_port, connection->await_deadline_ms);
    }
}

static bool any_await(void)
{
    for (size_t i = 0; i < CONNECTIONS_MAX; i++)
        if (connections[i].id && connections[i].await_port)
            return true;
    return false;
}

static int open_child_signals(void)
{
    sigset_t children;

    sigemptyset(&children);
    sigaddset(&children, SIGCHLD);
    sigprocmask(SIG_BLOCK, &children, NULL);
    int fd = signalfd(-1, &children, SFD_CLOEXEC | SFD_NONBLOCK);
    if (fd < 0)
        die("signalfd: %s", strerror(errno));
    return fd;
}

static void handle_child_signals(int fd)
{
    struct signalfd_siginfo information;

    while (read(fd, &information, sizeof information) > 0)
        ;
    reap_children();
}

/* The places in the poll set: listener, signals, tasks, connections. */
enum { AT_LISTENER, AT_SIGNALS, AT_TASKS, AT_CONNECTIONS = AT_TASKS + TASKS_MAX };
#define POLLED (AT_CONNECTIONS + CONNECTIONS_MAX)

static void fill_poll_set(struct pollfd *set, int listener, int signals)
{
    set[AT_LISTENER] = (struct pollfd){.fd = listener, .events = POLLIN};
    set[AT_SIGNALS] = (struct pollfd){.fd = signals, .events = POLLIN};
    for (size_t i = 0; i < TASKS_MAX; i++)
        set[AT_TASKS + i] = (struct pollfd){.fd = task_pipe(i), .events = POLLIN};
    for (size_t i = 0; i < CONNECTIONS_MAX; i++) {
        const struct connection *connection = &connections[i];
        set[AT_CONNECTIONS + i] = (struct pollfd){.fd = connection->id ? connection->fd : -1,
                                                  .events = wanted_events(connection)};
    }
}

static void handle_poll_set(const struct pollfd *set)
{
    for (size_t i = 0; i < CONNECTIONS_MAX; i++)
        if (set[AT_CONNECTIONS + i].fd >= 0 && set[AT_CONNECTIONS + i].revents)
            handle_events(&connections[i], set[AT_CONNECTIONS + i].revents);
    for (size_t i = 0; i < TASKS_MAX; i++)
        if (set[AT_TASKS + i].revents)
            read_task_pipe(i);
    if (set[AT_SIGNALS].revents)
        handle_child_signals(set[AT_SIGNALS].fd);
    check_awaits();
    advance_stop();
    for (size_t i = 0; i < CONNECTIONS_MAX; i++)
        if (connections[i].id)
            advance(&connections[i]);
    if (set[AT_LISTENER].revents)
        accept_connection(set[AT_LISTENER].fd);
}

void serve(int listener)
{
    static struct pollfd set[POLLED];
    int signals = open_child_signals();

    for (;;) {
        fill_poll_set(set, listener, signals);
        if (poll(set, POLLED, any_await() || stop_waits() ? POLL_INTERVAL_MS : -1) >= 0)
            handle_poll_set(set);
    }
}
