/* Who listens on a TCP port, from /proc/net/tcp and /proc/net/tcp6 (proc(5)).
 *
 * An address stands there as groups of eight hexadecimal digits, each a 32-bit word in the byte
 * order of the host (little-endian: the only one torpor runs on).
 */
#include "guest.h"

#include <stdio.h>
#include <string.h>

#define STATE_LISTEN 0x0A

static bool is_reachable(const char *address)
{
    static const char *const found[] = {
        "00000000",                         /* 0.0.0.0 */
        "020010AC",                         /* 172.16.0.2 */
        "00000000000000000000000000000000", /* :: */
        "0000000000000000FFFF000000000000", /* ::ffff:0.0.0.0 */
        "0000000000000000FFFF0000020010AC", /* ::ffff:172.16.0.2 */
    };

    for (size_t i = 0; i < sizeof found / sizeof *found; i++)
        if (strcmp(address, found[i]) == 0)
            return true;
    return false;
}

static enum listening search(const char *path, uint16_t port)
{
    enum listening result = LISTENING_NOWHERE;
    char line[512];
    FILE *table = fopen(path, "re");

    if (!table)
        return result;
    while (result != LISTENING && fgets(line, sizeof line, table)) {
        char address[33];
        unsigned int local_port = 0;
        unsigned int state = 0;
        if (sscanf(line, " %*d: %32[0-9A-F]:%X %*[0-9A-F]:%*X %X", address, &local_port, &state)
            == 3 && local_port == port && state == STATE_LISTEN)
            result = is_reachable(address) ? LISTENING : LISTENING_LOOPBACK;
    }
    fclose(table);
    return result;
}

/* Whether the port can be reached from outside, only from inside, or not at all. */
enum listening find_listener(uint16_t port)
{
    enum listening found = search("/proc/net/tcp", port);

    if (found == LISTENING)
        return found;
    enum listening found6 = search("/proc/net/tcp6", port);
    return found6 == LISTENING_NOWHERE ? found : found6;
}
