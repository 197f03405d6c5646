/* Text to token ids and back: byte-pair merges with byte fallback, over tables built straight from a file's strings.
 *
 * A symbol is a text that merging can see: every token, and any side or product of a merge that is no token. Symbols
 * are numbered, tokens first, so that merging never touches a string: (left, right) -> (rank, product) is one hash.
 * Special tokens are not known here; whoever splits them off sends what lies between. Nothing changes after
 * tokenizer_new, so any number of threads may encode at once. Source: the algorithm of SentencePiece BPE as GGUF
 * stores it; every merge is taken by lowest rank, then leftmost. */

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "abi.h"

enum {
    CODEPOINTS = 0x110000,
    REPLACEMENT = 0xFFFD,
    SPACE_MARK = 0x2581,  /* stands for a space in every text of the file */
    SHORT_WORD = 32,      /* symbols: up to here a linear search for the best merge beats a heap */
    LONGEST_TEXT = 65535, /* bytes */
    MOST_TOKENS = 1 << 20,
    MOST_MERGES = 1 << 22,
};
static const uint32_t NONE = UINT32_MAX; /* no symbol, no rank, no character */
static const uint8_t MARK[3] = {0xE2, 0x96, 0x81}, REPLACED[3] = {0xEF, 0xBF, 0xBD}; /* in UTF-8 */

typedef struct { uint32_t hash, symbol; } text_slot;               /* symbol + 1, 0: free */
typedef struct { uint32_t left, right, rank, product; } pair_slot; /* left + 1, 0: free */
typedef struct { uint32_t rank, product; } merge;

struct tokenizer {
    uint64_t seed; /* of both hashes, so that no file can be made to collide */
    uint32_t tokens, symbols, symbol_room;
    int64_t text_room;
    int64_t longest;  /* bytes of the longest token */
    uint8_t *text;    /* all symbols in UTF-8, one behind the other */
    int64_t *start;   /* [symbols + 1] */
    text_slot *slots; /* [slot_mask + 1] */
    pair_slot *pairs; /* [pair_mask + 1] */
    uint32_t slot_mask, pair_mask;
    uint32_t *chars;      /* [CODEPOINTS] symbol + 1 of one character, 0: none */
    uint8_t *joins_space; /* [CODEPOINTS] some merge has this character just before a space mark */
    int32_t byte_token[256];
};

/* -- UTF-8 --------------------------------------------------------------------------------------------- */

/* Reads one character and returns its bytes; a byte that begins none is NONE, of one byte. */
static inline int32_t read_char(const uint8_t *s, int64_t left, uint32_t *codepoint) {
    uint32_t c = *codepoint = s[0];
    if (c < 0x80) return 1;
    int32_t bytes = c >= 0xF0 ? 4 : c >= 0xE0 ? 3 : 2;
    static const uint32_t least[5] = {0, 0, 0x80, 0x800, 0x10000};
    if (c >= 0xC2 && c <= 0xF4 && bytes <= left) {
        c &= 0x7Fu >> bytes;
        int32_t i = 1;
        for (; i < bytes && (s[i] & 0xC0) == 0x80; i++) c = c << 6 | (s[i] & 0x3F);
        if (i == bytes && c >= least[bytes] && c < CODEPOINTS && (c < 0xD800 || c > 0xDFFF)) {
            *codepoint = c;
            return bytes;
        }
    }
    *codepoint = NONE;
    return 1;
}

static bool is_utf8(const uint8_t *s, int64_t bytes) {
    uint32_t c = 0;
    for (int64_t at = 0; at < bytes && c != NONE;) at += read_char(s + at, bytes - at, &c);
    return c != NONE;
}

static uint32_t last_char(const uint8_t *s, int64_t bytes) {
    int64_t at = bytes - 1;
    uint32_t c;
    while (at > 0 && (s[at] & 0xC0) == 0x80) at--;
    read_char(s + at, bytes - at, &c);
    return c;
}

/* -- Tables -------------------------------------------------------------------------------------------- */

