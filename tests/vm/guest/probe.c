/* The only program of the test image. By the name or words it is called with:
 *
 *   probe exit N            end with status N
 *   probe note FILE TEXT    append a line to a file
 *   probe serve             function: answers each connection on $PORT, one command a line
 *   (as a wake hook)        append its name and instance id to /hooks, end with the status in /bad
 *
 * Commands of serve: cat FILE, note FILE TEXT, hostname, time, exit N.
 */
#define _GNU_SOURCE
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static void note(const char *path, const char *text)
{
    FILE *file = fopen(path, "ae");
    if (!file)
        exit(70);
    fprintf(file, "%s\n", text);
    fclose(file);
}

static void cat(FILE *out, const char *path)
{
    char buffer[4096];
    size_t got;
    FILE *file = fopen(path, "re");
    if (!file) {
        fprintf(out, "no such file\n");
        return;
    }
    while ((got = fread(buffer, 1, sizeof buffer, file)) > 0)
        fwrite(buffer, 1, got, out);
    fclose(file);
}

static void answer(FILE *out, char *line)
{
    char *rest = NULL;
    char *verb = strtok_r(line, " \n", &rest);
    char *first = strtok_r(NULL, " \n", &rest);
    char *second = strtok_r(NULL, "\n", &rest);
    char name[128] = "";
    struct timespec now;

    if (!strcmp(verb, "cat"))
        cat(out, first);
    else if (!strcmp(verb, "note"))
        note(first, second);
    else if (!strcmp(verb, "exit"))
        exit(atoi(first));
    else if (!strcmp(verb, "hostname") && gethostname(name, sizeof name) == 0)
        fprintf(out, "%s\n", name);
    else if (!strcmp(verb, "time") && clock_gettime(CLOCK_REALTIME, &now) == 0)
        fprintf(out, "%lld\n", (long long)now.tv_sec * 1000000000 + now.tv_nsec);
}

static void serve(void)
{
    struct sockaddr_in any = {.sin_family = AF_INET,
                              .sin_port = htons((unsigned short)atoi(getenv("PORT")))};
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    char line[1024];

    printf("probe serves\n");
    fflush(stdout);
    if (bind(listener, (struct sockaddr *)&any, sizeof any) || listen(listener, 16))
        exit(71);
    for (;;) {
        FILE *stream = fdopen(accept(listener, NULL, NULL), "r+");
        if (stream && fgets(line, sizeof line, stream)) {
            fseek(stream, 0, SEEK_CUR);
            answer(stream, line);
        }
        if (stream)
            fclose(stream);
    }
}

static int hook(const char *name)
{
    char text[256];
    char status[8] = "0";
    FILE *bad = fopen("/bad", "re");

    snprintf(text, sizeof text, "%s %s", name, getenv("TORPOR_INSTANCE_ID"));
    note("/hooks", text);
    if (bad)
        fgets(status, sizeof status, bad);
    return atoi(status);
}

int main(int argc, char **argv)
{
    if (argc == 1)
        return hook(strrchr(argv[0], '/') + 1);
    if (!strcmp(argv[1], "serve"))
        serve();
    if (!strcmp(argv[1], "note"))
        note(argv[2], argv[3]);
    return argc > 2 && !strcmp(argv[1], "exit") ? atoi(argv[2]) : 0;
}
