/* Frames and words: what comes from the host is checked before it is used. No system calls: a fuzzer drives this file. */
#include "agent.h"

const char *check_header(const struct header *h) {
    if (h->zero) return "a reserved field is not 0";
    if (!h->stream) return "a frame on stream 0";
    if (h->flag) return "a flag that is not 0";
    switch (h->type) {
    case REQ: return h->length < 5 || h->length > MAX_PAYLOAD ? "the length of a REQ" : NULL;
    case DATA: return h->length < 1 || h->length > BULK ? "the length of a DATA" : NULL;
    case END: return h->length ? "the length of an END" : NULL;
    case CREDIT: return h->length != 4 ? "the length of a CREDIT" : NULL;
    case PING: return h->length > MAX_PING ? "the length of a PING" : NULL;
    default: return "the type of a frame";
    }
}

const char *split_words(char *payload, uint32_t length, struct words *words) {
    uint32_t at = 0, size;
    char *end = NULL; /* of the word before: its NUL goes where the next length was, once that is read */
    words->count = 0;
    while (at < length) {
        if (words->count == MAX_WORDS) return "too many words";
        if (length - at < 4) return "bytes after the last word";
        memcpy(&size, payload + at, 4);
        at += 4;
        if (size > length - at) return "a word longer than its payload";
        if (end) *end = 0;
        words->at[words->count] = payload + at;
        words->length[words->count++] = size;
        at += size;
        end = payload + at;
    }
    if (!words->count) return "no words";
    *end = 0;
    for (int i = 0; i < words->count; i++) {
        char *equals = memchr(words->at[i], '=', words->length[i]);
        if (i == 0 ? words->length[0] == 0 || words->length[0] > 32 : !equals || equals == words->at[i])
            return i ? "a word that is not key=value" : "the length of the verb";
    }
    return NULL;
}

char *next_value(struct words *words, const char *key, int *at, uint32_t *length) {
    size_t size = strlen(key);
    for (int i = *at < 1 ? 1 : *at; i < words->count; i++) {
        if (words->length[i] <= size || memcmp(words->at[i], key, size) || words->at[i][size] != '=') continue;
        *at = i + 1;
        if (length) *length = words->length[i] - size - 1;
        return words->at[i] + size + 1;
    }
    *at = words->count;
    return NULL;
}

char *value_of(struct words *words, const char *key, uint32_t *length) {
    int at = 1;
    return next_value(words, key, &at, length);
}

int number(const char *text, int base, long long *out) {
    char *end;
    if (!*text || strspn(text, "-0123456789abcdefABCDEF") != strlen(text)) return EINVAL;
    errno = 0;
    unsigned long long value = *text == '-' ? (unsigned long long)strtoll(text, &end, base) : strtoull(text, &end, base);
    if (errno || *end) return EINVAL;
    *out = (long long)value;
    return 0;
}

int number_of(struct words *words, const char *key, int base, long long fallback, long long *out) {
    char *value = value_of(words, key, NULL);
    if (!value) return *out = fallback, 0;
    return number(value, base, out);
}

int parts_of(char *value, uint32_t length, struct part *parts, int most) {
    int count = 0;
    char *end = value + length;
    for (;;) {
        char *stop = memchr(value, 0, end - value);
        if (count == most) return most + 1;
        parts[count++] = (struct part){value, (stop ? stop : end) - value};
        if (!stop) return count;
        value = stop + 1;
    }
}

int named(char *value, uint32_t length, struct part *rest) {
    char *stop = memchr(value, 0, length);
    if (!stop || stop == value) return EINVAL;
    *rest = (struct part){stop + 1, value + length - stop - 1};
    return 0;
}

void answer_begin(struct answer *answer) {
    answer->used = sizeof(struct header) + 4;
    answer->overflow = 0;
}

void answer_add(struct answer *answer, const char *key, const void *data, size_t length) {
    uint32_t name = strlen(key), size = name + 1 + length;
    if (length > MAX_PAYLOAD || size + 4 > sizeof answer->frame - answer->used) {
        answer->overflow = 1;
        return;
    }
    char *at = answer->frame + answer->used;
    memcpy(at, &size, 4);
    memcpy(at + 4, key, name);
    at[4 + name] = '=';
    memcpy(at + 5 + name, data, length);
    answer->used += 4 + size;
}

void answer_text(struct answer *answer, const char *key, const char *format, ...) {
    char text[4096];
    va_list list;
    va_start(list, format);
    int size = vsnprintf(text, sizeof text, format, list);
    va_end(list);
    answer_add(answer, key, text, size < (int)sizeof text ? size : (int)sizeof text - 1);
}

uint32_t answer_end(struct answer *answer, uint32_t stream, int error) {
    if (answer->overflow) { /* the words that did fit would be half an answer */
        answer_begin(answer);
        answer_text(answer, "step", "the answer is too large");
        error = EMSGSIZE;
    }
    struct header header = {answer->used - sizeof header, stream, RESP, 0, 0};
    int32_t number = error;
    memcpy(answer->frame, &header, sizeof header);
    memcpy(answer->frame + sizeof header, &number, 4);
    return answer->used;
}