static inline uint64_t fold(uint64_t a, uint64_t b) {
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static uint32_t hash_text(uint64_t seed, const uint8_t *s, int64_t bytes) {
    uint64_t h = seed ^ (uint64_t)bytes, part;
    for (; bytes > 8; s += 8, bytes -= 8) {
        memcpy(&part, s, 8);
        h = fold(h ^ part, seed | 1);
    }
    part = 0;
    memcpy(&part, s, (size_t)bytes);
    return (uint32_t)fold(h ^ part, seed | 1);
}

static inline uint32_t hash_pair(const tokenizer *t, uint32_t left, uint32_t right) {
    return (uint32_t)fold(((uint64_t)left << 32 | right) ^ t->seed, 0x9E3779B97F4A7C15u) & t->pair_mask;
}

/* The slot of a text, or the free one where it belongs. */
static text_slot *find_slot(const tokenizer *t, uint32_t hash, const uint8_t *s, int64_t bytes) {
    for (uint32_t i = hash & t->slot_mask;; i = (i + 1) & t->slot_mask) {
        text_slot *slot = &t->slots[i];
        if (slot->symbol == 0) return slot;
        if (slot->hash != hash) continue;
        const int64_t *start = &t->start[slot->symbol - 1];
        if (start[1] - start[0] == bytes && memcmp(t->text + start[0], s, (size_t)bytes) == 0) return slot;
    }
}

static uint32_t find_text(const tokenizer *t, const uint8_t *s, int64_t bytes) {
    return find_slot(t, hash_text(t->seed, s, bytes), s, bytes)->symbol - 1;
}

/* Twice the slots; texts stay where they are. */
static bool grow_slots(tokenizer *t) {
    uint32_t old_size = t->slot_mask + 1, mask = 2 * old_size - 1;
    text_slot *slots = calloc((size_t)mask + 1, sizeof *slots);
    if (!slots) return false;
    for (uint32_t i = 0; i < old_size; i++) {
        if (t->slots[i].symbol == 0) continue;
        uint32_t at = t->slots[i].hash & mask;
        while (slots[at].symbol) at = (at + 1) & mask;
        slots[at] = t->slots[i];
    }
    free(t->slots);
    t->slots = slots;
    t->slot_mask = mask;
    return true;
}

static bool make_room(tokenizer *t, int64_t bytes) {
    if (t->symbols + 1 >= t->symbol_room) {
        int64_t *start = realloc(t->start, 2 * (size_t)t->symbol_room * sizeof *start);
        if (!start) return false;
        t->start = start;
        t->symbol_room *= 2;
    }
    if (t->start[t->symbols] + bytes > t->text_room) {
        uint8_t *text = realloc(t->text, 2 * (size_t)t->text_room + (size_t)bytes);
        if (!text) return false;
        t->text = text;
        t->text_room = 2 * t->text_room + bytes;
    }
    return 2 * (uint64_t)t->symbols < t->slot_mask || grow_slots(t);
}

/* The number of a text, a new one if it has none yet. */
static int32_t intern(tokenizer *t, uint32_t hash, const uint8_t *s, int64_t bytes, uint32_t *symbol) {
    *symbol = find_slot(t, hash, s, bytes)->symbol - 1;
    if (*symbol != NONE) return VOCABULARY_OK;
    if (!is_utf8(s, bytes)) return VOCABULARY_NOT_UTF8;
    if (!make_room(t, bytes)) return VOCABULARY_NO_MEMORY;
    int64_t *start = &t->start[t->symbols];
    memcpy(t->text + start[0], s, (size_t)bytes);
    start[1] = start[0] + bytes;
    *symbol = t->symbols++;
    *find_slot(t, hash, s, bytes) = (text_slot){hash, t->symbols};
    uint32_t first;
    if (read_char(s, bytes, &first) == bytes) t->chars[first] = t->symbols;
    return VOCABULARY_OK;
}

static merge find_merge(const tokenizer *t, uint32_t left, uint32_t right) {
    for (uint32_t i = hash_pair(t, left, right);; i = (i + 1) & t->pair_mask) {
        const pair_slot *p = &t->pairs[i];
        if (p->left == 0) return (merge){NONE, NONE};
        if (p->left == left + 1 && p->right == right) return (merge){p->rank, p->product};
    }
}

/* Of equal pairs the first counts. */
static void keep_merge(tokenizer *t, uint32_t left, uint32_t right, uint32_t rank, uint32_t product) {
    uint32_t i = hash_pair(t, left, right);
    for (; t->pairs[i].left; i = (i + 1) & t->pair_mask)
        if (t->pairs[i].left == left + 1 && t->pairs[i].right == right) return;
    t->pairs[i] = (pair_slot){left + 1, right, rank, product};
}

/* -- Building ------------------------------------------------------------------------------------------ */

/* Whether every string lies in the data; where: i, or -1 - i for merges. */
static int32_t check(const string_array *a, bool merges, int64_t *where) {
    for (int64_t i = 0; i < a->count; i++) {
        int64_t start = a->starts[i], length = a->lengths[i];
        *where = merges ? -1 - i : i;
        if (start < 0 || length < 0 || start > a->data_bytes || length > a->data_bytes - start)
            return VOCABULARY_OUT_OF_FILE;
        if (length > LONGEST_TEXT) return VOCABULARY_TOO_LONG;
    }
    return VOCABULARY_OK;
}

static int32_t read_tokens(tokenizer *t, const string_array *tokens, int64_t *where) {
    for (int64_t i = 0; i < tokens->count; i++) {
        const uint8_t *s = tokens->data + tokens->starts[i];
        const int64_t bytes = tokens->lengths[i];
        uint32_t symbol;
        *where = i;
        if (bytes == 0) return VOCABULARY_EMPTY;
        int32_t status = intern(t, hash_text(t->seed, s, bytes), s, bytes, &symbol);
        if (status != VOCABULARY_OK) return status;
        if (symbol != i) return VOCABULARY_DUPLICATE;
        if (bytes > t->longest) t->longest = bytes;
    }
    for (int32_t byte = 0; byte < 256; byte++) {
        char name[8];
        *where = byte;
        snprintf(name, sizeof name, "<0x%02X>", (unsigned)byte);
        uint32_t symbol = find_text(t, (const uint8_t *)name, 6);
        if (symbol == NONE) return VOCABULARY_NO_BYTE;
        t->byte_token[byte] = (int32_t)symbol;
    }
    return VOCABULARY_OK;
}

/* A merge as the file spells it; left NULL: it names no pair and can never apply. */
typedef struct {
    const uint8_t *left, *right;
    int64_t left_bytes, right_bytes;
    uint32_t hash[3]; /* of left, right and both joined */
} entry;

static int64_t join(const entry *e, uint8_t *joined) {
    memcpy(joined, e->left, (size_t)e->left_bytes);
    memcpy(joined + e->left_bytes, e->right, (size_t)e->right_bytes);
    return e->left_bytes + e->right_bytes;
}

/* Parts "left right" at the first space after the first byte, and asks early for slots that are in no cache. */
static entry part(const tokenizer *t, const uint8_t *s, int64_t bytes, uint8_t *joined) {
    const uint8_t *space = bytes > 2 ? memchr(s + 1, ' ', (size_t)bytes - 2) : NULL;
    if (!space) return (entry){0};
    entry e = {s, space + 1, space - s, s + bytes - space - 1, {0}};
    e.hash[0] = hash_text(t->seed, e.left, e.left_bytes);
    e.hash[1] = hash_text(t->seed, e.right, e.right_bytes);
    e.hash[2] = hash_text(t->seed, joined, join(&e, joined));
    for (int32_t i = 0; i < 3; i++) __builtin_prefetch(&t->slots[e.hash[i] & t->slot_mask]);
    return e;
}

static int32_t read_merges(tokenizer *t, const string_array *merges, int64_t *where) {
    enum { AHEAD = 32 }; /* entries; a power of two */
    uint8_t joined[LONGEST_TEXT];
    entry ahead[AHEAD];
    for (int64_t i = -AHEAD; i < merges->count; i++) {
        const int64_t coming = i + AHEAD;
        const entry e = i < 0 ? (entry){0} : ahead[i % AHEAD];
        if (coming < merges->count)
            ahead[coming % AHEAD] = part(t, merges->data + merges->starts[coming], merges->lengths[coming], joined);
        if (!e.left) continue;
        uint32_t left, right, product;
        int32_t status;
        *where = -1 - i;
        if ((status = intern(t, e.hash[0], e.left, e.left_bytes, &left)) ||
            (status = intern(t, e.hash[1], e.right, e.right_bytes, &right)) ||
            (status = intern(t, e.hash[2], joined, join(&e, joined), &product)))
            return status;
        keep_merge(t, left, right, (uint32_t)i, product);
        if (e.right_bytes >= 3 && memcmp(e.right, MARK, 3) == 0) t->joins_space[last_char(e.left, e.left_bytes)] = 1;
    }
    return VOCABULARY_OK;
}

static uint32_t twice(int64_t count) {
    uint32_t size = 1024;
    while (size < 2 * count + 2) size *= 2;
    return size;
}

int32_t tokenizer_new(const string_array *tokens, const string_array *merges, uint64_t seed, tokenizer **made,
                      int64_t *where) {
    *made = NULL;
    *where = 0;
    if (tokens->count < 0 || tokens->count > MOST_TOKENS || merges->count < 0 || merges->count > MOST_MERGES)
        return VOCABULARY_TOO_BIG;
    int32_t status;
    if ((status = check(tokens, false, where)) || (status = check(merges, true, where))) return status;
    tokenizer *t = calloc(1, sizeof *t);
    if (!t) return VOCABULARY_NO_MEMORY;
    t->seed = seed;
    t->tokens = (uint32_t)tokens->count;
    t->symbol_room = t->tokens + 2;
    t->text_room = 16 * (int64_t)t->symbol_room;
    t->slot_mask = twice(tokens->count) - 1;
    t->pair_mask = twice(merges->count) - 1;
    t->text = malloc((size_t)t->text_room);
    t->start = calloc(t->symbol_room, sizeof *t->start);
    t->slots = calloc((size_t)t->slot_mask + 1, sizeof *t->slots);
    t->pairs = calloc((size_t)t->pair_mask + 1, sizeof *t->pairs);
    t->chars = calloc(CODEPOINTS, sizeof *t->chars);
    t->joins_space = calloc(CODEPOINTS, 1);
    if (!t->text || !t->start || !t->slots || !t->pairs || !t->chars || !t->joins_space) status = VOCABULARY_NO_MEMORY;
    if (status || (status = read_tokens(t, tokens, where)) || (status = read_merges(t, merges, where)))
        tokenizer_free(t);
    else *made = t;
    return status;
}

void tokenizer_free(tokenizer *t) {
    if (!t) return;
    free(t->text);
    free(t->start);
    free(t->slots);
    free(t->pairs);
    free(t->chars);
    free(t->joins_space);
    free(t);
}

int32_t tokenizer_find(const tokenizer *t, const uint8_t *text, int64_t bytes) {
    uint32_t symbol = bytes > t->longest ? NONE : find_text(t, text, bytes);
    return symbol < t->tokens ? (int32_t)symbol : -1;
}

const uint8_t *tokenizer_text(const tokenizer *t, int32_t token, int64_t *bytes) {
    if (token < 0 || (uint32_t)token >= t->tokens) return NULL;
    *bytes = t->start[token + 1] - t->start[token];
    return t->text + t->start[token];
}

/* -- Encoding ------------------------------------------------------------------------------------------ */

/* A symbol of the word being merged, and its merge with the next one. */
typedef struct {
    uint32_t symbol, from;
    merge with_next;
} piece; /* from: its first byte in the text */

typedef struct {
    const tokenizer *t;
    const uint8_t *text;
    int64_t bytes;
    int32_t *ids;
    int64_t room, count; /* count goes on where the room ends */
    piece *pieces;
    int64_t piece_room;
} encoder;

static inline void emit(encoder *e, int32_t id) {
    if (e->count < e->room) e->ids[e->count] = id;
    e->count++;
}

/* A symbol's token; or, as it has none, one token for each byte of what it stands for. */
static void emit_symbol(encoder *e, uint32_t symbol, int64_t from, int64_t to) {
    if (symbol < e->t->tokens) {
        emit(e, (int32_t)symbol);
        return;
    }
    while (from < to) {
        uint32_t c;
        const uint8_t *s = e->text + from;
        int32_t bytes = read_char(s, to - from, &c);
        from += bytes;
        if (c == ' ' || c == NONE) {
            s = c == ' ' ? MARK : REPLACED;
            bytes = 3;
        }
        for (int32_t i = 0; i < bytes; i++) emit(e, e->t->byte_token[s[i]]);
    }
}

static void merge_short(encoder *e, int64_t n, int64_t end) {
    piece *p = e->pieces;
    for (;;) {
        int64_t best = 0;
        for (int64_t i = 1; i < n; i++)
            if (p[i].with_next.rank < p[best].with_next.rank) best = i;
        if (p[best].with_next.rank == NONE) break;
        p[best].symbol = p[best].with_next.product;
        n--;
        memmove(&p[best + 1], &p[best + 2], (size_t)(n - best - 1) * sizeof *p);
        p[best].with_next = best + 1 < n ? find_merge(e->t, p[best].symbol, p[best + 1].symbol) : (merge){NONE, NONE};
        if (best > 0) p[best - 1].with_next = find_merge(e->t, p[best - 1].symbol, p[best].symbol);
    }
    for (int64_t i = 0; i < n; i++) emit_symbol(e, p[i].symbol, p[i].from, i + 1 < n ? p[i + 1].from : end);
}

/* Adds a place's merge, if it has one, to a heap of (rank, place): least is the lowest rank, then leftmost. */
static void push(uint64_t *heap, int64_t *size, const piece *p, int32_t place) {
    if (p[place].with_next.rank == NONE) return;
    const uint64_t key = (uint64_t)p[place].with_next.rank << 32 | (uint32_t)place;
    int64_t i = (*size)++;
    for (; i > 0 && heap[(i - 1) / 2] > key; i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
    heap[i] = key;
}

static uint64_t pop(uint64_t *heap, int64_t *size) {
    const uint64_t least = heap[0], moving = heap[--*size];
    int64_t i = 0;
    for (int64_t child = 1; child < *size; i = child, child = 2 * i + 1) {
        child += child + 1 < *size && heap[child + 1] < heap[child];
        if (heap[child] >= moving) break;
        heap[i] = heap[child];
    }
    heap[i] = moving;
    return least;
}

/* The same by a heap, for words of any length. An entry is stale once its piece would merge at another rank. */
static bool merge_long(encoder *e, int64_t n, int64_t end) {
    typedef struct { int32_t previous, next; } link;
    piece *p = e->pieces;
    link *links = malloc((size_t)n * sizeof *links);
    uint64_t *heap = malloc(2 * (size_t)n * sizeof *heap); /* a merge takes one entry and adds at most two */
    if (!links || !heap) {
        free(links);
        free(heap);
        return false;
    }
    int64_t size = 0;
    for (int32_t i = 0; i < n; i++) {
        links[i] = (link){i - 1, i + 1 < n ? i + 1 : -1};
        push(heap, &size, p, i);
    }
    while (size > 0) {
        const uint64_t key = pop(heap, &size);
        const int32_t left = (int32_t)(uint32_t)key;
        if (p[left].with_next.rank != key >> 32) continue;
        const int32_t right = links[left].next, next = links[right].next, previous = links[left].previous;
        p[left].symbol = p[left].with_next.product;
        p[left].with_next = next < 0 ? (merge){NONE, NONE} : find_merge(e->t, p[left].symbol, p[next].symbol);
        p[right].with_next.rank = NONE;
        links[left].next = next;
        if (next >= 0) links[next].previous = left;
        push(heap, &size, p, left);
        if (previous < 0) continue;
        p[previous].with_next = find_merge(e->t, p[previous].symbol, p[left].symbol);
        push(heap, &size, p, previous);
    }
    for (int32_t i = 0; i >= 0; i = links[i].next)
        emit_symbol(e, p[i].symbol, p[i].from, links[i].next < 0 ? end : p[links[i].next].from);
    free(links);
    free(heap);
    return true;
}

/* Adds the character at `at` to the word. */
static bool append(encoder *e, int64_t n, uint32_t codepoint, int64_t at) {
    if (n == e->piece_room) {
        piece *pieces = realloc(e->pieces, 2 * (size_t)e->piece_room * sizeof *pieces);
        if (!pieces) return false;
        e->pieces = pieces;
        e->piece_room *= 2;
    }
    e->pieces[n] = (piece){e->t->chars[codepoint] - 1, (uint32_t)at, {NONE, NONE}};
    if (n > 0) e->pieces[n - 1].with_next = find_merge(e->t, e->pieces[n - 1].symbol, e->pieces[n].symbol);
    return true;
}

/* Encodes from `at` to a place that no merge crosses, returns that place; -1: no memory.
 * Newlines are words of their own. Within a line, the first merge across a place would join a symbol that ends there
 * with one that begins there; so before a space mark none does unless joins_space has the character before it. */
static int64_t encode_word(encoder *e, int64_t at) {
    const bool newlines = e->text[at] == '\n';
    const int64_t from = at;
    int64_t n = 0;
    for (uint32_t c, previous = 0; at < e->bytes && (e->text[at] == '\n') == newlines; previous = c, n++) {
        const int32_t width = read_char(e->text + at, e->bytes - at, &c);
        c = c == ' ' ? SPACE_MARK : c == NONE ? REPLACEMENT : c;
        if (c == SPACE_MARK && n > 0 && !e->t->joins_space[previous]) break;
        if (!append(e, n, c, at)) return -1;
        at += width;
    }
    int32_t run = newlines ? tokenizer_find(e->t, e->text + from, at - from) : -1;
    if (run >= 0) emit(e, run);
    else if (n <= SHORT_WORD) merge_short(e, n, at);
    else if (!merge_long(e, n, at)) return -1;
    return at;
}

int64_t tokenizer_encode(const tokenizer *t, const uint8_t *text, int64_t bytes, int32_t *ids, int64_t room) {
    if (bytes < 0 || bytes > INT32_MAX) return -1;
    encoder e = {t, text, bytes, ids, room, 0, malloc(2 * SHORT_WORD * sizeof(piece)), 2 * SHORT_WORD};
    int64_t at = e.pieces ? 0 : -1;
    while (at >= 0 && at < bytes) at = encode_word(&e, at);
    free(e.pieces);
    return at < 0 ? -1 : e.count;
}
