// Every kernel on memory that ends where it may be touched last, under the address sanitizer.
//
// With an argument one of the buffers is that many bytes short, which has to be reported.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

extern "C" {
int dsp_quantise_bucket(const void* const*, const int64_t*, const int64_t*, const int*, int64_t, int64_t, int64_t,
                        void*, void*, int64_t, int, void*);
int dsp_dequantise_bucket(const void*, const void*, void* const*, const int64_t*, int64_t, int64_t, int, int64_t, int,
                          void*);
int dsp_dequantise_sum(const void*, const void*, void* const*, const int64_t*, int64_t, int64_t, float, int, int64_t,
                       int, void*);
int dsp_copy_in(const void* const*, const int64_t*, const int64_t*, int64_t, int64_t, void*, void*);
int dsp_copy_out(const void*, void* const*, const int64_t*, const int64_t*, int64_t, int64_t, void*);
}

int main(int count, char** arguments) {
  const size_t missing = count > 1 ? atoi(arguments[1]) : 0;
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
  printf("%d calls within bounds\n", calls);
}
