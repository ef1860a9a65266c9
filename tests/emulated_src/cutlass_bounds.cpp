// CUTLASS's C interfaces on memory that ends where it may be touched last, under the address sanitizer.
//
// With an argument workspaces end that many bytes before what is made in them, which has to be reported.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

extern "C" {
int dsp_grouped_workspace(int64_t, int64_t*);
int dsp_grouped_product(const void*, int64_t, const void*, int64_t, int64_t, int64_t, const void*, void*, int64_t,
                        int64_t, int64_t, int64_t, int, void*, int64_t, void*);
int dsp_grouped_outer(const void*, int64_t, const void*, int64_t, const void*, void*, int64_t, int64_t, int64_t, int64_t,
                      int, void*, int64_t, void*);
int dsp_mixed_workspace(int64_t, int64_t, int64_t, int64_t*);
int dsp_mixed_product(const void*, int64_t, const void*, int64_t, const void*, void*, int64_t, int64_t, int64_t, int64_t,
                      int, int, void*, int64_t, void*);
}

namespace {

void* room(int64_t values) {  // of 16 bits, and aligned: it ends where the last value does
  void* found = nullptr;
  if (posix_memalign(&found, 64, values * 2)) abort();
  memset(found, 0, values * 2);
  return found;
}

// How many products by experts there were; below 0 where one was refused.
int grouped(int64_t missing) {
  const int64_t rows = 21, experts = 5, sizes[][2] = {{8, 8}, {24, 16}, {16, 40}};
  // As they should be, and as they should not: they decrease, exceed the rows, or are below 0.
  const int32_t all_ends[][5] = {{3, 3, 10, 20, 21}, {0, 0, 0, 0, 0},     {21, 21, 21, 21, 21},
                                 {9, 2, 15, 4, 12},  {5, 400, 7, 9, 999}, {-3, -1, 2, -9, 1 << 30}};
  int calls = 0;
  for (const char* const capability : {"8", "9"}) {
    setenv("DSP_EMU_CAPABILITY", capability, 1);
    for (const auto& size : sizes) {
      const int64_t inner = size[0], columns = size[1];
      for (const auto& own : all_ends) {
        int64_t bytes = 0;
        if (dsp_grouped_workspace(experts, &bytes)) return -1;
        void* const workspace = room((bytes - missing) / 2);
        void* const ends = malloc(sizeof own);
        memcpy(ends, own, sizeof own);
        void *const x = room(rows * inner), *const grad = room(rows * columns);
        void *const weight = room(experts * inner * columns), *const matrices = room(experts * inner * columns);
        const int64_t matrix = inner * columns;
        const int failed =
            dsp_grouped_product(x, inner, weight, matrix, columns, 1, ends, grad, rows, inner, columns, experts, 2,
                                workspace, bytes, nullptr) ||
            dsp_grouped_product(x, inner, weight, matrix, 1, inner, ends, grad, rows, inner, columns, experts, 1,
                                workspace, bytes, nullptr) ||
            dsp_grouped_outer(x, inner, grad, columns, ends, matrices, rows, inner, columns, experts, 2, workspace, bytes,
                              nullptr);
        if (failed) return -1;
        calls += 3;
        for (void* const one : {workspace, ends, x, grad, weight, matrices}) free(one);
      }
    }
  }
  return calls;
}

// The same of products with codes of 8 and 4 bits.
int mixed(int64_t missing) {
  const int64_t rows = 3, columns = 72, inner = 160;
  int calls = 0;
  setenv("DSP_EMU_CAPABILITY", "9", 1);
  for (const int64_t group : {64, 128, 160}) {
    for (const int format : {0, 1}) {
      const int64_t groups = (inner + group - 1) / group, code_bytes = inner * (format == 0 ? 8 : 4) / 8;
      int64_t bytes = 0;
      if (dsp_mixed_workspace(inner, columns, group, &bytes)) return -1;
      void* const workspace = bytes ? room((bytes - missing) / 2) : nullptr;
      void *const x = room(rows * inner), *const out = room(rows * columns);
      void *const codes = room(columns * code_bytes / 2), *const scales = room(columns * groups * 2);
      const int failed = dsp_mixed_product(x, inner, codes, code_bytes, scales, out, rows, inner, columns, group, format,
                                           2, workspace, bytes, nullptr);
      if (failed) return -1;
      ++calls;
      for (void* const one : {workspace, x, out, codes, scales}) free(one);
    }
  }
  return calls;
}

}  // namespace

int main(int count, char** arguments) {
  const int64_t missing = count > 1 ? atoll(arguments[1]) : 0;
  const int by_experts = grouped(missing), with_few_bits = mixed(missing);
  if (by_experts < 0 || with_few_bits < 0) return 1;
  printf("%d calls within bounds\n", by_experts + with_few_bits);
  return 0;
}
