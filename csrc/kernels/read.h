/* What memory gives at most: every line read in order, 1 KiB after it was asked for, and next to nothing done with it. */
static uint64_t K(read)(const uint8_t *data, int64_t bytes) {
    uint64_t sum[8] = {0};
    for (int64_t i = 0; i < bytes / 64; i++) {
        const uint64_t *line = (const uint64_t *)(data + 64 * i);
        K(prefetch)(line + 128);
        for (int j = 0; j < 8; j++) sum[j] += line[j];
    }
    for (int j = 1; j < 8; j++) sum[0] += sum[j];
    return sum[0];
}
