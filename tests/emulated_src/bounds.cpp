// Every kernel on memory that ends where it may be touched last, under the address sanitizer.
//
// With an argument one of the buffers is that many bytes short, and with a second one another begins that many bytes later,
// at an address that its values cannot be read from. Either has to be reported.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

extern "C" {
int dsp_quantise_bucket(const void* const*, const int64_t*, const int64_t*, const int*, int64_t, int64_t, int64_t,
                        void*, void*, int64_t, int, void*);
int dsp_dequantise_bucket(const void*, const void*, void* const*, const int64_t*, int64_t, int64_t, int, int64_t, int,
                          void*);
int dsp_dequantise_sum(const void*, const void*, void* const*, const int64_t*, int64_t, int64_t, float, int, int64_t,
                       int, void*);
int dsp_quantised_linear(const void*, const void*, const void*, const void*, void*, int64_t, int64_t, int64_t, int64_t,
                         int, int, void*);
int dsp_copy_in(const void* const*, const int64_t*, const int64_t*, int64_t, int64_t, void*, void*);
int dsp_copy_out(const void*, void* const*, const int64_t*, const int64_t*, int64_t, int64_t, void*);
int dsp_adamw(void* const*, const void* const*, void* const*, void* const*, const int64_t*, const int*, const int*,
              int64_t, int64_t, double, double, double, double, double, int, int64_t, void*);
int dsp_adamw_8bit(void* const*, const void* const*, void* const*, void* const*, void* const*, void* const*,
                   const int64_t*, const int*, const int*, int64_t, int64_t, double, double, double, double, double, int,
                   int64_t, void*);
int dsp_sort_experts_space(int64_t, int64_t, int64_t*);
int dsp_sort_experts(const void*, int, int64_t, int64_t, void*, void*, void*, void*);
int dsp_spread_experts(const void*, const void*, const void*, int, void*, int64_t, int64_t, int64_t, int, void*);
int dsp_unpermute_experts(const void*, const void*, const void*, int, void*, int64_t, int64_t, int64_t, int, void*);
}

