/* Requests and replies as lines: a verb, then key=value pairs, every value percent-encoded. */
#include "guest.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int hex_digit(char digit)
{
    if (digit >= '0' && digit <= '9')
        return digit - '0';
    digit = (char)tolower((unsigned char)digit);
    return digit >= 'a' && digit <= 'f' ? digit - 'a' + 10 : -1;
}

/* Decode in place; false for a broken escape and for NUL, which no argument can carry. */
static bool decode_value(char *value)
{
    char *out = value;

    for (const char *in = value; *in; in++) {
        if (*in != '%') {
            *out++ = *in;
            continue;
        }
        int high = hex_digit(in[1]);
        int low = high < 0 ? -1 : hex_digit(in[2]);
        if (low < 0 || (high == 0 && low == 0))
            return false;
        *out++ = (char)(high * 16 + low);
        in += 2;
    }
    *out = '\0';
    return true;
}

static bool is_word(const char *text)
{
    if (!*text)
        return false;
    for (; *text; text++)
        if (!islower((unsigned char)*text) && !isdigit((unsigned char)*text) && *text != '_')
            return false;
    return true;
}

static bool add_field(struct request *request, char *pair, char *problem, size_t problem_bytes)
{
    char *equals = strchr(pair, '=');

    if (!equals) {
        snprintf(problem, problem_bytes, "'%.40s' is not a key=value pair", pair);
        return false;
    }
    *equals = '\0';
    if (!is_word(pair) || !decode_value(equals + 1)) {
        snprintf(problem, problem_bytes, "field '%.40s' cannot be decoded", pair);
        return false;
    }
    if (request->count == FIELDS_MAX) {
        snprintf(problem, problem_bytes, "more than %d fields", FIELDS_MAX);
        return false;
    }
    request->fields[request->count++] = (struct field){.key = pair, .value = equals + 1};
    return true;
}

/* Take `line` (no newline) apart in place. The request points into it. */
bool parse_request(char *line, struct request *request, char *problem, size_t problem_bytes)
{
    char *rest = NULL;
    char *word = strtok_r(line, " ", &rest);

    request->count = 0;
    if (!word || !is_word(word)) {
        snprintf(problem, problem_bytes, "not a request");
        return false;
    }
    request->verb = word;
    while ((word = strtok_r(NULL, " ", &rest)))
        if (!add_field(request, word, problem, problem_bytes))
            return false;
    return true;
}

/* The first value of `key`, or NULL. */
const char *field_value(const struct request *request, const char *key)
{
    for (size_t i = 0; i < request->count; i++)
        if (strcmp(request->fields[i].key, key) == 0)
            return request->fields[i].value;
    return NULL;
}

bool parse_number(const char *text, uint64_t maximum, uint64_t *number)
{
    if (!text || !isdigit((unsigned char)*text) || strlen(text) > 19)
        return false;
    char *end = NULL;
    *number = strtoull(text, &end, 10);
    return *end == '\0' && *number <= maximum;
}

/* Percent-encode as much of `value` as fits; returns the length, without the final NUL. */
size_t encode_value(const char *value, char *out, size_t out_bytes)
{
    size_t length = 0;

    for (; *value && length + 4 <= out_bytes; value++) {
        unsigned char byte = (unsigned char)*value;
        if (byte < 128 && (isalnum(byte) || strchr("-._~/:,@+", byte)))
            out[length++] = (char)byte;
        else
            length += (size_t)sprintf(out + length, "%%%02X", byte);
    }
    out[length] = '\0';
    return length;
}
