/* A bounded fuzzer of the agent's parser (engine/runtimes/vm/guest/frame.c): frames and words, right ones mutated.
   Usage: agent TURNS SEED. Built with sanitizers, which end it at a finding; see agent.py. */
#include "agent.h"

static uint64_t state;
static uint32_t chance(uint32_t below) { /* xorshift64* */
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (uint32_t)((state * 0x2545f4914f6cdd1dull) >> 33) % below;
}

static const char *const keys[] = {"id", "argv", "caps", "rlimit", "mount", "size", "uid", "part", "flags", "from", "data", "xattr", "", "="};
static const char *const values[] = {"", "1", "-1", "ff", "18446744073709551616", "a=b", "/dev/vda", "0x10", "99999999999", "-"};

static const char *key(void) { return keys[chance(300) ? chance(12) : 12 + chance(2)]; } /* the last two are none */

static uint32_t word(char *at, const char *text, uint32_t size) {
    memcpy(at, &size, 4);
    memcpy(at + 4, text, size);
    return 4 + size;
}

static uint32_t request(char *out) {
    char text[256];
    uint32_t used = word(out, "RUN", 3);
    for (uint32_t n = chance(40); n; n--) {
        int size = snprintf(text, sizeof text, "%s=%s%c%s%c%s", key(), values[chance(10)], 0, values[chance(10)], 0, values[chance(10)]);
        used += word(out + used, text, chance(4) ? (uint32_t)size : 5 + chance(size));
    }
    return used;
}

static void look(struct words *words) {
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        uint32_t length;
        long long out;
        char *value;
        struct part part[5];
        int at = 1;
        number_of(words, keys[i], chance(2) ? 10 : 16, -1, &out);
        while ((value = next_value(words, keys[i], &at, &length))) {
            if (value[length]) abort(); /* each ends with a NUL */
            struct part rest;
            if (!named(value, length, &rest) && (rest.at <= value || rest.at + rest.length != value + length || rest.at[-1])) abort();
            int count = parts_of(value, length, part, 5);
            for (int n = 0; n < count && n < 5; n++)
                if (part[n].at + part[n].length > value + length || part[n].at[part[n].length]) abort();
        }
    }
}

int main(int argc, char **argv) {
    long turns = argc > 1 ? atol(argv[1]) : 100000;
    state = argc > 2 ? strtoull(argv[2], NULL, 10) * 2 + 1 : 1;
    static struct words words;
    static struct answer answer;
    long accepted = 0;
    for (long turn = 0; turn < turns; turn++) {
        char draft[16384];
        uint32_t length = request(draft);
        for (uint32_t n = chance(2) ? 0 : chance(4); n; n--) {
            if (chance(2)) draft[chance(length)] = chance(256);
            else length -= chance(length < 16 ? length : 16);
        }
        char *payload = malloc(length + 1); /* exact: one byte past its end is a finding */
        memcpy(payload, draft, length);
        if (length && !split_words(payload, length, &words)) {
            accepted++;
            look(&words);
        }
        struct header header;
        for (size_t i = 0; i < sizeof header; i++) ((char *)&header)[i] = chance(3) ? chance(10) : chance(256);
        if (!check_header(&header) && header.length > MAX_PAYLOAD) abort();
        answer_begin(&answer);
        for (uint32_t n = chance(8); n; n--) answer_add(&answer, key(), draft, chance(turn % 64 ? sizeof draft : MAX_PAYLOAD + 9) % sizeof draft);
        if (answer_end(&answer, 1, 0) > MAX_FRAME) abort();
        free(payload);
    }
    printf("%ld requests, %ld of them right\n", turns, accepted);
    return accepted ? 0 : 1;
}