int main(int count, char** arguments) {
  const size_t missing = count > 1 ? atoi(arguments[1]) : 0, late = count > 2 ? atoi(arguments[2]) : 0;
  const int bits[] = {8, 4, 8, 8, 6};
  const int64_t chunks = 3, blocks[] = {16, 48, 256, 1024, 2048, 4096};
  int calls = 0;
  for (int64_t block : blocks) {
    const int64_t sizes[] = {2 * block + 3, 1}, row_blocks = 4;
    const int64_t values[] = {chunks * sizes[0] - 5, 2};
    for (int format = 0; format < 5; ++format) {
      for (int dtype = 0; dtype < 3; ++dtype) {
        const size_t bytes = dtype == 0 ? 4 : 2;
        void *from[2], *whole[2], *sums[2];
        for (int i = 0; i < 2; ++i) {
          from[i] = calloc(values[i], bytes);
          whole[i] = malloc(chunks * sizes[i] * bytes);
          sums[i] = malloc(sizes[i] * bytes);
        }
        const int dtypes[] = {dtype, dtype};
        void* codes = malloc(chunks * row_blocks * block * bits[format] / 8);
        void* scales = malloc(chunks * row_blocks * 4 - missing);
        const int failed =
            dsp_quantise_bucket(from, values, sizes, dtypes, 2, chunks, 3, codes, scales, block, format, nullptr) ||
            dsp_dequantise_bucket(codes, scales, whole, sizes, 2, chunks, dtype, block, format, nullptr) ||
            dsp_dequantise_sum(codes, scales, sums, sizes, 2, chunks, 1.f, dtype, block, format, nullptr);
        if (failed) return 1;
        calls += 3;
        for (int i = 0; i < 2; ++i) {
          free(from[i]);
          free(whole[i]);
          free(sums[i]);
        }
        free(codes);
        free(scales);
      }
    }
  }
  const int64_t weights[][3] = {{1, 1, 16}, {5, 40, 16}, {6, 100, 48}, {2, 2100, 2112}};  // outputs, columns, group
  for (const auto& [outputs, columns, group] : weights) {
    const int64_t groups = (columns + group - 1) / group, filled = (columns + 15) / 16 * 16;
    for (int format = 0; format < 5; ++format) {
      for (int dtype = 0; dtype < 3; ++dtype) {
        for (int64_t rows : {1, 2, 3, 5, 16}) {
          const size_t bytes = dtype == 0 ? 4 : 2;
          void *x = calloc(rows * filled, bytes), *codes = calloc(outputs * groups, group * bits[format] / 8);
          void *scales = calloc(outputs * groups * 4 + late, 1), *bias = calloc(outputs, bytes);
          void *out = malloc(rows * outputs * bytes), *by = static_cast<char*>(scales) + late;
          if (dsp_quantised_linear(x, codes, by, bias, out, rows, outputs, columns, group, dtype, format, nullptr))
            return 1;
          ++calls;
          for (void* buffer : {x, codes, scales, bias, out}) free(buffer);
        }
      }
    }
  }
  const int64_t copied[] = {1, 16, 100, 16384, 16400};
  for (int64_t bytes : copied) {
    const int64_t whole = chunks * bytes - 1;
    void *from = calloc(whole, 1), *buffer = malloc(chunks * bytes), *back = malloc(whole);
    const int failed = dsp_copy_in(&from, &whole, &bytes, 1, chunks, buffer, nullptr) ||
                       dsp_copy_out(buffer, &back, &whole, &bytes, 1, chunks, nullptr) || memcmp(from, back, whole);
    if (failed) return 1;
    calls += 2;
    free(from);
    free(buffer);
    free(back);
  }
  const int64_t shapes[][4] = {{1, 1, 1, 8}, {129, 3, 5, 7}, {30, 2, 400, 2100}};  // tokens, top_k, experts, hidden
  for (const auto& [tokens, top_k, num_experts, hidden] : shapes) {
    const int64_t assignments = tokens * top_k;
    for (int dtype = 0; dtype < 3; ++dtype) {
      const size_t bytes = dtype == 0 ? 4 : 2;
      int64_t space_values = 0;
      if (dsp_sort_experts_space(assignments, num_experts, &space_values)) return 1;
      auto* experts = static_cast<int32_t*>(malloc(assignments * 4));
      for (int64_t i = 0; i < assignments; ++i) experts[i] = static_cast<int32_t>(i % (num_experts + 2)) - 1;
      void *space = malloc(space_values * 4), *positions = malloc(assignments * 4), *ends = malloc(num_experts * 4);
      void *x = calloc(tokens * hidden, bytes), *rows = malloc(assignments * hidden * bytes);
      void* weights = calloc(assignments, bytes);
      const int failed =
          dsp_sort_experts(experts, 0, assignments, num_experts, space, positions, ends, nullptr) ||
          dsp_spread_experts(x, positions, weights, dtype, rows, tokens, top_k, hidden, dtype, nullptr) ||
          dsp_unpermute_experts(rows, positions, weights, dtype, x, tokens, top_k, hidden, dtype, nullptr);
      if (failed) return 1;
      calls += 3;
      for (void* buffer : {static_cast<void*>(experts), space, positions, ends, x, rows, weights}) free(buffer);
    }
  }
  const int64_t stepped[] = {1, 8, 2047, 2060};
  for (int64_t values : stepped) {
    for (int dtype : {0, 2}) {
      void* lists[4];
      for (int i = 0; i < 4; ++i) lists[i] = calloc(values, i < 2 && dtype == 2 ? 2 : 4);
      if (dsp_adamw(lists, lists + 1, lists + 2, lists + 3, &values, &dtype, &dtype, 1, 1, 1e-3, 0.9, 0.99, 1e-8, 0.1,
                    1, 7, nullptr))
        return 1;
      ++calls;
      for (void* list : lists) free(list);
      const size_t bytes = dtype == 2 ? 2 : 4, blocks = (values + 255) / 256;
      void* coded[] = {calloc(values, bytes),   calloc(values, bytes),   calloc(blocks, 256),
                       calloc(blocks, 4), calloc(blocks, 256), calloc(blocks, 4)};
      if (dsp_adamw_8bit(coded, coded + 1, coded + 2, coded + 3, coded + 4, coded + 5, &values, &dtype, &dtype, 1, 1,
                         1e-3, 0.9, 0.99, 1e-8, 0.1, 1, 7, nullptr))
        return 1;
      ++calls;
      for (void* list : coded) free(list);
    }
  }
  printf("%d calls within bounds\n", calls);
}
