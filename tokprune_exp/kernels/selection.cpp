// What removing tokens takes besides arithmetic: which rows stay, and copies of them.

#include <cstdint>
#include <cstring>

// Keep the rows whose received attention, divided by `norm` or, if that is 0, by the rows of their sequence, exceeds the
// threshold, and the protected ones. Importances and the mask are spread over the grid (sequences, width); `places` are
// the rows' positions on it. Returns how many rows stay: their indices, positions and starts are what is left.
extern "C" long choose_above(const float* received, const int64_t* places, const int32_t* starts, int sequences,
                             long width, const uint8_t* is_protected, float threshold, float norm, float* importance,
                             uint8_t* alive, int64_t* kept, int64_t* kept_places, int32_t* kept_starts) {
    std::memset(importance, 0, sizeof(float) * sequences * width);
    std::memset(alive, 0, static_cast<size_t>(sequences) * width);
    long count = 0;
    for (int s = 0; s < sequences; ++s) {
        kept_starts[s] = static_cast<int32_t>(count);
        const float divisor = norm > 0 ? norm : static_cast<float>(starts[s + 1] - starts[s]);
        for (long row = starts[s]; row < starts[s + 1]; ++row) {
            const int64_t place = places[row];
            const float value = received[row] / divisor;
            importance[place] = value;
            if (value > threshold || is_protected[place]) {
                alive[place] = 1;
                kept[count] = row;
                kept_places[count++] = place;
            }
        }
    }
    kept_starts[sequences] = static_cast<int32_t>(count);
    return count;
}

// Copy the kept rows of two tensors and fill what follows them with zeros, up to `rows` rows.
extern "C" void gather_two(const int64_t* kept, long count, long rows, const char* first, long first_bytes,
                           const char* second, long second_bytes, char* first_out, char* second_out) {
#pragma omp parallel for if (count * (first_bytes + second_bytes) > 1 << 20)
    for (long i = 0; i < count; ++i) {
        std::memcpy(first_out + i * first_bytes, first + kept[i] * first_bytes, first_bytes);
        std::memcpy(second_out + i * second_bytes, second + kept[i] * second_bytes, second_bytes);
    }
    std::memset(first_out + count * first_bytes, 0, (rows - count) * first_bytes);
    std::memset(second_out + count * second_bytes, 0, (rows - count) * second_bytes);
}
